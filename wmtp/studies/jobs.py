"""Execution of the jobs of a study. Each job runs once: a finished or failed job is skipped, others are resumed."""

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from wmtp.checkpoint.manifest import NAME as MANIFEST
from wmtp.config.overrides import quote
from wmtp.errors import InputError, ProcessFailed
from wmtp.report.tables import format_count
from wmtp.runtime.console import Console
from wmtp.runtime.processes import module_arguments
from wmtp.runtime.run_dir import SAVED_OVERRIDES, mark_dead_run, read_status
from wmtp.studies.plan import StudyJob, has_failed
from wmtp.sweep.local_launcher import run_local
from wmtp.tracking.console import format_time

JobState = Literal["FINISHED", "FAILED", "OPEN"]
CONSOLES = "consoles"
"""Name of the folder of a study that contains the output of each job."""
SIGNALS_FROM = 128
"""Smallest exit code of a job that a signal ended."""


def job_state(job: StudyJob) -> JobState:
    """Return whether a job has finished, has failed, or still has to run.

    A run that was interrupted or killed still has to run. A failed run does not: with the same settings, it would fail
    again.

    Raises:
        InputError: another command runs the job at the moment.
    """
    if job.command == "export":
        return "FINISHED" if (job.folder / "config.json").exists() else "OPEN"
    if not (job.folder / "status.json").exists():
        return "OPEN"
    state = mark_dead_run(job.folder)
    if state == "FINISHED" and (job.folder / "summary.json").exists():
        return "FINISHED"
    return "FAILED" if has_failed(read_status(job.folder)) else "OPEN"


class JobRunner:
    """Runs jobs of a study as commands, several at a time."""

    def __init__(self, folder: Path, parallel: int, console: Console) -> None:
        self._folder, self._parallel, self._console = folder, parallel, console
        self.num_started = 0
        """Number of jobs that were started, including those that were resumed."""

    def run(self, jobs: Iterable[StudyJob], title: str) -> None:
        """Run the jobs that have not finished or failed, and wait for their end.

        Raises:
            InputError: a job was refused because of its config or its input. All other jobs have run.
            ProcessFailed: a job was killed, so that its result is not known. All other jobs have run.
            InterruptedRun: a signal was received, and all running jobs have ended.
        """
        every = list(jobs)
        still_open = [job for job in every if job_state(job) == "OPEN"]
        if not still_open:
            return
        done = f", {len(every) - len(still_open)} done before" if len(still_open) < len(every) else ""
        self._print(f"{title}: {format_count(len(still_open), 'run')}{done}")
        codes, refusals, started = dict[int, int](), list[str](), time.monotonic()

        def _on_end(number: int, exit_code: int, stderr_tail: str) -> None:
            """Record and print the end of a job."""
            codes[number] = exit_code
            name = still_open[number].folder.relative_to(self._folder)
            elapsed = time.monotonic() - started
            left = elapsed / len(codes) * (len(still_open) - len(codes))
            times = f"elapsed {format_time(elapsed)}, left {format_time(left)}"
            self._print(f"  {len(codes)}/{len(still_open)} {name}: {_describe(exit_code)}  {times}")
            if exit_code == InputError.exit_code:
                refusals.append(f"{name}: the run was refused:\n{stderr_tail.strip()}")

        commands = {number: self._command(job) for number, job in enumerate(still_open)}
        consoles = {number: self.console_file(job) for number, job in enumerate(still_open)}
        run_local(commands, consoles, self._parallel, self._on_start(still_open), _on_end)
        if refusals:
            raise InputError(refusals[0])
        # without its result, the study would choose other settings now than after the job has been repeated
        if killed := [number for number, job in enumerate(still_open) if job_state(job) == "OPEN"]:
            first, number = still_open[killed[0]].folder, format_count(len(killed), "run")
            raise ProcessFailed(
                f"{number} ended without a result, for example {first} with exit code {codes[killed[0]]}; "
                f"see {consoles[killed[0]]}, and repeat the command"
            )

    def _on_start(self, jobs: list[StudyJob]) -> Callable[[int], None]:
        """Return a callback for the start of a job. It keeps the folder of an attempt that saved no checkpoint."""

        def _start(number: int) -> None:
            """Count the job, and rename the folder of its earlier attempt."""
            self.num_started += 1
            job = jobs[number]
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            if job.folder.exists() and not _can_resume(job):
                attempts = len(list(job.folder.parent.glob(f"{job.folder.name}.attempt-*")))
                job.folder.rename(job.folder.with_name(f"{job.folder.name}.attempt-{attempts + 1}"))

        return _start

    def _command(self, job: StudyJob) -> list[str]:
        arguments = [f"resume={quote(job.folder)}"] if _can_resume(job) else job.arguments
        return [sys.executable, *module_arguments(f"wmtp.{job.command}"), *arguments]

    def console_file(self, job: StudyJob) -> Path:
        """Return the file with the output of a job."""
        name = "_".join(job.folder.relative_to(self._folder).parts)
        return self._folder / CONSOLES / f"{name}.log"

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


def _can_resume(job: StudyJob) -> bool:
    has_checkpoint = any(job.folder.glob(f"**/step_*/{MANIFEST}"))
    return job.command == "train" and has_checkpoint and (job.folder / SAVED_OVERRIDES).exists()


def _describe(exit_code: int) -> str:
    if exit_code >= SIGNALS_FROM:
        return "interrupted"
    return {0: "finished", 3: "finished, with uploads pending"}.get(exit_code, f"failed with exit code {exit_code}")
