"""The algorithm dft (dynamic fine-tuning), which gives small weights to targets that the policy finds improbable.

Source: Wu et al. 2025, On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification
(arXiv 2508.05629). There the power is 1.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations
from wmtp.field_types import PositiveFloat


@dataclass(kw_only=True, eq=False)
class Dft(Algorithm):
    """The algorithm with weights p^power, where p is the policy's probability of the target."""

    power: PositiveFloat = 1.0
    """The exponent of the probability. The weights differ more if it is larger."""
    rescale: bool = True
    """Whether the weights of each head are scaled to mean 1."""

    uses_losses = "own"
    weight_min = 0.0
    weight_max = 1.0

    def weights(self, observed: Observations) -> Float[Tensor, "*target"]:
        """Return the weights before the scaling. Each weight depends only on the loss of its own target."""
        assert observed.losses is not None
        return torch.exp(-self.power * observed.losses)
