"""Interface of trackers, which record the metrics of a run."""

from typing import Protocol

State = str
"""State of a run: RUNNING, FINISHED, FAILED or KILLED."""


class Tracker(Protocol):
    """Interface of an object that records the metrics and the final state of one run."""

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Record the metrics of a step. This method must not block, because training waits for it."""

    def close(self, state: State) -> None:
        """Record the final state of the run, and send all pending data.

        Raises:
            PendingError: some data could not be sent.
        """
