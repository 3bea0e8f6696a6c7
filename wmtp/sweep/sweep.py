"""Execution of a sweep, from its arguments to its exit code."""

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp.checkpoint.manifest import NAME
from wmtp.config.overrides import quote, shell_argument
from wmtp.config.schema import ConfigError, ConfigIssue
from wmtp.errors import InputError, InterruptedRun, PendingError, worst_exit_code
from wmtp.report.comparability import require_same_data
from wmtp.report.metrics import is_lower_better
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.console import Console
from wmtp.runtime.processes import JOB_OPTION, module_arguments
from wmtp.runtime.run_dir import (
    OUTPUTS,
    SAVED_OVERRIDES,
    SWEEP,
    JobProgress,
    RunStatus,
    create_run_folder,
    display_path,
    module_command,
)
from wmtp.runtime.sweep_jobs import job_labels
from wmtp.runtime.writable import require_writable
from wmtp.sweep import slurm_launcher
from wmtp.sweep.grid import parse_grid
from wmtp.sweep.local_launcher import run_local
from wmtp.sweep.progress import SweepProgress
from wmtp.sweep.results import print_results
from wmtp.sweep.state import Job, SweepState


@dataclass(frozen=True)
class PreparedJob:
    """A composed and checked job."""

    issues: list[ConfigIssue]
    values: dict[str, Any]
    """Plain JSON values with which another process runs the job. They are empty if it could not be composed."""


Prepare = Callable[[list[str]], PreparedJob]
"""Callback that receives the overrides of one job, and composes and checks the job."""
EndCallback = Callable[[Path, str], None]
"""Callback that receives the folder and the final state of a sweep."""


