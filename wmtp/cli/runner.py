"""Preparation, execution and end of a command.

The overrides are checked, the folder is chosen, and Hydra runs the job. After that, the status and the exit code are
recorded.
"""

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.callbacks import Callbacks
from hydra.core.utils import run_job as hydra_run_job
from hydra.types import HydraContext

from wmtp.cli.command import MULTIRUN, Command
from wmtp.cli.env import load_environment, refuse_credentials
from wmtp.cli.job import JobContext, run_job, run_worker
from wmtp.cli.resolve import ResolvedJob, choose_folder, compose, decode_job, encode_job, resolve
from wmtp.config import help_text
from wmtp.config.overrides import (
    expand_argument,
    is_dry_run,
    last_value,
    override_key,
    override_text,
    resumed_folder,
    to_hydra_override,
)
from wmtp.config.schema import CONFIG_FOLDER, ConfigError, ConfigIssue
from wmtp.config.trust import DESTINATIONS, saved_override_issues
from wmtp.errors import InputError, InterruptedRun, PendingError, WmtpError, worst_exit_code
from wmtp.runtime.destinations import remember_destinations
from wmtp.runtime.processes import (
    JOB_OPTION,
    PARENT_VARIABLE,
    check_launcher_variables,
    kill_on_parent_death,
    started_together,
)
from wmtp.runtime.run_dir import JobProgress, RunStatus
from wmtp.runtime.signals import ignore_signals, raise_on_signals
from wmtp.runtime.standard_streams import require_written_output
from wmtp.runtime.versions import version_text

log = logging.getLogger(__name__)
COMPLETION = ("-sc", "--shell-completion")
"""Hydra's options for Tab completion. Their values look like overrides, but are none."""
PRINTING = {
    "-h", "--help", "--hydra-help", "-c", "--cfg", "--resolve", "-p", "--package", "-i", "--info",
    *COMPLETION,
}  # fmt: skip
"""Hydra's options that print something and start no job."""


def run(command: Command) -> NoReturn:
    """Run a command, and end this process with the exit code of the command.

    If this process is a rank above 0 of a run, it only runs the job. If another process of wmtp or torchrun started
    this process, it is killed when that process dies.
    """
    if (parent := os.environ.pop(PARENT_VARIABLE, None)) is not None:
        kill_on_parent_death(int(parent))
    try:
        check_launcher_variables()
        if started_together() and command.num_processes is None:
            remedy = "run it without torchrun, or unset RANK and WORLD_SIZE if another program left them behind"
            raise InputError(f"{command.name} runs in one process; {remedy}")
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    if parent is None and started_together() and "TORCHELASTIC_RUN_ID" in os.environ:
        kill_on_parent_death(os.getppid())
    if started_together() and os.environ["RANK"] != "0":
        run_worker(command.job)
    runner = CommandRunner(command)
    try:
        load_environment()
        with raise_on_signals():
            runner.run(sys.argv[1:])
    except WmtpError as error:
        runner.end(error.exit_code, str(error))
    except (InterruptedRun, KeyboardInterrupt) as error:
        runner.interrupted(exit_state(error)[0])
    finally:
        runner.close()
    sys.exit(runner.code)


