"""The interface of trackers, which receive the metrics of a run."""

from typing import Protocol

State = str  # RUNNING, FINISHED, FAILED or KILLED


class Tracker(Protocol):
    """A receiver of a run's metrics."""

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step. Must return at once, since training waits for it."""

    def close(self, state: State) -> None:
        """Record the final state of the run, and send all pending data."""
