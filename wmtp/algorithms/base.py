"""The interface of algorithms. An algorithm computes a weight for each target of a micro-batch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wmtp.data.split import TokenizedSplit
from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError
from wmtp.field_types import ExistingPath, PositiveFloat
from wmtp.models.value_heads import ValueKind

INITIAL: Final = "initial"
"""The value of `reference` that selects the policy before training."""
Reference = Literal["initial"] | ExistingPath
MAX_EXPONENT = 60.0
"""The largest absolute value of the exponent of a weight."""
AdditionalPass = Literal["none", "trunk", "heads"]
"""The last part of the model that an additional forward pass without gradient computes; none: there is no pass."""
ReferenceName = Literal["reference", "reward_model", "start", "correct", "incorrect"]
"""A model whose losses an algorithm can use.

"reference" is the reference model, "reward_model" the language model that stage 1 has trained to predict rewards, and
"start" the model of stage 1 before stage 1. If `Algorithm.reference` selects the reference model, there is no stage 1,
and "start" is the policy before training. "correct" and "incorrect" are the class-conditional model of stage 1, with
this class for every solution.
"""


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
    reference_losses: Float[Tensor, " reference *target"] | None = None
    """Cross-entropy in nats with which head 1 of each reference predicts the token of each target.

    The references are those in `Algorithm.references`, in this order.
    """
    previous_losses: Float[Tensor, "*target"] | None = None
    """Cross-entropy of the policy for each target in the previous epoch, in nats; NaN if there is none."""
    entropies: Float[Tensor, "*target"] | None = None
    """Entropy in nats with which the policy predicts each target, over the `Algorithm.entropy_top_k` tokens."""
    values: Float[Tensor, "batch position"] | None = None
    """Value after each token."""
    rewards: Float[Tensor, " batch"] | None = None
    """Reward of each solution. If the values are no estimates of the reward, it is the value after the last token."""
    harmful: Bool[Tensor, "batch position"] | None = None
    """True at tokens that are noise or that make a wrong solution wrong. None if these tokens are not known."""
    number: int = 0
    """Index of the micro-batch within the run."""
    samples: tuple[str, ...] = ()
    """A name for each sample, which differs between updates and does not depend on the split into micro-batches."""


class Algorithm(ABC):
    """A method that computes the weights of targets.

    The results of the method `weights` are clipped to the range from `weight_min` to `weight_max`. If `rescale` is
    true, the clipped weights are then scaled to mean 1 over all micro-batches and ranks of the update. If the weights
    depend on the policy's losses, the weights of each head are scaled to mean 1, because the losses of the heads differ
    in size.
    """

    weight_min: float
    weight_max: float
    rescale: bool = True
    uses_losses: Literal["none", "own", "all"] = "none"
    """Which losses the weight of a target depends on: on no loss, on the loss of this target, or on all losses.

    If an update has one micro-batch, the losses and the weights of "own" are computed chunk by chunk in one pass, but
    the losses of "all" are computed before the weights. If it has several micro-batches, all losses of the update are
    computed first, in an additional forward pass.
    """
    min_heads: int = 1
    """Minimum number of heads. If a model has fewer heads, the algorithm is equal to the baseline."""
    entropy_top_k: int | None = None
    """The number of most probable tokens whose entropy the algorithm needs (see `Chunk.top_entropies`); None: none.

    If it is not None, `uses_losses` must not be "none", because entropies are computed together with losses.
    """
    needs_previous_losses: bool = False
    """Whether the weights depend on the losses of the same targets in the previous epoch."""
    needs_values: bool = False
    """Whether the algorithm needs a value head."""
    value: ValueKind = "state"
    """The kind of the value head."""
    references: tuple[ReferenceName, ...] = ()
    """The references whose losses the algorithm needs, in this order."""
    needs_rewards: bool = False
    """Whether the weights depend on rewards. Then not all rewards of the training data may be equal."""
    weighs_solutions: bool = False
    """Whether all targets of a solution have the same weight, which differs between solutions."""
    needs_token_labels: bool = False
    """Whether the algorithm needs to know which tokens are harmful. This is not known for real data."""
    needs_better_reference: bool = False
    """Whether the weights have a meaning only where the reference model is better than the policy."""
    value_coef: float = 0.0
    """Coefficient of the value loss, relative to the policy loss."""
    reference: Path | Literal["initial"] | None = None
    """Reference model: a run, a checkpoint, a pretrained model, or "initial" for the policy before training.

    None selects the model that stage 1 trained.
    """

    @property
    def needs_reference(self) -> bool:
        """True if the algorithm needs a reference model."""
        return bool(self.references)

    @property
    def scales_heads_in_one_pass(self) -> bool:
        """True if an update of one micro-batch computes its losses and weights together, and scales the heads then."""
        return self.rescale and self.uses_losses == "own"

    @property
    def additional_pass(self) -> AdditionalPass:
        """The part of the model that computes outputs for the weights of an update with several micro-batches."""
        if self.uses_losses != "none":
            return "heads"
        return "trunk" if self.needs_values else "none"

    @property
    def name(self) -> str:
        """The name of the algorithm. By default it is the name of the class."""
        return type(self).__name__

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as JSON values, except `reference`, because a run can have moved."""
        if not is_dataclass(self):
            return {}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "reference"}

    def prepare(self, data: TokenizedSplit) -> None:  # noqa: B027 - most algorithms need no constants
        """Compute constants from the training data of stage 2, before the first update. By default, do nothing.

        The data contain the losses of the references, except that these are 0 in a dry run.
        """

    @abstractmethod
    def weights(self, observed: Observations) -> Float[Tensor, "*target"]:
        """Return the weights before clipping, in the shape of `observed.valid`. Entries without a target are ignored.

        If `uses_losses` is "own", the weight of a target may depend only on the inputs of this target, and the method
        must accept losses of any shape.
        """

    def update_weights(
        self, observed: Sequence[Observations], processes: Processes
    ) -> Sequence[Float[Tensor, "head _ _"]]:
        """Return the weights before clipping for all micro-batches that this rank has in an update.

        By default, the weights of a micro-batch do not depend on the other micro-batches. All ranks must call this
        method.
        """
        return [self.weights(each) for each in observed]

    def finish_update(self) -> None:  # noqa: B027 - most algorithms have no state
        """Update the state after an optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is needed to resume a run, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore the state that `state_dict` returned."""


