"""Stage 1, the pretraining stage. It trains a value head for critic, or a model with which others compare the policy.

All stages use the class `Trainer`, but with different objectives. The group `pretrain` contains the parameters of a
stage class. It may also contain keys of train.yaml, for example `pretrain.num_epochs` and `pretrain.optimizer.lr`.
These keys override the keys of the same name for stage 1 only.
"""

from pathlib import Path
from typing import Annotated, Literal, Protocol

from pydantic import Field

from wmtp.algorithms.base import ReferenceName
from wmtp.algorithms.uniform import Uniform
from wmtp.data.dataset import Dataset
from wmtp.field_types import InputPath, PositiveFloat, Ratio
from wmtp.models.mtp import MtpModel
from wmtp.models.value_heads import ValueKind
from wmtp.objectives.base import Objective, metric_names
from wmtp.objectives.class_conditional import ClassConditionalObjective
from wmtp.objectives.implicit_reward import ImplicitRewardObjective
from wmtp.objectives.mtp import MtpObjective
from wmtp.objectives.value import ValueObjective
from wmtp.objectives.value_loss import Kind, ValueLoss
from wmtp.ops.targets import Shares


class Stage(Protocol):
    """The interface of a pretraining stage."""

    reuse: Path | None
    """Folder of an earlier run whose finished stage 1 is copied. If it is None, stage 1 is trained."""
    trains_policy: bool
    """Whether stage 2 continues to train the model of this stage. Otherwise, a new model is built for stage 2."""
    needs_hidden_states: bool
    """Whether the stage trains on precomputed hidden states of a frozen trunk."""
    references: tuple[ReferenceName, ...]
    """The references that an algorithm can use after this stage."""
    needs_start_losses: bool
    """Whether the stage trains on the precomputed losses of the model before its training."""
    start: Path | None
    """Folder of a run or a checkpoint whose model the stage begins with. None selects the initial weights."""
    saves_value_head: bool
    """Whether the value head is saved in a separate file in addition to the checkpoint."""

    def objective(self, shares: Shares) -> Objective:
        """Return the objective of the stage. `shares` is the influence of targets (`MtpObjective`)."""

    def add_modules(self, model: MtpModel) -> None:
        """Add the modules to a new model that only this stage needs or that it trains first."""

    def prepare(self, model: MtpModel, data: Dataset) -> None:
        """Set the initial parameters of the added modules from the training data."""

    def freeze(self, model: MtpModel) -> None:
        """Freeze all parameters that this stage does not train."""

    def metric_names(self, num_heads: int) -> list[str]:
        """Return the names of the metrics that the stage measures for a model with `num_heads` prediction heads."""


class ValueStage(Stage):
    """A stage that trains the policy's value head.

    The value head is trained either alone on a frozen trunk, or together with the language model. Stage 2 continues to
    train the model of this stage.
    """

    trains_policy = True
    references = ()
    needs_start_losses = False
    start = None

    def __init__(
        self,
        *,
        trains: Literal["all", "head"] = "all",
        value: ValueKind = "state",
        loss: Kind = "cross_entropy",
        discount: Annotated[float, Field(gt=0, le=1)] = 1.0,
        trace_decay: Ratio = 0.95,
        language_model_coef: Annotated[float, Field(ge=0)] = 0.3,
        save_value_head: bool = True,
        reuse: InputPath | None = None,
    ) -> None:
        """Create the stage.

        Args:
            trains: "all" trains the value head together with the language model, "head" trains only the value head.
            value: the kind of the value head, see `ValueKind`.
            loss: the kind of value loss, see `ValueLoss`.
            discount: the discount factor γ of the λ-return.
            trace_decay: the factor λ of the λ-return.
            language_model_coef: the coefficient of the language-model loss; not used with `trains="head"`.
            save_value_head: whether the value head is saved in a separate file in addition to the checkpoint.
            reuse: the folder of an earlier run whose finished stage 1 is copied. If it is None, stage 1 is trained.
        """
        self.trains, self.value, self.language_model_coef = trains, value, language_model_coef
        self.value_loss = ValueLoss(loss, discount, trace_decay)
        self.saves_value_head, self.reuse = save_value_head, reuse
        self.needs_hidden_states = trains == "head"

    def objective(self, shares: Shares) -> Objective:
        """Return the objective of the stage."""
        return ValueObjective(
            self.value_loss, self.language_model_coef if self.trains == "all" else None, shares=shares
        )

    def add_modules(self, model: MtpModel) -> None:
        """Add the value head."""
        model.add_value_head(self.value)

    def prepare(self, model: MtpModel, data: Dataset) -> None:
        """Let the value head begin with the mean reward of the training data at every token."""
        assert model.value_head is not None
        model.value_head.set_output(self.value_loss.first_output(float(data.train.rewards.mean())))

    def freeze(self, model: MtpModel) -> None:
        """Freeze all parameters that this stage does not train."""
        model.set_trainable()
        for name, parameter in model.named_parameters():
            if self.trains == "head":
                parameter.requires_grad_(name.startswith("value_head."))

    def metric_names(self, num_heads: int) -> list[str]:
        """Return the names of the value metrics.

        If the stage also trains the prediction heads, the names of their metrics are included.
        """
        trains_heads = self.trains == "all"
        return metric_names(num_heads if trains_heads else 0, values=True, language_model_loss=trains_heads)


