"""The interface of objectives. An objective computes the loss and the metrics of a batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.data.collate import Batch
from wmtp.distributed.process_group import Processes
from wmtp.models.mtp import MtpModel
from wmtp.ops.metric_sums import MetricSums


@dataclass(frozen=True)
class PreparedBatch:
    """A micro-batch, with the quantities of the whole update on which its loss depends.

    `denominators` contains the denominator of each term of the loss, summed over all micro-batches and ranks of the
    update.
    """

    batch: Batch
    denominators: Mapping[str, Tensor]
    processes: Processes
    """The process group of the update."""
    weights: Float[Tensor, "head batch position"] | None = None
    """The weights of the targets. If they are None, the micro-batch is the only one that this rank has in the update,
    and its weights are computed together with its loss."""


def total_denominators(parts: Sequence[Mapping[str, Tensor]], processes: Processes) -> dict[str, Tensor]:
    """Return the sum of the denominators of all micro-batches and ranks. All ranks must call this function.

    `parts` contains the denominators of each micro-batch of this rank, by the name of the term.
    """
    table = torch.stack([torch.stack([part[name].float() for name in parts[0]]) for part in parts])
    return dict(zip(parts[0], processes.sum(table.sum(dim=0)), strict=True))


class Objective(Protocol):
    """A definition of the loss and the metrics of a batch. All objectives have the same training loop."""

    @property
    def name(self) -> str:
        """A short name of the loss. A run can be resumed only if the name has not changed."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Further settings that must not change when a run is resumed, as JSON values."""

    def prepare(self, model: MtpModel, batches: Sequence[Batch], processes: Processes) -> list[PreparedBatch]:
        """Return the micro-batches of this rank with the quantities of the whole update on which their losses depend.

        Nothing in the result has a gradient. All ranks must call this method.

        Raises:
            TrainingError: the update has no target.
        """

    def loss(self, model: MtpModel, prepared: PreparedBatch) -> tuple[Tensor, MetricSums]:
        """Return the contribution of a micro-batch to the loss of the update, and the metric sums of the micro-batch.

        The loss of the update is the sum of these contributions over all micro-batches and ranks. Only the contribution
        has a gradient. All ranks must call this method.
        """

    def evaluate(self, model: MtpModel, batch: Batch) -> MetricSums:
        """Return the metric sums of a validation batch."""

    def metrics(self, sums: MetricSums) -> dict[str, float]:
        """Return the metrics by name, computed from sums over batches and ranks. `loss` is always one of them."""

    def finish_update(self) -> None:
        """Update the state after an optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that is needed to resume a run, as tensors and JSON values. All ranks must call this method.

        The tensors must be the same on all ranks.
        """

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


def metric_names(num_heads: int, *, values: bool, language_model_loss: bool = False) -> list[str]:
    """Return the names of the metrics that a training stage measures on its batches.

    Metrics that depend on the labels of the data are included: `val/canonical_logprob` and
    `val/canonical_probability` are measured only if the validation data have correct solutions.

    Args:
        num_heads: the number of prediction heads, or 0 if no prediction head is trained.
        values: whether the model has a value head.
        language_model_loss: whether the value head is trained together with the language model.
    """
    measured, training_only, validation_only = ["loss"], ["grad_norm", "lr"], list[str]()
    if num_heads:
        measured += ["mtp_loss", *(f"head_{k}_loss" for k in range(1, num_heads + 1))]
        validation_only += ["canonical_logprob", "canonical_probability"]
        training_only += ["weight_mean", "weight_min", "weight_max", "weight_std", "valid_target_ratio"]
    if values:
        measured += ["value_loss", "value_mean", "value_variance", "value_explained_variance"]
    if language_model_loss:
        measured.append("language_model_loss")
    by_split = {"val": measured + validation_only, "train": measured + training_only}
    return [f"{split}/{name}" for split, names in by_split.items() for name in names]
