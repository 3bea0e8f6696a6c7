"""The state of a sweep. The file sweep.json contains the overrides, state and result of every job."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Literal

from wmtp.config.moved_targets import current_override
from wmtp.config.paths import started_in
from wmtp.config.values import validate_value
from wmtp.errors import InputError, PendingError
from wmtp.report.grouping import group_runs
from wmtp.report.run_record import RunRecord
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import SWEEP, mark_dead_run, read_status
from wmtp.runtime.untrusted_files import require_inside
from wmtp.tracking.mlflow import require_known_store

State = Literal["PENDING", "RUNNING", "FINISHED", "FAILED", "KILLED"]
TRACEBACK_START = "Traceback (most recent call last)"
MAX_TRACEBACK = 6_000
"""Maximum number of characters of a stored traceback. If a traceback is longer, only its end is stored."""
RESULT_KEYS = ("total_steps", "total_tokens", "final_loss", "best_loss", "best_step", "stop_reason")
"""Keys of summary.json that are copied to a job's result."""
SIGKILL_EXIT_CODE = 137


@dataclass
class Job:
    """One job of a sweep. If the job was run several times, the state and the exit code are those of the last run."""

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
    """Values from the job's summary.json for the keys in `RESULT_KEYS`."""


class SweepState:
    """The jobs of a sweep. They are saved to sweep.json after every change."""

    def __init__(self, folder: Path, jobs: Sequence[Job]) -> None:
        self.folder, self.jobs = folder, list(jobs)
        self.cwd = started_in(folder) or Path.cwd()
        """The working directory in which the sweep was started. Relative paths in its overrides start there."""

    @classmethod
    def read(cls, folder: Path) -> "SweepState":
        """Read the state of an existing sweep.

        Raises:
            InputError: the folder has no readable sweep.json, a file in it leads out of the folder, or its mlflow.json
                names a store that this user has not used before.
        """
        path = folder / SWEEP
        if not path.exists():
            raise InputError(f"sweep.resume={folder}: is not the folder of a sweep: it has no {SWEEP}")
        require_inside(folder)
        require_known_store(folder)
        try:
            jobs: list[Job] = validate_value(list[Job], json.loads(path.read_bytes())["jobs"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: is damaged: {' '.join(str(error).split())}") from error
        for job in jobs:
            job.overrides = [current_override(override) for override in job.overrides]
        return cls(folder, jobs)

    def write(self) -> None:
        """Write the state to sweep.json."""
        content = {"cwd": str(self.cwd), "jobs": [asdict(job) for job in self.jobs]}
        replace_atomically(self.folder / SWEEP, encode_json(content))

    def finished_runs(self) -> list[RunRecord]:
        """Return the runs of the finished jobs."""
        return [RunRecord(self.job_folder(job)) for job in self.jobs if job.state == "FINISHED"]

    def group_labels(self) -> list[str]:
        """Group the finished runs by their settings except the seed, and return the label of each group."""
        return list(group_runs(self.finished_runs()))

    def job_folder(self, job: Job) -> Path:
        """Return the run folder of a job."""
        return self.folder / str(job.number)

    def record_start(self, job: Job) -> None:
        """Record that a job starts."""
        job.state, job.attempts, job.started, job.ended = "RUNNING", job.attempts + 1, now(), None
        job.exit_code = job.error = job.traceback = None
        self.write()

    def record_end(self, job: Job, exit_code: int, stderr_tail: str = "") -> None:
        """Record the end of a job with its exit code, its error and its result.

        The error is read from the job's status.json, and the result from its summary.json. If status.json contains no
        error, the error of a failed job is taken from `stderr_tail`, the last lines of its standard error.
        """
        folder = self.job_folder(job)
        job.exit_code, job.ended, job.state = exit_code, now(), job_state(exit_code)
        if (folder / "status.json").exists():
            mark_dead_run(folder)
            job.error = read_status(folder)["error"]
        if job.state == "FINISHED":
            try:
                summary = json.loads((folder / "summary.json").read_text())
                job.result = {name: summary[name] for name in RESULT_KEYS}
            except (OSError, ValueError, KeyError) as error:
                job.state, job.exit_code = "FAILED", 1
                job.error = f"the job finished, but its summary.json cannot be read: {error!r}"
        if job.state != "FINISHED":
            lines = [line for line in stderr_tail.splitlines() if line.strip() and not line.startswith("WARNING")]
            text = lines[-1] if TRACEBACK_START in stderr_tail else "\n".join(lines)
            job.error = job.error or text or f"ended with exit code {exit_code}"
            job.traceback = find_traceback(folder / "train.log", stderr_tail)
        self.write()

    def record_refusal(self, job: Job, problem: str, exit_code: int = InputError.exit_code) -> None:
        """Record that a job cannot be started because of `problem`."""
        job.state, job.exit_code, job.error, job.attempts = "FAILED", exit_code, problem, job.attempts + 1
        self.write()

    def record_dead_jobs(self) -> None:
        """Record the end of each job that has the state RUNNING because the sweep was killed before the job ended.

        Raises:
            InputError: one of these jobs still runs.
        """
        for job in self.jobs:
            status = self.job_folder(job) / "status.json"
            if job.state == "RUNNING" and status.exists():
                mark_dead_run(status.parent)
                code = read_status(status.parent)["exit_code"]
                self.record_end(job, SIGKILL_EXIT_CODE if code is None else int(code))
            elif job.state == "RUNNING":
                self.record_end(job, SIGKILL_EXIT_CODE)


def job_state(exit_code: int) -> State:
    """Return the state of a job that ended with the given exit code. A job with pending uploads is FINISHED."""
    if exit_code in (0, PendingError.exit_code):
        return "FINISHED"
    return "KILLED" if exit_code >= 128 else "FAILED"


def find_traceback(log: Path, stderr_tail: str) -> str | None:
    """Return the last traceback in a log file, or in `stderr_tail` if the log has none, or None if both have none."""
    for text in (log.read_text(errors="replace") if log.exists() else "", stderr_tail):
        if (start := text.rfind(TRACEBACK_START)) >= 0:
            return text[start:][-MAX_TRACEBACK:]
    return None


def now() -> str:
    """Return the current time in the format of status.json."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
