"""What one batch means: the loss that is trained and what is measured on the way."""

from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from wmtp.data.collate import Batch
from wmtp.metrics import Sums
from wmtp.models.mtp import MtpModel


class Objective(Protocol):
    """The meaning of a batch. The trainer's loop is the same for all of them."""

    @property
    def name(self) -> str:
        """What is trained, in a word; a resumed run must agree."""

    def totals(self, model: MtpModel, batch: Batch) -> Float[Tensor, " part"]:
        """What each part of the loss is divided by, summed over an update; known from the labels alone."""

    def loss(self, model: MtpModel, batch: Batch, totals: Float[Tensor, " part"]) -> tuple[Tensor, Sums]:
        """The batch's contribution to the update's loss, with gradient, and its measurements."""

    def evaluate(self, model: MtpModel, batch: Batch) -> Sums:
        """The measurements of a validation batch."""

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Named values of summed measurements; always one named `loss`."""

    def finish_update(self) -> None:
        """An optimizer update was made of the batches since the last one."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run must know, as plain JSON."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
