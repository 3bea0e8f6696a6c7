"""What is wished of a sweep."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from wmtp.annotations import Positive


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The keys of `sweep` in train.yaml."""

    jobs: Positive = 1
    """How many run at once on this machine, and share its cores."""
    metric: str = "val/loss"
    """What the table at the end is sorted by."""
    at: Literal["best", "last"] = "best"
    """Of which model: the checkpoint with the least val/loss, or the last one."""
    arms: list[str] = field(default_factory=list)
    """Sets of overrides, each in one line, that are combined with the grid one after the other."""
    resume: Path | None = None
    """The folder of a sweep whose unfinished jobs are to be tried again."""