class ReferenceStage(Stage):
    """A stage that trains a separate reference model on curated data, as an ordinary language model."""

    trains_policy = False
    needs_hidden_states = False
    references: tuple[ReferenceName, ...] = ("reference", "start")
    saves_value_head = False
    needs_start_losses = False
    start: Path | None = None

    def __init__(self, *, reuse: InputPath | None = None) -> None:
        """Create the stage.

        Args:
            reuse: the folder of an earlier run whose finished stage 1 is copied. If it is None, stage 1 is trained.
        """
        self.reuse = reuse

    def objective(self, shares: Shares) -> Objective:
        """Return the objective of the stage."""
        return MtpObjective(Uniform(), shares=shares)

    def add_modules(self, model: MtpModel) -> None:
        """Do nothing, because an ordinary language model is trained."""

    def prepare(self, model: MtpModel, data: Dataset) -> None:
        """Do nothing, because no module was added."""

    def freeze(self, model: MtpModel) -> None:
        """Do nothing, because this stage trains all parameters."""

    def metric_names(self, num_heads: int) -> list[str]:
        """Return the names of the metrics of the prediction heads."""
        return metric_names(num_heads, values=False)


class ContrastStage(ReferenceStage):
    """A stage that trains a class-conditional language model on correct and incorrect solutions."""

    references = ("correct", "incorrect")

    def objective(self, shares: Shares) -> Objective:
        """Return the objective of the stage."""
        return ClassConditionalObjective(shares=shares)

    def add_modules(self, model: MtpModel) -> None:
        """Add the embedding of the two classes."""
        model.add_class_embedding()


class ImplicitRewardStage(ReferenceStage):
    """A stage that trains a language model to be a reward model (`ImplicitRewardObjective`)."""

    references = ("reward_model", "start")
    needs_start_losses = True

    def __init__(
        self, *, beta: PositiveFloat = 0.05, start: InputPath | None = None, reuse: InputPath | None = None
    ) -> None:
        """Create the stage.

        Args:
            beta: the coefficient of the summed log-ratio.
            start: the folder of a run or a checkpoint whose model the stage begins with. If it is None, the stage
                begins with the initial weights, which must be pretrained.
            reuse: the folder of an earlier run whose finished stage 1 is copied. If it is None, stage 1 is trained.
        """
        super().__init__(reuse=reuse)
        self.beta, self.start = beta, start

    def objective(self, shares: Shares) -> Objective:
        """Return the objective of the stage."""
        return ImplicitRewardObjective(self.beta)

    def metric_names(self, num_heads: int) -> list[str]:
        """Return the names of the loss and of the accuracy of predicted rewards."""
        names = [f"{split}/{name}" for split in ("val", "train") for name in ("loss", "reward_accuracy")]
        return [*names, "train/grad_norm", "train/lr"]
