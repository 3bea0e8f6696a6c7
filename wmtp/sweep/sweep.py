"""A sweep from what was typed to its exit code."""

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from wmtp.checkpoint.manifest import NAME
from wmtp.config.overrides import quoted
from wmtp.config.schema import ConfigError, Fault
from wmtp.errors import InputError, InterruptedRun, PendingError, worst
from wmtp.report.grouping import grouped
from wmtp.report.metrics import WHERE, is_lower_better
from wmtp.report.run_record import RunRecord
from wmtp.runtime.processes import module_arguments
from wmtp.runtime.run_dir import ACCEPTED, SWEEP, Ending, RunStatus, create_run_folder, typed
from wmtp.sweep import slurm_launcher
from wmtp.sweep.grid import SweepOptions, grid_of, swept
from wmtp.sweep.local_launcher import run_here
from wmtp.sweep.state import Job, Manifest

Check = Callable[[list[str]], list[Fault]]


class Sweep:
    """All jobs of one sweep: those that did not finish yet are run, each as a command of its own."""

    def __init__(self, command: str, arguments: Sequence[str], check: Check) -> None:
        """`check` finds the faults of one job's overrides.

        Raises:
            ConfigError: the arguments describe no sweep, or none of its jobs can be done.
            InputError: the sweep to be resumed is not there or still runs, or it is not known which way its metric is
                better.
        """
        self.command, self.console = command, Console()
        self.grid = grid_of(command, arguments)
        is_lower_better(self.grid.options.metric)
        self.is_submitted = slurm_launcher.is_submitted(self.grid.launcher)
        resumed = self.grid.options.resume
        jobs = self._begun(resumed) if resumed else [Job(number, each) for number, each in enumerate(self.grid.jobs)]
        self.names = swept([job.overrides for job in jobs])
        self.faults = {job.number: self._faults(job, check) for job in jobs if job.state != "FINISHED"}
        if not resumed and not self.grid.is_rehearsal and all(self.faults.values()):
            raise ConfigError(fault for each in self.faults.values() for fault in each)
        self.manifest = Manifest(resumed or self._folder(), jobs)

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.manifest.folder

    def run(self, told: Callable[[Path, str], None]) -> int:
        """Do what is left to be done, and print what came of all; the exit code, which is that of the worst job.

        `told` passes on the folder and the state at the end.

        Raises:
            InputError: the sweep, or a job of it, still runs.
        """
        status = RunStatus(self.folder)
        try:
            self.manifest.settle()
        except InputError:
            status.withdraw()
            raise
        state, code = "FAILED", 1
        try:
            self._say(f"The sweep lies in {typed(self.folder)}: {len(self.manifest.jobs)} jobs")
            interruption = self._do_all()
            code = worst(1 if job.exit_code is None else job.exit_code for job in self.manifest.jobs)
            code = code if interruption is None else interruption.exit_code
            is_well = all(job.state == "FINISHED" for job in self.manifest.jobs)
            state = "FINISHED" if is_well else "KILLED" if code >= 128 else "FAILED"
            try:
                told(self.folder, state)
            except PendingError as error:
                print(error, file=sys.stderr)
                code = worst([code, error.exit_code])
        finally:
            status.end(state, code, Ending())
        print_results(self.console, self.manifest, self.grid.options)
        self._say(f"The sweep lies in {typed(self.folder)}")
        folder = shlex.quote(typed(self.folder))
        if not is_well:
            self._say(f"Try again what did not finish: the same command with sweep.resume={folder}")
        elif len(labels := self.manifest.labels()) > 1:
            baseline = "baseline" if "baseline" in labels else labels[0]
            self._say(f"Next: python -m wmtp.compare {folder} {shlex.quote(f'baseline={baseline}')}")
        return code

    def _do_all(self) -> InterruptedRun | None:
        """Do what is left to be done; what interrupted it, after all that ran has ended."""
        try:
            self.manifest.write()
            self._do({job.number: self._command_of(job) for job in self._left()})
        except InterruptedRun as error:
            return error
        return None

    def rehearse(self) -> int:
        """Print every job and how it would be started, and try the first sound one, if here; the exit code."""
        for job, name in zip(self.manifest.jobs, self.names, strict=True):
            self._say(f"job {job.number}: {name or ' '.join(job.overrides)}")
            for fault in self.faults[job.number]:
                self._say(f"  {fault}")
        sound = [job for job in self.manifest.jobs if not self.faults[job.number]]
        if not sound:
            return InputError.exit_code
        command = self._anew(sound[0])
        if self.is_submitted:
            self._say("\nThe job array that would be submitted, with its first command:\n")
            self._say(slurm_launcher.described(self.grid.launcher, self.folder, command, len(self.manifest.jobs)))
            return 0 if len(sound) == len(self.manifest.jobs) else InputError.exit_code
        self._say(f"{self.grid.options.jobs} at once on this machine. The first one:\n")
        codes: list[int] = []
        run_here(
            {0: [*command[:-1], "dry_run=true"]}, {0: Path()}, 1, lambda number: None,
            lambda number, code, words: codes.append(code),
        )  # fmt: skip
        return max([*codes, InputError.exit_code if len(sound) < len(self.manifest.jobs) else 0])

    def _faults(self, job: Job, check: Check) -> list[Fault]:
        """What is wrong with a job; what this machine lacks is no fault of one that is submitted to others."""
        elsewhere = self.is_submitted
        return [fault for fault in check(job.overrides) if not (elsewhere and fault.key.startswith("hardware."))]

    def _folder(self) -> Path:
        """A folder for a sweep that begins; a rehearsal's is only named.

        Raises:
            ConfigError: there is a sweep already in the one that the user named.
        """
        named = self.grid.folder
        if self.grid.is_rehearsal:
            return named or Path("outputs/<date>/<sweep>")
        if named is not None and (named / SWEEP).exists():
            problem = f"holds a sweep already; go on with it (sweep.resume={named}) or name another folder"
            raise ConfigError([Fault("hydra.sweep.dir", str(named), problem)])
        folder = named or create_run_folder(suffix="-sweep")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _begun(self, folder: Path) -> list[Job]:
        """The jobs of the sweep to be resumed.

        Raises:
            ConfigError: what was typed describes other jobs.
        """
        jobs = Manifest.read(folder).jobs
        before, now = [job.overrides for job in jobs], self.grid.jobs
        if self.grid.names_jobs and before != now:
            differing = next((pair for pair in zip(before, now, strict=False) if pair[0] != pair[1]), None)
            what = f"{len(before)} jobs there, {len(now)} here"
            if differing is not None:
                what = f"there {' '.join(differing[0])}, here {' '.join(differing[1])}"
            problem = f"is a sweep of other jobs ({what}); repeat its command, or give sweep.resume alone"
            raise ConfigError([Fault("sweep.resume", str(folder), problem)])
        return jobs

    def _left(self) -> list[Job]:
        """The jobs that are to be run; those that cannot be are recorded as failed."""
        left = []
        for job in self.manifest.jobs:
            if job.state == "FINISHED":
                continue
            if faults := self.faults[job.number]:
                self.manifest.refuse(job, "; ".join(map(str, faults)))
                self._say(f"job {job.number} ({self.names[job.number]}): {job.error}")
            else:
                left.append(job)
        if self.grid.options.resume is not None:
            self._say(f"{len(self.manifest.jobs) - len(left)} are done or cannot be; {len(left)} are tried again")
        return left

    def _do(self, commands: dict[int, list[str]]) -> None:
        if self.is_submitted:
            slurm_launcher.submit(commands, self.grid.launcher, self.folder, self._started, self._ended)
            return
        consoles = {number: self.folder / str(number) / "console.log" for number in commands}
        run_here(commands, consoles, self.grid.options.jobs, self._started, self._ended)

    def _command_of(self, job: Job) -> list[str]:
        """How a job is started: from its last checkpoint if it has one, or else anew."""
        if self._is_anew(job):
            return self._anew(job)
        return [*self._interpreter(), f"resume={quoted(self.manifest.folder_of(job))}"]

    def _is_anew(self, job: Job) -> bool:
        """Whether a job has left no checkpoint to go on from."""
        folder = self.manifest.folder_of(job)
        return not ((folder / ACCEPTED).exists() and any(folder.glob(f"**/step_*/{NAME}")))

    def _anew(self, job: Job) -> list[str]:
        return [*self._interpreter(), *job.overrides, f"hydra.run.dir={quoted(self.manifest.folder_of(job))}"]

    def _interpreter(self) -> list[str]:
        return [sys.executable, *module_arguments(f"wmtp.{self.command}")]

    def _started(self, number: int) -> None:
        job = self.manifest.jobs[number]
        folder = self.manifest.folder_of(job)
        if self._is_anew(job) and (folder / "status.json").exists():  # nothing was saved, but what it said is kept
            folder.rename(folder.with_name(f"{folder.name}.attempt-{job.attempts}"))
        self.manifest.begin(job)
        self._say(f"job {number} of {len(self.manifest.jobs)} begins: {self.names[number]}")

    def _ended(self, number: int, exit_code: int, last_words: str) -> None:
        job = self.manifest.jobs[number]
        self.manifest.end(job, exit_code, last_words)
        loss = job.result.get("final_loss")
        said = "" if loss is None else f", val/loss {loss:.4f}"
        said = said if job.error is None else f": {job.error.splitlines()[0]}"
        self._say(f"job {number} of {len(self.manifest.jobs)} {job.state}{said}")

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


