"""The algorithm focal, which gives small weights to targets that the policy already finds probable.

Source: Lin et al. 2017, Focal Loss for Dense Object Detection (arXiv 1708.02002), eq. 4. There the gradient also flows
through the weight. Here the weight is a constant, as for all algorithms.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations
from wmtp.field_types import PositiveFloat


@dataclass(kw_only=True, eq=False)
class Focal(Algorithm):
    """The algorithm with weights (1 − p)^gamma, where p is the policy's probability of the target."""

    gamma: PositiveFloat = 2.0
    """The exponent. A larger one gives less weight to targets that the policy already finds probable."""
    rescale: bool = True
    """Whether the weights of each head are scaled to mean 1."""

    uses_losses = "own"
    weight_min = 0.0
    weight_max = 1.0

    def weights(self, observed: Observations) -> Float[Tensor, "*target"]:
        """Return the weights before the scaling. Each weight depends only on the loss of its own target."""
        assert observed.losses is not None
        return (-torch.expm1(-observed.losses)) ** self.gamma  # 1 − exp(−loss), but precise for small losses
