"""The baseline: every target counts the same."""

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations


class Uniform(Algorithm):
    """Weight 1 for every target."""

    weight_min = 1.0
    weight_max = 1.0

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """Ones, whatever was observed."""
        return torch.ones_like(observed.valid, dtype=torch.float32)
