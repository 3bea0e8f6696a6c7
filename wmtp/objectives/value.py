"""The objective of stage 1 of critic. The value head is trained alone or together with the language model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from wmtp.algorithms.uniform import Uniform
from wmtp.data.collate import Batch
from wmtp.distributed.process_group import Processes
from wmtp.models.mtp import MtpModel, Outputs
from wmtp.objectives.base import PreparedBatch, total_denominators
from wmtp.objectives.mtp import SINGLE_PROCESS, MtpObjective, describe_shares
from wmtp.objectives.value_loss import ValueLoss, value_metrics
from wmtp.ops.metric_sums import MetricSums
from wmtp.ops.targets import Shares


class ValueObjective:
    """The objective L = value loss + `language_model_coef` · language-model loss.

    Without `language_model_coef`, the loss has only the first term and the prediction heads are not computed. If the
    batch then contains the hidden states of the trunk, the trunk is not computed either.
    """

    settings: Mapping[str, Any] = {}

    def __init__(
        self, value_loss: ValueLoss, language_model_coef: float | None = None, *, shares: Shares = "position"
    ) -> None:
        """Create the objective. `shares` is the influence of the language model's targets."""
        self.value_loss, self.language_model_coef = value_loss, language_model_coef or 0.0
        self.language_model = (
            None if language_model_coef is None else MtpObjective(Uniform(), value_loss, shares=shares)
        )

    @property
    def name(self) -> str:
        """The kind of the value loss, with the coefficient of the language-model loss if there is one."""
        suffix = ""
        if self.language_model is not None:
            shares = describe_shares(self.language_model.shares)
            suffix = f" and {self.language_model_coef} · language model{shares}"
        return f"value of {self.value_loss.kind}{suffix}"

    def prepare(
        self, model: MtpModel, batches: Sequence[Batch], processes: Processes = SINGLE_PROCESS
    ) -> list[PreparedBatch]:
        """Return the micro-batches with the denominators of the update.

        Raises:
            TrainingError: the language model is trained, but has no target. An update without a term of the value loss
                is allowed.
        """
        if self.language_model is not None:
            return self.language_model.prepare(model, batches, processes)
        parts = [{"values": self.value_loss.denominator(batch)} for batch in batches]
        values = total_denominators(parts, processes)
        return [PreparedBatch(batch, values, processes) for batch in batches]

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
