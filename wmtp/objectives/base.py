"""What one batch means: the loss that is trained and what is measured on the way."""

from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from wmtp.data.collate import Batch
from wmtp.distributed.process_group import Processes
from wmtp.models.mtp import MtpModel
from wmtp.ops.metric_sums import Sums


class Objective(Protocol):
    """The meaning of a batch. The trainer's loop is the same for all of them."""

    @property
    def name(self) -> str:
        """What is trained, in a word; a resumed run must agree."""

    def totals(self, model: MtpModel, batch: Batch) -> Float[Tensor, " part"]:
        """What each part of the loss is divided by, summed over an update; known from the labels alone."""

    def check(self, totals: Float[Tensor, " part"]) -> None:
        """Raises `TrainingError` where an update, with these totals over all processes, has nothing to learn from."""

    def loss(self, model: MtpModel, batch: Batch, totals: Float[Tensor, " part"]) -> tuple[Tensor, Sums]:
        """The batch's contribution to the update's loss, with gradient, and its measurements."""

    def evaluate(self, model: MtpModel, batch: Batch) -> Sums:
        """The measurements of a validation batch."""

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Named values of summed measurements; always one named `loss`."""

    def finish_update(self, processes: Processes) -> None:
        """An optimizer update was made of the batches since the last one, in all processes."""

    def forget_update(self) -> None:
        """The batches since the last update made none."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, as plain JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""


def metric_names(num_heads: int, *, values: bool, language_model_loss: bool = False) -> list[str]:
    """The metrics that a run has, any of which can be monitored.

    Those of `num_heads` heads, of a value head if there are `values`, and of a language model beside it.
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
