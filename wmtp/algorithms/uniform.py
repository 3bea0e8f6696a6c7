"""The baseline: every target has the same weight."""

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations


class Uniform(Algorithm):
    """The weighting that gives every target weight 1."""

    weight_min = 1.0
    weight_max = 1.0

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """Return ones."""
        return torch.ones_like(observed.valid, dtype=torch.float32)
