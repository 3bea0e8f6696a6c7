"""What one batch means: the loss that is trained and what is measured on the way."""

from typing import Protocol

from torch import Tensor

from wmtp.data.collate import Batch
from wmtp.metrics import Sums
from wmtp.models.mtp import MtpModel


class Objective(Protocol):
    """The meaning of a batch. The trainer's loop is the same for all of them."""

    def denominator(self, model: MtpModel, batch: Batch) -> Tensor:
        """What the loss sums of an update are divided by, once; known from the labels alone."""

    def loss(self, model: MtpModel, batch: Batch) -> tuple[Tensor, Sums]:
        """The batch's loss sum, with gradient, and its measurements."""

    def evaluate(self, model: MtpModel, batch: Batch) -> Sums:
        """The measurements of a validation batch."""

    def metrics(self, sums: Sums) -> dict[str, float]:
        """Named values of summed measurements; always one named `loss`."""
