"""The interface of objectives: the loss of a batch and its metrics."""

from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from wmtp.data.collate import Batch
from wmtp.distributed.process_group import Processes
from wmtp.models.mtp import MtpModel
from wmtp.ops.metric_sums import Sums


class Objective(Protocol):
    """The loss and the metrics of a batch. The trainer's loop is the same for every objective."""

    @property
    def name(self) -> str:
        """A short name of the training target; it must be the same when a run is resumed."""

    def denominators(self, model: MtpModel, batch: Batch) -> Float[Tensor, " part"]:
        """Return the denominator of each part of the loss.

        The trainer sums them over all micro-batches and ranks of an update. They depend on the labels only, so
        they are known before any forward pass.
        """

    def check_denominators(self, denominators: Float[Tensor, " part"]) -> None:
        """Check that an update has at least one target.

        Args:
            denominators: summed over all micro-batches and ranks of the update.

        Raises:
            TrainingError: the update has no target.
        """

    def loss(self, model: MtpModel, batch: Batch, denominators: Float[Tensor, " part"]) -> tuple[Tensor, Sums]:
        """Return the batch's part of the update's loss, with gradient, and its metric sums."""

    def evaluate(self, model: MtpModel, batch: Batch) -> Sums:
        """Return the metric sums of a validation batch."""

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Return the metrics of summed batches by name; `loss` is always among them."""

    def finish_update(self, processes: Processes) -> None:
        """Update the state after an optimizer update; all ranks call it together."""

    def discard_update(self) -> None:
        """Discard the statistics of the batches since the last update, because their update was skipped."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as plain JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


def metric_names(num_heads: int, *, values: bool, language_model_loss: bool = False) -> list[str]:
    """Return the names of all metrics of a run; early stopping can monitor any of them.

    Args:
        num_heads: number of prediction heads; 0 if none is trained.
        values: the model has a value head.
        language_model_loss: the value head trains together with the language model.
    """
    measured, training = ["loss"], ["grad_norm", "lr"]
    if num_heads:
        measured += ["mtp_loss", *(f"head_{k}_loss" for k in range(1, num_heads + 1))]
        training += ["weight_mean", "weight_min", "weight_max", "weight_std", "valid_target_ratio"]
    if values:
        measured += ["value_loss", "value_mean", "value_variance", "value_explained_variance"]
    if language_model_loss:
        measured.append("language_model_loss")
    return [f"val/{name}" for name in measured] + [f"train/{name}" for name in measured + training]
