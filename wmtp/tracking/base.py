"""What the trainer tells of its progress, and to whom."""

from typing import Protocol

State = str  # RUNNING, FINISHED, FAILED or KILLED


class Tracker(Protocol):
    """Somebody who listens to a run."""

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Take the metrics of a step. Must return at once: the training waits for it."""

    def close(self, state: State) -> None:
        """The run ended in `state`; deliver what is left."""
