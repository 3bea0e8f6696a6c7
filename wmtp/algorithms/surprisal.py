"""The algorithm surprisal, which gives small weights to tokens that are improbable in correct solutions.

The surprisal of a token is −log p⁺. p⁺ is its probability in a correct solution under the class-conditional language
model of `Contrast`. Tokens that make a solution wrong are improbable in correct solutions, and so is random noise.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations
from wmtp.field_types import PositiveFloat


@dataclass(kw_only=True, eq=False)
class Surprisal(Algorithm):
    """The algorithm with weights exp(−power · surprisal), which is p⁺^power."""

    power: PositiveFloat = 1.0
    """The exponent of the probability. The weights differ more if it is larger."""
    rescale: bool = True
    """Whether the weights are scaled to mean 1."""

    references = ("correct",)
    weight_min = 0.0
    weight_max = 1.0

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """Return the weight of the token of each target. It is the same for all heads that predict the token."""
        assert observed.reference_losses is not None
        return torch.exp(-self.power * observed.reference_losses[0])
