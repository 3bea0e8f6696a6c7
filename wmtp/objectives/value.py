"""The objective of stage 1 of critic. The value head is trained alone or together with the language model."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from wmtp.data.collate import Batch
from wmtp.distributed.process_group import Processes
from wmtp.models.mtp import MtpModel, Outputs
from wmtp.objectives.base import PreparedBatch, total_denominators
from wmtp.objectives.mtp import SINGLE_PROCESS, MtpObjective
from wmtp.objectives.value_loss import ValueLoss, value_metrics
from wmtp.ops.metric_sums import MetricSums


class ValueObjective:
    """The objective L = value loss + `language_model_coef` · language-model loss.

    If `language_model` is None, the loss has only the first term and the prediction heads are not computed. If the
    batch then contains the hidden states of the trunk, the trunk is not computed either.
    """

    def __init__(
        self, value_loss: ValueLoss, language_model: MtpObjective | None = None, language_model_coef: float = 1.0
    ) -> None:
        self.value_loss = value_loss
        self.language_model, self.language_model_coef = language_model, language_model_coef

    @property
    def name(self) -> str:
        """The kind of the value loss, with the coefficient of the language-model loss if there is one."""
        suffix = "" if self.language_model is None else f" and {self.language_model_coef} · language model"
        return f"value of {self.value_loss.kind}{suffix}"

    def prepare(
        self, model: MtpModel, batches: Sequence[Batch], processes: Processes = SINGLE_PROCESS
    ) -> list[PreparedBatch]:
        """Return the micro-batches with the denominators of the update.

        Raises:
            TrainingError: the language model is trained, but has no target. An update without a term of the value loss
                is allowed.
        """
        parts = [{"values": self.value_loss.denominator(batch)} for batch in batches]
        values = total_denominators(parts, processes)
        if self.language_model is None:
            return [PreparedBatch(batch, values, processes) for batch in batches]
        prepared = self.language_model.prepare(model, batches, processes)
        return [replace(each, denominators={**each.denominators, **values}) for each in prepared]

    def loss(self, model: MtpModel, prepared: PreparedBatch) -> tuple[Tensor, MetricSums]:
        """Return the loss L and the metric sums, computed from one forward pass."""
        batch, num_values = prepared.batch, prepared.denominators["values"].clamp(min=1)
        if self.language_model is None:
            total, sums = self.value_loss.sum(self._values(model, batch), batch)
            return total / num_values, sums
        outputs = model(batch.tokens)
        assert outputs.values is not None
        total, sums = self.value_loss.sum(outputs.values, batch)
        language_model_loss, language_model_sums = self.language_model.loss_from_outputs(outputs, model, prepared)
        sums.add(language_model_sums)
        return total / num_values + self.language_model_coef * language_model_loss, sums

    def evaluate(self, model: MtpModel, batch: Batch) -> MetricSums:
        """Return the metric sums of the values and, if the language model is trained, of the losses of the heads."""
        if self.language_model is None:
            return self.value_loss.sum(self._values(model, batch), batch)[1]
        outputs = model(batch.tokens)
        assert outputs.values is not None
        _, sums = self.value_loss.sum(outputs.values, batch)
        sums.add(self.language_model.evaluate_outputs(outputs, model, batch))
        return sums

    def metrics(self, sums: MetricSums) -> dict[str, float]:
        """Return the metrics of the values and of the language model. The metric `loss` is L."""
        if self.language_model is None:
            values = value_metrics(sums.results())
            return {"loss": values.get("value_loss", 0.0)} | values
        values = self.language_model.metrics(sums)
        language_model_loss = values["loss"]
        values["loss"] = values.get("value_loss", 0.0) + self.language_model_coef * language_model_loss
        return values | {"language_model_loss": language_model_loss}

    def finish_update(self) -> None:
        """Do nothing, because this objective has no state between updates."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing, because the state is empty."""

    def _values(self, model: MtpModel, batch: Batch) -> Tensor:
        outputs: Outputs = model(batch.tokens, num_heads=0, hidden_states=batch.hidden_states)
        assert outputs.values is not None
        return outputs.values
