"""sweep.json: every job of a sweep with its overrides, its state, and what became of it."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from wmtp.errors import InputError, PendingError
from wmtp.report.grouping import grouped
from wmtp.report.run_record import RunRecord
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import SWEEP, close_dead, read_status

State = Literal["PENDING", "RUNNING", "FINISHED", "FAILED", "KILLED"]
TRACEBACK = "Traceback (most recent call last)"
LONGEST = 6_000
"""Characters of a traceback; of a longer one the end is kept."""


@dataclass
class Job:
    """One job: its state is that of its last attempt."""

    number: int
    overrides: list[str]
    state: State = "PENDING"
    exit_code: int | None = None
    error: str | None = None
    traceback: str | None = None
    attempts: int = 0
    started: str | None = None
    ended: str | None = None
    result: dict[str, float | int | str | None] = field(default_factory=dict)
    """From its summary.json: how the training ended, and the best and the last loss."""


RESULTS = ("total_steps", "total_tokens", "final_loss", "best_loss", "best_step", "stop_reason")


class Manifest:
    """A sweep's jobs, kept in its folder."""

    def __init__(self, folder: Path, jobs: Sequence[Job]) -> None:
        self.folder, self.jobs = folder, list(jobs)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """That of a sweep which was begun.

        Raises:
            InputError: there is none.
        """
        path = folder / SWEEP
        if not path.exists():
            raise InputError(f"sweep.resume={folder}: is no sweep's folder: it has no {SWEEP}")
        return cls(folder, [Job(**job) for job in json.loads(path.read_text())["jobs"]])

    def write(self) -> None:
        """Put the present state on the disk."""
        replace_atomically(self.folder / SWEEP, encode_json({"jobs": [asdict(job) for job in self.jobs]}))

    def finished(self) -> list[RunRecord]:
        """The runs of the jobs that ended well."""
        return [RunRecord(self.folder_of(job)) for job in self.jobs if job.state == "FINISHED"]

    def labels(self) -> list[str]:
        """The groups of those, by what sets them apart."""
        return list(grouped(self.finished()))

    def folder_of(self, job: Job) -> Path:
        """Where a job writes."""
        return self.folder / str(job.number)

    def begin(self, job: Job) -> None:
        """A job is started."""
        job.state, job.attempts, job.started, job.ended = "RUNNING", job.attempts + 1, now(), None
        job.exit_code = job.error = job.traceback = None
        self.write()

    def end(self, job: Job, exit_code: int, last_words: str = "") -> None:
        """A job's process ended with this code; what else became of it stands in its folder.

        `last_words` are what it wrote to standard error, for a process that ended before it had a folder.
        """
        folder = self.folder_of(job)
        job.exit_code, job.ended, job.state = exit_code, now(), state_of(exit_code)
        if (folder / "status.json").exists():
            close_dead(folder)
            job.error = read_status(folder)["error"]
        if job.state == "FINISHED":
            try:
                summary = json.loads((folder / "summary.json").read_text())
                job.result = {name: summary[name] for name in RESULTS}
            except (OSError, ValueError, KeyError) as error:
                job.state, job.exit_code = "FAILED", 1
                job.error = f"it ended well, but its summary.json cannot be read: {error!r}"
        if job.state != "FINISHED":
            said = [line for line in last_words.splitlines() if line.strip() and not line.startswith("WARNING")]
            text = said[-1] if TRACEBACK in last_words else "\n".join(said)
            job.error = job.error or text or f"ended with exit code {exit_code}"
            job.traceback = traceback_in(folder / "train.log", last_words)
        self.write()

    def refuse(self, job: Job, problem: str, exit_code: int = InputError.exit_code) -> None:
        """A job cannot be started."""
        job.state, job.exit_code, job.error, job.attempts = "FAILED", exit_code, problem, job.attempts + 1
        self.write()

    def settle(self) -> None:
        """Learn of jobs that were running when the sweep died how they ended.

        Raises:
            InputError: one still runs.
        """
        for job in self.jobs:
            status = self.folder_of(job) / "status.json"
            if job.state == "RUNNING" and status.exists():
                close_dead(status.parent)
                code = read_status(status.parent)["exit_code"]
                self.end(job, 137 if code is None else int(code))
            elif job.state == "RUNNING":
                self.end(job, 137)


def state_of(exit_code: int) -> State:
    """What an exit code says of a job; trained, though not all is delivered, is finished."""
    if exit_code in (0, PendingError.exit_code):
        return "FINISHED"
    return "KILLED" if exit_code >= 128 else "FAILED"


def traceback_in(log: Path, last_words: str) -> str | None:
    """The last traceback of a log file, or else of what a process wrote at its end."""
    for text in (log.read_text(errors="replace") if log.exists() else "", last_words):
        if (start := text.rfind(TRACEBACK)) >= 0:
            return text[start:][-LONGEST:]
    return None


def now() -> str:
    """This moment, as in status.json."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