class CommandRunner:
    """One call of a command, from its arguments to its exit code."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.code = 0
        """The most severe exit code so far."""
        self.folder: Path | None = None
        """Folder of the run. It is None if it is not chosen yet, and for sweeps and jobs without a lasting folder."""
        self.has_ended = False
        """True once the end of a job or a sweep is recorded."""
        self.clean_up = ExitStack()
        """Removal of temporary folders and of an empty run folder."""

    def run(self, arguments: list[str]) -> None:
        """Run a sweep if the arguments contain `-m` or `--multirun`. Otherwise, run one job.

        `arguments` are the arguments as the user typed them.

        Raises:
            ConfigError: an override, the config or the folder is not valid.
        """
        if arguments[:1] == [JOB_OPTION]:
            if len(arguments) != 2:
                raise InputError(f"{JOB_OPTION}: needs the path of a job's file; a sweep passes it to its jobs")
            try:
                values = json.loads(Path(arguments[1]).read_text())
            except (OSError, ValueError) as error:
                raise InputError(f"{JOB_OPTION} {arguments[1]}: cannot be read: {error}") from error
            self._start(choose_folder(self.command, decode_job(self.command, values)))
            return
        if "--version" in arguments:
            print(version_text())
            require_written_output()
            return
        arguments, command = self.command.positional_args(arguments), self.command
        options = [argument for argument in arguments if argument.startswith("-")]
        expand = partial(expand_argument, is_sweep=not set(MULTIRUN).isdisjoint(options))
        arguments = [expand(argument, command.raw_keys, command.aliases) for argument in arguments]
        if options and set(options) <= set(MULTIRUN):
            self._sweep([argument for argument in arguments if argument not in MULTIRUN])
            return
        if unknown := [option for option in options if option.partition("=")[0] not in {*PRINTING, *MULTIRUN}]:
            problem = "is not an option of this command; settings are written as key=value, and --help lists the keys"
            raise ConfigError([ConfigIssue(option, "", problem) for option in unknown])
        refuse_credentials(arguments)
        arguments = self._download_remote(arguments)
        if options:
            arguments = [argument for argument in arguments if argument not in MULTIRUN]
            self._run_hydra(arguments if options[0] in COMPLETION else [*map(to_hydra_override, arguments)])
            return
        self._start(resolve(self.command, arguments))

    def _start(self, resolved: ResolvedJob) -> None:
        """Start a resolved job: let Hydra write its files and set up the logging, then run the job."""
        if resolved.is_temporary:
            self.clean_up.callback(_remove_with_log, resolved.folder)
        else:
            self.folder = resolved.folder
            self.clean_up.callback(_remove_if_empty, resolved.folder)
        for note in resolved.composed.notes:
            print(note, file=sys.stderr)
        for warning in self.command.preflight(resolved.composed.checked.config, resolved.planned_folder):
            print(f"WARNING: {warning}", file=sys.stderr)
        settings = resolved.composed.hydra
        context = HydraContext(None, Callbacks(settings))  # type: ignore[arg-type] # no loader: nothing is composed
        try:
            result = hydra_run_job(lambda config: self._run_job(resolved), settings, "hydra.run.dir", None, context)
        except OSError as error:  # Hydra writes its files before the job
            raise InputError(f"{resolved.folder}: cannot be written: {error}; nothing was started") from error
        _ = result.return_value  # raises an error of `_run_job` itself, which Hydra has kept

    def _run_hydra(self, arguments: list[str]) -> None:
        """Run one of Hydra's own options, which print something and start no job."""
        help_text.register()
        sys.argv = [sys.argv[0], *arguments]
        main = hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name=self.command.name)
        lists = nullcontext() if "--hydra-help" in arguments else help_text.without_unused_lists()
        try:
            with lists:
                main(lambda config: None)()
        except SystemExit as end:  # Hydra ends the process after some of its options, such as --help
            if end.code:
                raise
        require_written_output()

    def _sweep(self, arguments: list[str]) -> None:
        """Run a sweep, with one job for each combination of the values in the arguments."""
        from wmtp.sweep.sweep import PreparedJob, run_sweep

        command = self.command
        if started_together():
            problem = "a sweep starts its own processes for each job; run it without torchrun"
            raise ConfigError([ConfigIssue("-m", "", problem)])
        if command.end_sweep is None:
            problem = f"only train supports sweeps; run {command.name} once per combination"
            raise ConfigError([ConfigIssue("-m", "", problem)])
        if (run := resumed_folder(arguments)) is not None:
            problem = "a sweep starts new runs; resume an earlier sweep with sweep.resume=DIR"
            raise ConfigError([ConfigIssue("resume", str(run), problem)])
        refuse_credentials(arguments)
        resumed, printed = resumed_folder(arguments, "sweep.resume"), set[str]()
        # typed destinations are known by their values, because the saved overrides of a job may have other values
        typed = [argument for argument in arguments if override_key(argument) not in DESTINATIONS]
        if resumed is not None:
            remember_destinations(uri for key in DESTINATIONS if (uri := last_value(arguments, key)) is not None)

        def _prepare(overrides: list[str]) -> PreparedJob:
            """Compose and check one job. The overrides of a resumed sweep are read from its folder."""
            try:
                if resumed is not None and (issues := list(saved_override_issues(overrides, arguments))):
                    raise ConfigError(issues)
                job = compose(command, overrides, resumed, typed)
                print(*(f"{note}\n" for note in job.notes if note not in printed), sep="", end="", file=sys.stderr)
                printed.update(job.notes)
                return PreparedJob(job.checked.issues, encode_job(job))
            except ConfigError as error:
                return PreparedJob(error.issues, {})

        self._add(run_sweep(command.name, self._download_remote(arguments), _prepare, command.end_sweep))
        self.has_ended = True

    def _download_remote(self, arguments: list[str]) -> list[str]:
        """Download the runs whose S3 URLs are in the arguments, and replace the URLs with local paths.

        In a dry run, the local copies are removed when the command ends.
        """
        options = {argument for argument in arguments if argument.startswith("-")}
        if not any("s3://" in override_text(argument) for argument in arguments) or options - set(MULTIRUN):
            return arguments
        from wmtp.cli.s3_paths import replace_remote_args

        scratch: Path | None = None
        if is_dry_run(arguments):
            temporary = tempfile.TemporaryDirectory(prefix=f"wmtp-{self.command.name}-", ignore_cleanup_errors=True)
            scratch = Path(self.clean_up.enter_context(temporary))
        try:
            return replace_remote_args(arguments, self.command.remote_keys, scratch)
        except OSError as error:
            raise InputError(f"{error}; nothing was done") from error

    def _run_job(self, resolved: ResolvedJob) -> None:
        """Run one job. Record its end in status.json and `self.code`, and the traceback of an error in the log."""
        folder, checked = resolved.folder, resolved.composed.checked
        try:
            status, progress = RunStatus(folder), JobProgress()
        except (InputError, OSError) as error:
            self.end(InputError.exit_code, str(error))
            return

        def _record(error: BaseException) -> None:
            """Record the error as the end of the run, and print its message."""
            code, state = exit_state(error)
            try:
                if not (isinstance(error, InputError) and status.withdraw()):
                    status.end(state, code, progress, error=str(error) or type(error).__name__)
            except OSError as problem:  # for example, the disk is full
                print(f"{folder / 'status.json'}: cannot be written: {problem.strerror}", file=sys.stderr)
            if progress.logged is not error:
                log.info("the job ended: %s", state, exc_info=error)
            self.end(code, final_message(error, self.folder, self.command))

        overrides = list(resolved.composed.hydra.hydra.overrides.task)
        context = JobContext(checked.config, folder, overrides, progress, checked.inputs)
        size = self.command.num_processes(checked.config) if self.command.num_processes else 1
        try:
            run_job(self.command.job, context, size, _record)
            with ignore_signals():
                status.end("FINISHED", 0, progress)
                self.has_ended = True
        except BaseException as error:  # noqa: BLE001 - every end of the job is recorded
            with ignore_signals():
                _record(error)
                self.has_ended = True
            if isinstance(error, InterruptedRun):
                sys.exit(self.code)

    def end(self, code: int, message: str) -> None:
        """Print a message about the end of a job, and record the exit code of the job."""
        print(message, file=sys.stderr)
        self._add(code)

    def _add(self, code: int) -> None:
        self.code = worst_exit_code([self.code, code])

    def interrupted(self, code: int) -> None:
        """Record that a signal interrupted this process before a job was running. After its end, it has no effect.

        If the run folder has content but no status.json, this file is written with the state KILLED.
        """
        if self.has_ended:
            return
        self.end(code, "interrupted before the job started")
        folder = self.folder
        if folder is not None and folder.exists() and any(folder.iterdir()) and not (folder / "status.json").exists():
            RunStatus(folder).end("KILLED", code, JobProgress(), error="interrupted before the job started")

    def close(self) -> None:
        """Remove temporary folders and an empty run folder. End the ranks of torchrun that still wait for a job."""
        self.clean_up.close()
        if started_together():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as one of the other ranks ends
            from wmtp.distributed.store import send_shutdown  # imports torch, which --help does not need

            send_shutdown(self.code)


