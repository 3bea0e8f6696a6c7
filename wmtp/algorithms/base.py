"""The interface of algorithms. An algorithm computes a weight for each target of a micro-batch."""

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
    """The inputs of an algorithm for one micro-batch. Inputs that it does not need can be None.

    No input has a gradient. Tensors with one element per target have the shape [head, batch, position]. Head k at
    position t predicts the token at t + k. If the algorithm has `uses_losses = "own"`, these tensors instead have one
    dimension, and contain only the targets of one chunk.
    """

    valid: Bool[Tensor, "*target"]
    """True where there is a target."""
    response: Bool[Tensor, "batch position"]
    """True at the tokens of the solution."""
    losses: Float[Tensor, "*target"] | None = None
    """Cross-entropy of the policy for each target, in nats."""
    reference_losses: Float[Tensor, "*target"] | None = None
    """Cross-entropy in nats with which head 1 of the reference model predicts the token of each target."""
    values: Float[Tensor, "batch position"] | None = None
    """Output of the value head after each token."""
    rewards: Float[Tensor, " batch"] | None = None
    """Reward of each solution."""
    harmful: Bool[Tensor, "batch position"] | None = None
    """True at tokens that are noise or that make a wrong solution wrong. None if these tokens are not known."""
    number: int = 0
    """Index of the micro-batch within the run."""


class Algorithm(ABC):
    """A method that computes the weights of targets.

    The results of the method `weights` are clipped to the range from `weight_min` to `weight_max`. The clipped weights
    are then scaled to mean 1.
    """

    weight_min: float
    weight_max: float
    uses_losses: Literal["none", "own", "all"] = "none"
    """Which losses the weight of a target depends on: on no loss, on the loss of this target, or on all losses.

    If the value is "own", the weights are computed chunk by chunk together with the losses. If it is "all", the losses
    are computed before the weights, in an additional pass.
    """
    min_heads = 1
    """Minimum number of heads. If a model has fewer heads, the algorithm is equal to the baseline."""
    needs_values = False
    """Whether the algorithm needs a value head."""
    needs_reference = False
    """Whether the algorithm needs a reference model."""
    needs_token_labels = False
    """Whether the algorithm needs to know which tokens are harmful. This is not known for real data."""
    value_coef = 0.0
    """Coefficient of the value loss, relative to the policy loss."""
    reference: Path | Literal["initial"] | None = None
    """Reference model: a run, a checkpoint, a pretrained model, or "initial" for the policy before training.

    None selects the model that stage 1 trained.
    """

    @property
    def name(self) -> str:
        """The name of the algorithm. By default it is the name of the class."""
        return type(self).__name__

    @abstractmethod
    def weights(self, observed: Observations) -> Float[Tensor, "*target"]:
        """Return the weights before clipping, in the shape of `observed.valid`. Entries without a target are ignored.

        If `uses_losses` is "own", the weight of a target may depend only on the inputs of this target, and the method
        must accept losses of any shape.
        """

    def finish_update(self, processes: Processes) -> None:  # noqa: B027 - most algorithms have no state
        """Update the state after an optimizer step. All ranks must call this method."""

    def discard_update(self) -> None:  # noqa: B027
        """Discard the statistics of an update that was skipped."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is needed to resume a run, as JSON values."""
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
    """Return weights that are clipped to a range. They have no gradient, and they are 0 where there is no target.

    If a weight is negative or not finite, the result is NaN. The loss of the update is then NaN on every rank. If this
    function raised an error instead, the other ranks would wait for this rank.
    """
    weights = weights.detach().float()
    is_usable = torch.isfinite(weights) & (weights >= 0)
    return weights.clamp(weight_min, weight_max).where(is_usable, torch.nan).where(valid, 0.0)


def mean_one_scale(
    weights: Float[Tensor, "head batch position"], shares: Float[Tensor, "head batch position"]
) -> Float[Tensor, ""]:
    """Return the factor that scales clipped weights so that Σ share·weight / Σ share = 1.

    `shares` contains the position weights that `ops.targets.position_weights` returns. If there is no target, the
    factor is 0. If every target has weight 0, the factor is infinite and the loss is NaN.
    """
    total = shares.sum()
    return torch.where(total > 0, total / (shares * weights).sum(), 0.0)
