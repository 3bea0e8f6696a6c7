"""How much will be trained, and where the run is in it."""

import copy
import math
from dataclasses import dataclass, replace

from wmtp.field_types import Positive, PositiveFloat


@dataclass(frozen=True)
class Position:
    """A point of a run: everything that says which sample comes next. `epoch` counts whole passes done."""

    step: int = 0
    epoch: int = 0
    batch_in_epoch: int = 0
    tokens: int = 0


class Plan:
    """The planned updates of a run and how each is made of micro-batches."""

    def __init__(
        self,
        num_samples: int,
        num_processes: int = 1,
        *,
        num_epochs: PositiveFloat = 3.0,
        max_steps: Positive | None = None,
        batch_size: Positive = 16,
        micro_batch_size: Positive | None = None,
    ) -> None:
        """Plan passes over `num_samples`; `batch_size` samples make an update, `micro_batch_size` a forward.

        Without a `micro_batch_size` every one of `num_processes` makes one forward an update.
        """
        self.batch_size = batch_size
        self.share, self.is_free = math.ceil(batch_size / num_processes), micro_batch_size is None
        self.micro_batch_size = micro_batch_size or self.share
        self.micro_batches_per_update = math.ceil(self.batch_size / self.micro_batch_size)
        self.updates_per_epoch = math.ceil(num_samples / batch_size)
        planned = max(1, math.ceil(num_epochs * self.updates_per_epoch - 1e-9))
        self.num_updates = min(planned, max_steps) if max_steps else planned

    def update_in_epoch(self, position: Position) -> int:
        """Which update of its epoch comes next."""
        return position.batch_in_epoch // self.micro_batches_per_update

    def resumed(self, micro_batch_size: int) -> "Plan":
        """The plan of a run that had micro-batches of this size: it keeps them, unless others were asked for.

        It cannot keep them where they would leave a process without work.
        """
        plan = copy.copy(self)
        if self.is_free and micro_batch_size <= self.share:
            plan.micro_batch_size = micro_batch_size
            plan.micro_batches_per_update = math.ceil(self.batch_size / micro_batch_size)
        return plan

    def converted(self, position: Position, micro_batch_size: int) -> Position:
        """A position between two updates, as it is with micro-batches of this plan instead of another size."""
        updates = position.batch_in_epoch // math.ceil(self.batch_size / micro_batch_size)
        return replace(position, batch_in_epoch=updates * self.micro_batches_per_update)

    def after(self, position: Position, num_tokens: int) -> Position:
        """The position after one more update; the end of an epoch is the start of the next."""
        step, tokens = position.step + 1, position.tokens + num_tokens
        if self.update_in_epoch(position) + 1 == self.updates_per_epoch:
            return Position(step, position.epoch + 1, 0, tokens)
        return Position(step, position.epoch, position.batch_in_epoch + self.micro_batches_per_update, tokens)