def run_sweep(command: str, arguments: Sequence[str], check: Check, told: Callable[[Path, str], None]) -> int:
    """Do what a command was told with -m; the exit code."""
    sweep = Sweep(command, arguments, check)
    return sweep.rehearse() if sweep.grid.is_rehearsal else sweep.run(told)


def print_results(console: Console, manifest: Manifest, options: SweepOptions) -> None:
    """The table at the end of a sweep, and what is wrong with the jobs that are not in it."""
    runs = manifest.finished()
    console.print(f"\n{len(runs)} of {len(manifest.jobs)} jobs finished", highlight=False)
    if runs:
        console.print(results_table(runs, options))
        if all(value_of(run, options) is None for run in runs):
            known = ", ".join(sorted(name for name in runs[0].summary[options.at] if name.startswith("val/")))
            console.print(f"no run has sweep.metric={options.metric}; they have {known}", highlight=False)
    names = swept([job.overrides for job in manifest.jobs])
    for job, name in zip(manifest.jobs, names, strict=True):
        if job.state != "FINISHED":
            problem = (job.error or "was not started").splitlines()[0]
            line = f"job {job.number} ({name}) {job.state}: {problem}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            if job.traceback is not None:
                log = manifest.folder_of(job) / "train.log"
                log = log if log.exists() else manifest.folder / SWEEP
                console.print(f"  its traceback: {log}", markup=False, highlight=False, soft_wrap=True)


