"""Stage 1 of the critic: the value head learns alone, or with the trunk and the language model."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.data.collate import Batch
from wmtp.distributed.process_group import Processes
from wmtp.models.mtp import MtpModel, Outputs
from wmtp.objectives.mtp import MtpObjective
from wmtp.objectives.value_loss import ValueLoss, value_metrics
from wmtp.ops.metric_sums import Sums


class ValueObjective:
    """L = value loss + `language_model_coef` · the language model's loss, if there is one beside it.

    Without a language model only the trunk runs, and not even that where the batch brings its states.
    """

    def __init__(
        self, value_loss: ValueLoss, language_model: MtpObjective | None = None, language_model_coef: float = 1.0
    ) -> None:
        self.value_loss = value_loss
        self.language_model, self.language_model_coef = language_model, language_model_coef

    @property
    def name(self) -> str:
        """What the value head learns, and whether the language model learns beside it."""
        beside = "" if self.language_model is None else f" and {self.language_model_coef} · language model"
        return f"value of {self.value_loss.kind}{beside}"

    def totals(self, model: MtpModel, batch: Batch) -> Float[Tensor, " part"]:
        """The number of values or pairs, then what the language model's loss is divided by."""
        own = self.value_loss.total(batch).float()[None]
        if self.language_model is None:
            return own
        return torch.cat([own, self.language_model.totals(model, batch)])

    def check(self, totals: Float[Tensor, " part"]) -> None:
        """Asks the language model beside; an update without a value is no error."""
        if self.language_model is not None:
            self.language_model.check(totals[1:])

    def loss(self, model: MtpModel, batch: Batch, totals: Float[Tensor, " part"]) -> tuple[Tensor, Sums]:
        """Both losses from one forward."""
        if self.language_model is None:
            total, sums = self.value_loss.sum(self._values(model, batch), batch)
            return total / totals[0].clamp(min=1), sums
        outputs = model(batch.tokens)
        assert outputs.values is not None
        total, sums = self.value_loss.sum(outputs.values, batch)
        beside, beside_sums = self.language_model.loss_of(outputs, model, batch, totals[1:])
        sums.add(beside_sums)
        return total / totals[0].clamp(min=1) + self.language_model_coef * beside, sums

    def evaluate(self, model: MtpModel, batch: Batch) -> Sums:
        """The value loss, and every head's loss where they train."""
        if self.language_model is None:
            return self.value_loss.sum(self._values(model, batch), batch)[1]
        outputs = model(batch.tokens)
        assert outputs.values is not None
        _, sums = self.value_loss.sum(outputs.values, batch)
        sums.add(self.language_model.evaluation_of(outputs, model, batch))
        return sums

    def metrics(self, sums: Sums) -> dict[str, float]:
        """`loss` is the sum that is trained."""
        if self.language_model is None:
            values = value_metrics(sums.results())
            return {"loss": values.get("value_loss", 0.0)} | values
        values = self.language_model.metrics(sums)
        language_model_loss = values["loss"]
        values["loss"] = values.get("value_loss", 0.0) + self.language_model_coef * language_model_loss
        return values | {"language_model_loss": language_model_loss}

    def finish_update(self, processes: Processes) -> None:
        """Nothing is kept from update to update."""

    def forget_update(self) -> None:
        """Nothing is kept."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing."""

    def _values(self, model: MtpModel, batch: Batch) -> Tensor:
        outputs: Outputs = model(batch.tokens, num_heads=0, hidden_states=batch.hidden_states)
        assert outputs.values is not None
        return outputs.values
