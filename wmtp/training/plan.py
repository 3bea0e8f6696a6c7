"""The planned updates of a run, and the position of a run in its plan."""

import copy
import math
from dataclasses import dataclass, replace

from wmtp.field_types import Positive, PositiveFloat
from wmtp.ops.shares import share_of


@dataclass(frozen=True)
class Position:
    """A position in a training run, between two updates. It determines the samples of the next update.

    `step` is the number of completed updates, and `epoch` is the number of complete passes over the data.
    `batch_in_epoch` is the number of micro-batches completed in the current pass. `tokens` is the number of all tokens
    trained on so far.
    """

    step: int = 0
    epoch: int = 0
    batch_in_epoch: int = 0
    tokens: int = 0


class Plan:
    """The number of updates of a run, and the division of each update into micro-batches."""

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
        """Plan `num_epochs` passes over `num_samples` samples, but at most `max_steps` updates.

        Each update uses `batch_size` samples, and each forward pass uses `micro_batch_size` samples. If
        `micro_batch_size` is None, each of `num_processes` processes makes one forward pass per update.
        """
        self.batch_size = batch_size
        self.max_micro_batch_size = math.ceil(batch_size / num_processes)
        self.is_default_size = micro_batch_size is None
        self.micro_batch_size = micro_batch_size or self.max_micro_batch_size
        self.micro_batches_per_update = math.ceil(self.batch_size / self.micro_batch_size)
        self.updates_per_epoch = math.ceil(num_samples / batch_size)
        self.max_steps = max_steps
        self.updates_by_epochs = max(1, share_of(self.updates_per_epoch, num_epochs))
        self.num_updates = min(self.updates_by_epochs, max_steps) if max_steps else self.updates_by_epochs

    def longer_run_overrides(self, step: int, stopped_early: bool) -> str:
        """Return overrides with which a run that has ended after `step` updates is resumed and makes more updates."""
        overrides = ["early_stopping=none"] if stopped_early else []
        if self.max_steps is not None and step >= self.max_steps:
            overrides.append(f"max_steps={2 * step}")
        if step >= self.updates_by_epochs:
            overrides.append(f"num_epochs={2 * step / self.updates_per_epoch:g}")
        return " ".join(overrides)

    def update_in_epoch(self, position: Position) -> int:
        """Return the number of updates between the start of the epoch and the given position."""
        return position.batch_in_epoch // self.micro_batches_per_update

    def for_resume(self, micro_batch_size: int) -> "Plan":
        """Return the plan for resuming a run that used the given micro-batch size.

        The returned plan keeps the given size, unless the config sets `micro_batch_size` or the given size would leave
        a process without samples.
        """
        plan = copy.copy(self)
        if self.is_default_size and micro_batch_size <= self.max_micro_batch_size:
            plan.micro_batch_size = micro_batch_size
            plan.micro_batches_per_update = math.ceil(self.batch_size / micro_batch_size)
        return plan

    def convert_position(self, position: Position, micro_batch_size: int) -> Position:
        """Convert the `batch_in_epoch` of a position to micro-batches of this plan, and return the new position.

        In the given position, `batch_in_epoch` counts micro-batches of `micro_batch_size` samples.
        """
        updates = position.batch_in_epoch // math.ceil(self.batch_size / micro_batch_size)
        return replace(position, batch_in_epoch=updates * self.micro_batches_per_update)

    def next_position(self, position: Position, num_tokens: int) -> Position:
        """Return the position after one more update, which trains on `num_tokens` tokens.

        The position at the end of an epoch is the start of the next epoch.
        """
        step, tokens = position.step + 1, position.tokens + num_tokens
        if self.update_in_epoch(position) + 1 == self.updates_per_epoch:
            return Position(step, position.epoch + 1, 0, tokens)
        return Position(step, position.epoch, position.batch_in_epoch + self.micro_batches_per_update, tokens)
