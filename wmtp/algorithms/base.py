"""What an algorithm is: a map from what was observed of a micro-batch to a weight for each target."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError
from wmtp.field_types import ExistingPath

INITIAL = "initial"
"""The name of the policy before its training, where it is to be the reference."""
Reference = Literal["initial"] | ExistingPath


@dataclass(frozen=True)
class Observations:
    """What is known of a micro-batch when its targets are weighted. What was not asked for is None.

    All are detached. Targets are [head, batch, position], where head k at position t predicts the token at
    t + k; or some of them in a row, for an algorithm that weighs each by its own loss.
    """

    valid: Bool[Tensor, "*target"]
    """Where there is a target."""
    response: Bool[Tensor, "batch position"]
    """The tokens of the solution."""
    losses: Float[Tensor, "*target"] | None = None
    """The policy's cross-entropy of each target."""
    reference_losses: Float[Tensor, "*target"] | None = None
    """The reference's next-token cross-entropy of the same token."""
    values: Float[Tensor, "batch position"] | None = None
    """The value head's output after reading each token."""
    rewards: Float[Tensor, " batch"] | None = None
    """How good each solution is."""
    misleading: Bool[Tensor, "batch position"] | None = None
    """The tokens that are noise, or make a wrong solution wrong, where that is known."""
    number: int = 0
    """Which micro-batch of the run this is."""


class Algorithm(ABC):
    """Weights targets. Knows nothing of the config, the optimizer or the trackers.

    Raw weights are clipped to [`weight_min`, `weight_max`], then scaled to mean 1.
    """

    weight_min: float
    weight_max: float
    uses_losses: Literal["none", "own", "all"] = "none"
    """Whether a target's weight depends on no loss, on its own, or on those of other targets too. "own"
    weights are computed chunk by chunk beside the losses; "all" costs a pass over the losses before."""
    min_heads = 1
    """With fewer heads it would do the same as the baseline."""
    needs_values = False
    needs_reference = False
    needs_truth = False
    """Whether it is told which tokens mislead: a bound, no method."""
    value_coef = 0.0
    """How much the value head's loss counts beside the policy's."""
    reference: Path | Literal["initial"] | None = None
    """A run, checkpoint or pretrained model to be the reference, or the policy's own before training; None: the
    stage before has trained one."""

    @property
    def name(self) -> str:
        """The kind of weighting."""
        return type(self).__name__

    @abstractmethod
    def weights(self, observed: Observations) -> Float[Tensor, "*target"]:
        """Raw weights; those of invalid targets are ignored.

        With `uses_losses` "own", must work elementwise on losses of any shape.
        """

    def finish_update(self, processes: Processes) -> None:  # noqa: B027 - most keep nothing
        """An optimizer update was made of the micro-batches weighted since the last one, in all processes."""

    def forget_update(self) -> None:  # noqa: B027
        """The micro-batches weighted since the last update made none."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, as plain JSON."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Put back what `state_dict` gave."""


def require_range(weight_min: float, weight_max: float) -> None:
    """Raises `InputError` if no weight can lie in the range."""
    if weight_min >= weight_max:
        raise InputError(f"weight_min={weight_min:g} must be below weight_max={weight_max:g}")


def clipped(
    weights: Float[Tensor, "*target"], valid: Bool[Tensor, "*target"], weight_min: float, weight_max: float
) -> Float[Tensor, "*target"]:
    """Weights inside their range, and 0 where there is no target.

    NaN where an algorithm gave one that is not finite or negative. The loss is then NaN too, in every process: an
    error raised here, in one of them, would leave the others waiting.
    """
    weights = weights.detach().float()
    sound = torch.isfinite(weights) & (weights >= 0)
    return weights.clamp(weight_min, weight_max).where(sound, torch.nan).where(valid, 0.0)


def mean_one(
    weights: Float[Tensor, "head batch position"], shares: Float[Tensor, "head batch position"]
) -> Float[Tensor, ""]:
    """The factor that brings clipped weights to Σ share·weight / Σ share = 1; 0 where nothing has a share.

    Infinite where every target has weight 0, so that their loss is NaN.
    """
    total = shares.sum()
    return torch.where(total > 0, total / (shares * weights).sum(), 0.0)