def _remove_with_log(folder: Path) -> None:
    """Remove a temporary folder, and the log handler that would open a file in it at the next message."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).parent == folder:
            root.removeHandler(handler)
            handler.close()
    shutil.rmtree(folder, ignore_errors=True)


def _remove_if_empty(folder: Path) -> None:
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def final_message(error: BaseException, folder: Path | None, command: Command) -> str:
    """Return a message that explains to the user why a job failed or was interrupted.

    If `folder` is None, there is no log file. In this case, the message about an unexpected error contains the
    traceback.
    """
    if isinstance(error, InterruptedRun):
        return f"{error}\n{command.resume_hint(folder)}" if folder else str(error)
    if isinstance(error, PendingError):
        return str(error)
    if folder is None:
        return str(error) if isinstance(error, WmtpError) else "".join(traceback.format_exception(error))
    kind = "" if isinstance(error, WmtpError) else f"{type(error).__name__}: "
    return f"{kind}{error}\nThe traceback is in {folder / command.name}.log."


def exit_state(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the state to record for a run that ended with the given exception."""
    if isinstance(error, InterruptedRun):
        return error.exit_code, "KILLED"
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "KILLED"
    if isinstance(error, PendingError):
        return error.exit_code, "FINISHED"
    return error.exit_code if isinstance(error, WmtpError) else 1, "FAILED"