class UpdateAlgorithm(Algorithm):
    """An algorithm whose weights depend on all micro-batches and ranks of an update."""

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """Return the weights before clipping for an update that has only this micro-batch."""
        return self.update_weights([observed], Processes.single_process())[0]

    @abstractmethod
    def update_weights(
        self, observed: Sequence[Observations], processes: Processes
    ) -> Sequence[Float[Tensor, "head _ _"]]:
        """Return the weights before clipping for all micro-batches that this rank has in an update."""


@dataclass(kw_only=True, eq=False)
class ExponentialAlgorithm(Algorithm):
    """An algorithm whose weights are exponentials, with settings for their range.

    Raises:
        InputError: `weight_min` is not below `weight_max`.
    """

    weight_min: PositiveFloat = 0.1
    """The lower limit to which weights are clipped before they are scaled."""
    weight_max: PositiveFloat = 5.0
    """The upper limit to which weights are clipped before they are scaled."""
    rescale: bool = True
    """Whether the clipped weights are scaled to mean 1."""

    def __post_init__(self) -> None:
        if self.weight_min >= self.weight_max:
            raise InputError(f"weight_min={self.weight_min:g} must be below weight_max={self.weight_max:g}")

    def exponential(self, exponent: Float[Tensor, "*target"]) -> Float[Tensor, "*target"]:
        """Return exp(exponent). Exponents are limited to ±`MAX_EXPONENT`, so that no weight is 0 or infinite."""
        return exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()


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


def mean_one_scales(
    weight_sums: Float[Tensor, " head"], share_sums: Float[Tensor, " head"], *, per_head: bool
) -> Float[Tensor, " head"]:
    """Return the factors that scale the clipped weights of the heads to mean 1.

    With these factors, Σ share·weight / Σ share = 1 over the targets of all heads, or of each head if `per_head` is
    true. If there is no target, or if every target has weight 0, the factor is 0.

    Args:
        weight_sums: Σ share·weight of the targets of each head.
        share_sums: Σ share of the targets of each head. `ops.targets.target_shares` returns the shares.
        per_head: whether the mean is 1 for each head, instead of for all heads together.
    """
    if not per_head:
        weight_sums, share_sums = (sums.sum().expand_as(sums) for sums in (weight_sums, share_sums))
    return torch.where(weight_sums == 0, 0.0, share_sums / weight_sums)