def value_of(run: RunRecord, options: SweepOptions) -> float | None:
    """A run's value of the wished metric; `pass@1` is always that of its last model. None: it was not measured."""
    line = {"pass@1": (run.summary.get("pass@1") or {}).get("value"), **run.summary.get(options.at, {})}
    found = line.get(options.metric)
    return float(found) if isinstance(found, int | float) else None


def results_table(runs: list[RunRecord], options: SweepOptions) -> Table:
    """A row for each group of seeds, sorted by the mean of the wished metric; unknown ones last."""
    metric = options.metric
    rows: list[tuple[float | None, list[str]]] = []
    for label, members in grouped(runs).items():
        known = [value for run in members if (value := value_of(run, options)) is not None]
        seeds = ", ".join(str(run.seed) for run in sorted(members, key=lambda run: run.seed))
        middle = mean(known) if known else None
        shown = "-" if middle is None else f"{middle:.4f}"
        spread = f"± {stdev(known):.4f}" if len(known) > 1 else ""
        best = "-" if not known else f"{(min if is_lower_better(metric) else max)(known):.4f}"
        rows.append((middle, [escape(label), seeds, shown, spread, best]))
    sign = 1 if is_lower_better(metric) else -1
    rows.sort(key=lambda row: (row[0] is None, sign * (row[0] or 0.0)))
    right = [Column(name, justify="right") for name in (f"mean {metric}", "deviation", "best")]
    table = Table("group", "seeds", *right, title=f"{WHERE[options.at]} of each run", title_justify="left")
    for _, row in rows:
        table.add_row(*row)
    return table
