"""The stages that come before the training itself: a value head for the critic, a reference for rho1.

A stage is a run of the same Trainer with another objective. Its keys in the config that are not named here
are keys of train.yaml, and say what differs from the training: `pretrain.num_epochs`, `pretrain.optimizer.lr`.
"""

from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field

from wmtp.algorithms.uniform import Uniform
from wmtp.field_types import Ratio
from wmtp.models.mtp import MtpModel
from wmtp.objectives.base import Objective, metric_names
from wmtp.objectives.mtp import MtpObjective
from wmtp.objectives.value import ValueObjective
from wmtp.objectives.value_loss import Kind, ValueLoss


class Stage(Protocol):
    """What the command must know of a stage."""

    reuse: Path | None
    """An earlier run whose stage is taken over instead of training it again."""
    trains_policy: bool
    """Whether the training goes on from this stage's model."""
    needs_hidden_states: bool
    """Whether it works on the hidden states of a frozen trunk."""
    saves_value_head: bool
    """Whether the value head is also left as a file of its own."""

    def objective(self) -> Objective:
        """What the stage's batches mean."""

    def freeze(self, model: MtpModel) -> None:
        """Leave only what this stage trains with gradients."""

    def metric_names(self, num_heads: int) -> list[str]:
        """What the stage measures, with a model of so many heads."""


class ValueStage:
    """Trains the policy's value head, alone on a frozen trunk or together with the language model.

    The training goes on from the model that this stage leaves.
    """

    trains_policy = True

    def __init__(
        self,
        *,
        trains: Literal["all", "head"] = "all",
        loss: Kind = "reward",
        discount: Annotated[float, Field(gt=0, le=1)] = 1.0,
        trace_decay: Ratio = 0.95,
        language_model_coef: Annotated[float, Field(ge=0)] = 0.3,
        save_value_head: bool = True,
        reuse: Path | None = None,
    ) -> None:
        """`reuse` names an earlier run whose stage is taken over instead of training it again."""
        self.trains, self.language_model_coef = trains, language_model_coef
        self.value_loss = ValueLoss(loss, discount, trace_decay)
        self.saves_value_head, self.reuse = save_value_head, reuse
        self.needs_hidden_states = trains == "head"

    def objective(self) -> Objective:
        """What the stage's batches mean."""
        beside = MtpObjective(Uniform()) if self.trains == "all" else None
        return ValueObjective(self.value_loss, beside, self.language_model_coef)

    def freeze(self, model: MtpModel) -> None:
        """Leave only what this stage trains with gradients."""
        model.train_all()
        for name, parameter in model.named_parameters():
            if self.trains == "head":
                parameter.requires_grad_(name.startswith("value_head."))

    def metric_names(self, num_heads: int) -> list[str]:
        """Those of the values, and of the heads if they train."""
        beside = self.trains == "all"
        return metric_names(num_heads if beside else 0, values=True, language_model_loss=beside)


class ReferenceStage:
    """Trains a reference model of its own on curated data, as an ordinary language model."""

    trains_policy = False
    needs_hidden_states = False
    saves_value_head = False

    def __init__(self, *, reuse: Path | None = None) -> None:
        """`reuse` names an earlier run whose stage is taken over instead of training it again."""
        self.reuse = reuse

    def objective(self) -> Objective:
        """What the stage's batches mean."""
        return MtpObjective(Uniform())

    def freeze(self, model: MtpModel) -> None:
        """All of the model trains."""

    def metric_names(self, num_heads: int) -> list[str]:
        """Those of the heads."""
        return metric_names(num_heads, values=False)
