"""The algorithm history, which gives large weights to targets whose loss has decreased since the previous epoch.

The difference to an earlier state of the same model is the signal of ssToken (Qin et al. 2025, arXiv 2510.18250), which
trains on the tokens with the largest differences. Here the earlier state is that of the previous epoch.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import ExponentialAlgorithm, Observations
from wmtp.field_types import PositiveFloat


@dataclass(kw_only=True, eq=False)
class History(ExponentialAlgorithm):
    """The algorithm with weights exp((CE_previous − CE_now) / temperature). CE is the policy's loss of a target.

    CE_previous is the loss of the same head for the same target in the previous epoch. In the first epoch, all weights
    are 1.
    """

    temperature: PositiveFloat = 1.0
    """The divisor of the difference. The weights differ more if it is lower."""

    uses_losses = "own"
    needs_previous_losses = True

    def weights(self, observed: Observations) -> Float[Tensor, "*target"]:
        """Return the weights before the scaling. Each weight depends only on the losses of its own target."""
        assert observed.losses is not None and observed.previous_losses is not None
        progress = observed.previous_losses - observed.losses
        return self.exponential(progress.where(~torch.isnan(observed.previous_losses), 0.0) / self.temperature)
