"""What an algorithm is: a map from what was observed of a micro-batch to a weight for each target."""

from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wmtp.errors import TrainingError


class Algorithm(Protocol):
    """Weights targets. Knows nothing of the config, the optimizer or the trackers.

    Raw weights are clipped to [`weight_min`, `weight_max`], then scaled to mean 1.
    """

    weight_min: float
    weight_max: float

    def weights(
        self, losses: Float[Tensor, "head batch position"], valid: Bool[Tensor, "head batch position"]
    ) -> Float[Tensor, "head batch position"]:
        """Raw weights from the policy's cross-entropies (detached); those of invalid targets are ignored."""


def normalised(
    weights: Float[Tensor, "head batch position"],
    shares: Float[Tensor, "head batch position"],
    weight_min: float,
    weight_max: float,
) -> Float[Tensor, "head batch position"]:
    """Weights clipped to the range and then scaled so that Σ share·weight / Σ share = 1; 0 without a share.

    Raises:
        TrainingError: a weight of a valid target is not finite or below zero.
    """
    valid = shares > 0
    weights = weights.detach().float()
    broken = valid & ~(torch.isfinite(weights) & (weights >= 0))
    if broken.any():
        raise TrainingError(
            f"the algorithm gave {int(broken.sum())} of {int(valid.sum())} targets a weight that is "
            f"not finite or negative, such as {weights[broken][0].item()}"
        )
    clipped = weights.clamp(weight_min, weight_max).where(valid, 0.0)
    scaled: Tensor = clipped * (shares.sum() / (shares * clipped).sum())
    return scaled