class Sweep:
    """All jobs of one sweep. Each unfinished job runs as a separate command."""

    def __init__(self, command: str, arguments: Sequence[str], prepare: Prepare) -> None:
        """Determine the jobs of the sweep from the arguments, and compose and check each unfinished job.

        Args:
            command: name of the command that each job runs, such as "train".
            arguments: command-line arguments of the sweep.
            prepare: function that composes and checks one job.

        Raises:
            ConfigError: the arguments or the folder of the sweep are not valid, or every job of a new sweep has issues.
            InputError: the sweep to resume does not exist, or it is unknown whether higher or lower values of
                `sweep.metric` are better.
        """
        self.command, self.console = command, Console()
        self.grid = parse_grid(command, arguments)
        is_lower_better(self.grid.options.metric)
        self.is_submitted = slurm_launcher.is_submitted(self.grid.launcher)
        resumed = self.grid.options.resume
        jobs = (
            self._read_jobs(resumed) if resumed else [Job(number, each) for number, each in enumerate(self.grid.jobs)]
        )
        self.labels = job_labels([job.overrides for job in jobs])
        self.prepare = prepare
        self.prepared = {job.number: prepare(self._arguments(job, resumed)) for job in jobs if job.state != "FINISHED"}
        self.issues = {number: self._find_issues(each) for number, each in self.prepared.items()}
        if not resumed and not self.grid.is_dry_run and all(self.issues.values()):
            raise ConfigError(issue for each in self.issues.values() for issue in each)
        self.state = SweepState(resumed or self._create_folder(), jobs)

    @property
    def folder(self) -> Path:
        """The folder of the sweep."""
        return self.state.folder

    def run(self, on_end: EndCallback) -> int:
        """Run the unfinished jobs, print the results, and return the exit code of the sweep.

        The exit code of the sweep is the most severe exit code of its jobs. If the sweep is interrupted, it is the exit
        code of the interruption.

        Args:
            on_end: called with the sweep's folder and its final state. A `PendingError` that it raises changes only the
                exit code.

        Raises:
            InputError: the sweep or one of its jobs still runs.
        """
        status = RunStatus(self.folder)
        try:
            self.state.record_dead_jobs()
        except InputError:
            status.withdraw()
            raise
        state, code = "FAILED", 1
        try:
            self._print(f"The folder of the sweep is {display_path(self.folder)}: {len(self.state.jobs)} jobs")
            interruption = self._run_unfinished_jobs()
            code = worst_exit_code(1 if job.exit_code is None else job.exit_code for job in self.state.jobs)
            code = code if interruption is None else interruption.exit_code
            all_finished = all(job.state == "FINISHED" for job in self.state.jobs)
            state = "FINISHED" if all_finished else "KILLED" if code >= 128 else "FAILED"
            try:
                on_end(self.folder, state)
            except PendingError as error:
                print(error, file=sys.stderr)
                code = worst_exit_code([code, error.exit_code])
        finally:
            status.end(state, code, JobProgress())
        print_results(self.console, self.state, self.grid.options)
        folder = display_path(self.folder)
        self._print(f"The folder of the sweep is {folder}")
        if not all_finished:
            again = module_command(f"wmtp.{self.command}"), "-m", shell_argument("sweep.resume", folder)
            self._print(f"To run the unfinished jobs again: {' '.join(again)}")
        elif len(labels := self.state.group_labels()) > 1:
            baseline = "baseline" if "baseline" in labels else labels[0]
            try:
                require_same_data(self.state.finished_runs())
                self._print(f"Next: {module_command('wmtp.compare')} {shlex.join([folder, f'baseline={baseline}'])}")
            except InputError as error:
                self._print(str(error))
        return code

    def _run_unfinished_jobs(self) -> InterruptedRun | None:
        """Run the unfinished jobs and wait for their end. Return the interruption if there was one, otherwise None."""
        try:
            self.state.write()
            commands = {job.number: self._job_command(job) for job in self._jobs_to_run()}
            total, is_live = len(self.state.jobs), self.is_submitted or self.grid.options.jobs > 1
            with SweepProgress(self.console, total, total - len(commands), is_live=is_live) as self.progress:
                self._run_commands(commands)
        except InterruptedRun as error:
            return error
        return None

    def dry_run(self) -> int:
        """Print all jobs and their issues, do a dry run of the first valid job, and return the exit code.

        If the jobs of this sweep would be submitted to a cluster, print the batch script instead of the dry run.
        """
        for job, label in zip(self.state.jobs, self.labels, strict=True):
            self._print(f"job {job.number}: {label or ' '.join(job.overrides)}")
            for issue in self.issues[job.number]:
                self._print(f"  {issue}")
        valid = [job for job in self.state.jobs if not self.issues[job.number]]
        if not valid:
            return InputError.exit_code
        if self.is_submitted:
            command = self._command(self._job_file(valid[0]))
            self._print("\nThe job array that would be submitted, with the command of the first job:\n")
            self._print(slurm_launcher.batch_script(self.grid.launcher, command, len(self.state.jobs)))
            return 0 if len(valid) == len(self.state.jobs) else InputError.exit_code
        self._print(f"{self.grid.options.jobs} at the same time on this machine. The first job:\n")
        codes: list[int] = []
        with tempfile.TemporaryDirectory(prefix="wmtp-") as name:
            file = Path(name) / "job.json"
            file.write_text(json.dumps(self.prepare([*valid[0].overrides, "dry_run=true"]).values))
            run_local(
                {0: self._command(file)}, {}, 1, lambda number: None,
                lambda number, code, stderr_tail: codes.append(code),
            )  # fmt: skip
        return max([*codes, InputError.exit_code if len(valid) < len(self.state.jobs) else 0])

    def _find_issues(self, prepared: PreparedJob) -> list[ConfigIssue]:
        """Return the issues of a job. If jobs are submitted, issues about the hardware of this machine are omitted."""
        return [issue for issue in prepared.issues if not (self.is_submitted and issue.key.startswith("hardware."))]

    def _create_folder(self) -> Path:
        """Create the folder of a new sweep and return its path. In a dry run, return a path without creating a folder.

        Raises:
            ConfigError: the folder that the user named contains a sweep.
            InputError: no files can be written to the folder.
        """
        named = self.grid.folder
        require_writable(named or OUTPUTS, "hydra.sweep.dir")
        if self.grid.is_dry_run:
            return named or Path("outputs/<date>/<sweep>")
        if named is not None and (named / SWEEP).exists():
            argument = shell_argument("sweep.resume", named)
            problem = f"already contains a sweep; resume it with {argument}, or use another folder"
            raise ConfigError([ConfigIssue("hydra.sweep.dir", str(named), problem)])
        folder = named or create_run_folder(suffix="-sweep")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _read_jobs(self, folder: Path) -> list[Job]:
        """Read the jobs of the sweep in `folder`, which will be resumed.

        Raises:
            ConfigError: the arguments describe other jobs than those of the sweep in the folder.
        """
        jobs = SweepState.read(folder).jobs
        before, now = [job.overrides for job in jobs], self.grid.jobs
        if self.grid.has_job_overrides and before != now:
            differing = next((pair for pair in zip(before, now, strict=False) if pair[0] != pair[1]), None)
            difference = f"{len(before)} jobs in the folder, {len(now)} in the command"
            if differing is not None:
                difference = f"in the folder {' '.join(differing[0])}, in the command {' '.join(differing[1])}"
            problem = f"is a sweep of other jobs ({difference}); repeat its command, or give only sweep.resume"
            raise ConfigError([ConfigIssue("sweep.resume", str(folder), problem)])
        return jobs

    def _jobs_to_run(self) -> list[Job]:
        """Return the unfinished jobs that have no issues. Record the unfinished jobs that have issues as failed."""
        to_run = []
        for job in self.state.jobs:
            if job.state == "FINISHED":
                continue
            if issues := self.issues[job.number]:
                self.state.record_refusal(job, "; ".join(map(str, issues)))
                self._print(f"job {job.number} ({self.labels[job.number]}): {job.error}")
            else:
                to_run.append(job)
        if self.grid.options.resume is not None:
            skipped = len(self.state.jobs) - len(to_run)
            self._print(f"{skipped} jobs are finished or cannot run; {len(to_run)} jobs run again")
        return to_run

    def _run_commands(self, commands: dict[int, list[str]]) -> None:
        if self.is_submitted:
            slurm_launcher.submit(commands, self.grid.launcher, self.folder, self._on_job_start, self._on_job_end)
            return
        num_parallel = self.grid.options.jobs
        consoles = {
            number: self.folder / str(number) / "console.log" for number in (commands if num_parallel > 1 else ())
        }
        run_local(commands, consoles, num_parallel, self._on_job_start, self._on_job_end)

    def _job_command(self, job: Job) -> list[str]:
        """Write the file of a job, and return the command line that runs the job."""
        file, folder, values = self._job_file(job), self.state.job_folder(job), self.prepared[job.number].values
        if not self._has_checkpoint(folder):  # a resumed job keeps its folder
            values = values | {"overrides": [*values["overrides"], f"hydra.run.dir={quote(folder)}"]}
        file.parent.mkdir(exist_ok=True)
        replace_atomically(file, encode_json(values))
        return self._command(file)

    def _job_file(self, job: Job) -> Path:
        return self.folder / "jobs" / f"{job.number}.json"

    def _command(self, file: Path) -> list[str]:
        return [sys.executable, *module_arguments(f"wmtp.{self.command}"), JOB_OPTION, str(file)]

    def _arguments(self, job: Job, folder: Path | None) -> list[str]:
        """Return the overrides of a job of a sweep in `folder`. A job that has a checkpoint resumes from it."""
        if folder is None or not self._has_checkpoint(folder / str(job.number)):
            return job.overrides
        return [f"resume={quote(folder / str(job.number))}"]

    def _has_checkpoint(self, folder: Path) -> bool:
        return (folder / SAVED_OVERRIDES).exists() and any(folder.glob(f"**/step_*/{NAME}"))

    def _on_job_start(self, number: int) -> None:
        job = self.state.jobs[number]
        folder = self.state.job_folder(job)
        if not self._has_checkpoint(folder) and (folder / "status.json").exists():  # keep the logs of the attempt
            folder.rename(folder.with_name(f"{folder.name}.attempt-{job.attempts}"))
        self.state.record_start(job)
        self._print(f"job {number} of {len(self.state.jobs)} starts: {self.labels[number]}")

    def _on_job_end(self, number: int, exit_code: int, stderr_tail: str) -> None:
        job = self.state.jobs[number]
        self.state.record_end(job, exit_code, stderr_tail)
        loss = job.result.get("final_loss")
        details = "" if loss is None else f", val/loss {loss:.4f}"
        details = details if job.error is None else f": {job.error.splitlines()[0]}"
        self._print(f"job {number} of {len(self.state.jobs)} {job.state}{details}")
        self.progress.advance()

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)


def run_sweep(command: str, arguments: Sequence[str], prepare: Prepare, on_end: EndCallback) -> int:
    """Run the sweep that the arguments describe, or only its dry run, and return the exit code."""
    sweep = Sweep(command, arguments, prepare)
    return sweep.dry_run() if sweep.grid.is_dry_run else sweep.run(on_end)
