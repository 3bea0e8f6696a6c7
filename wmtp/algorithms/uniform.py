"""The baseline, in which every target has the same weight."""

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations


class Uniform(Algorithm):
    """The algorithm that gives every target weight 1."""

    weight_min = 1.0
    weight_max = 1.0
    rescale = False  # the mean is 1 already

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """Return the weight 1 for every target."""
        return torch.ones_like(observed.valid, dtype=torch.float32)
