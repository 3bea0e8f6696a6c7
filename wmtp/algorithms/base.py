"""The interface of algorithms: they map observations of a micro-batch to a weight for each target."""

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
"""The value of `reference` that selects the policy before training."""
Reference = Literal["initial"] | ExistingPath


@dataclass(frozen=True)
class Observations:
    """The inputs of a weighting for one micro-batch, all detached. Inputs that the algorithm does not use are None.

    Per-target tensors have the shape [head, batch, position], where head k at position t predicts the token at t + k.
    For an algorithm with `uses_losses = "own"` they are one-dimensional and contain the targets of one chunk.
    """

    valid: Bool[Tensor, "*target"]
    """True where there is a target."""
    response: Bool[Tensor, "batch position"]
    """True at the tokens of the solution."""
    losses: Float[Tensor, "*target"] | None = None
    """Cross-entropy of the policy for each target, in nats."""
    reference_losses: Float[Tensor, "*target"] | None = None
    """Next-token cross-entropy of the reference model for the same token, in nats."""
    values: Float[Tensor, "batch position"] | None = None
    """Output of the value head after each token."""
    rewards: Float[Tensor, " batch"] | None = None
    """Reward of each solution."""
    harmful: Bool[Tensor, "batch position"] | None = None
    """True at tokens that are noise or that make a wrong solution wrong; None if unknown."""
    number: int = 0
    """Index of the micro-batch within the run."""


class Algorithm(ABC):
    """A weighting of targets, independent of the config, the optimizer and the trackers.

    Raw weights are clipped to [`weight_min`, `weight_max`], then scaled to mean 1.
    """

    weight_min: float
    weight_max: float
    uses_losses: Literal["none", "own", "all"] = "none"
    """The losses on which the weight of a target depends: "none", its "own" loss, or the losses of "all" targets.

    With "own", weights are computed chunk by chunk together with the losses. With "all", the losses are computed first,
    in an extra pass.
    """
    min_heads = 1
    """Minimum number of heads; with fewer, the algorithm is equal to the baseline."""
    needs_values = False
    """Whether the algorithm needs a value head."""
    needs_reference = False
    """Whether the algorithm needs a reference model."""
    needs_token_labels = False
    """Whether the algorithm needs ground truth about harmful tokens; it is then an upper bound, not a method."""
    value_coef = 0.0
    """Coefficient of the value loss, relative to the policy loss."""
    reference: Path | Literal["initial"] | None = None
    """Reference model: a run, a checkpoint, a pretrained model, or "initial" for the policy before training.

    None selects the model that stage 1 trained.
    """

    @property
    def name(self) -> str:
        """The name of the weighting; by default the class name."""
        return type(self).__name__

    @abstractmethod
    def weights(self, observed: Observations) -> Float[Tensor, "*target"]:
        """Return the raw weights in the shape of `observed.valid`; entries without a target are ignored.

        With `uses_losses = "own"` the computation must be elementwise and accept losses of any shape.
        """

    def finish_update(self, processes: Processes) -> None:  # noqa: B027 - most algorithms have no state
        """Update the state after an optimizer step. All ranks must call this method."""

    def discard_update(self) -> None:  # noqa: B027
        """Discard the statistics of the micro-batches of an update that was skipped."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as plain JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore the state that `state_dict` returned."""


def require_range(weight_min: float, weight_max: float) -> None:
    """Check that the range of weights is not empty.

    Raises:
        InputError: `weight_min` is not below `weight_max`.
    """
    if weight_min >= weight_max:
        raise InputError(f"weight_min={weight_min:g} must be below weight_max={weight_max:g}")


def clip_weights(
    weights: Float[Tensor, "*target"], valid: Bool[Tensor, "*target"], weight_min: float, weight_max: float
) -> Float[Tensor, "*target"]:
    """Return the weights clipped to their range, detached, and 0 where there is no target.

    A raw weight that is negative or not finite becomes NaN, which makes the loss of the update NaN on every rank. This
    function does not raise an error instead, because the other ranks would then wait for this rank.
    """
    weights = weights.detach().float()
    is_usable = torch.isfinite(weights) & (weights >= 0)
    return weights.clamp(weight_min, weight_max).where(is_usable, torch.nan).where(valid, 0.0)


def mean_one_scale(
    weights: Float[Tensor, "head batch position"], shares: Float[Tensor, "head batch position"]
) -> Float[Tensor, ""]:
    """Return the factor that scales clipped weights so that Σ share·weight / Σ share = 1.

    `shares` are the position weights, from `ops.targets.position_weights`. The factor is 0 if there is no target. It is
    infinite if every target has weight 0; the loss is then NaN.
    """
    total = shares.sum()
    return torch.where(total > 0, total / (shares * weights).sum(), 0.0)
