"""Preparation, execution and end of a command.

The overrides are checked, the folder is chosen, and Hydra runs the job. After that, the status and the exit code are
recorded.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from wmtp.cli.command import Command
from wmtp.cli.env import load_environment, refuse_credentials
from wmtp.cli.job import JobContext, launch, run_launched_worker, run_rank0, run_worker, shutdown_workers
from wmtp.config.groups import group_options, is_group
from wmtp.config.overrides import expand_argument, load_saved_overrides, parse_overrides, quote, to_hydra_override
from wmtp.config.schema import CONFIG_FOLDER, ConfigError, ConfigIssue, did_you_mean
from wmtp.distributed.worker import CONTEXT_VARIABLE
from wmtp.errors import InputError, InterruptedRun, PendingError, WmtpError, worst_exit_code
from wmtp.runtime.processes import kill_on_parent_death, limit_threads, started_together
from wmtp.runtime.run_dir import JobProgress, RunStatus
from wmtp.runtime.signals import ignore_signals, raise_on_signals
from wmtp.sweep.local_launcher import SWEEP_PID_VARIABLE

log = logging.getLogger(__name__)
MULTIRUN = ("-m", "--multirun")
COMPLETION = ("-sc", "--shell-completion")
"""Hydra options with which users install Tab completion, or with which a shell requests completions."""


def run(command: Command) -> NoReturn:
    """Run a command, and end this process with the exit code of the command.

    If this process is a worker that another process started, it only runs the job. If this process is a job of a sweep,
    it is killed when the process of the sweep dies.
    """
    if (sweep := os.environ.pop(SWEEP_PID_VARIABLE, None)) is not None:
        kill_on_parent_death(int(sweep))
    if CONTEXT_VARIABLE in os.environ:
        run_launched_worker(command.job)
    if started_together() and "TORCHELASTIC_RUN_ID" in os.environ:
        kill_on_parent_death(os.getppid())
    if started_together() and os.environ["RANK"] != "0":
        run_worker(command.job)
    runner = CommandRunner(command)
    try:
        load_environment()
        with raise_on_signals():
            arguments = command.positional_args(sys.argv[1:])
            runner.run([expand_argument(argument, command.raw_keys, command.aliases) for argument in arguments])
    except WmtpError as error:
        runner.end(error.exit_code, str(error))
    except BrokenPipeError:  # `… --help | head`: the reader closed the pipe, and the exit must not flush into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InterruptedRun, KeyboardInterrupt) as error:
        runner.interrupted(exit_state(error)[0])
    finally:
        runner.close()
    sys.exit(worst_exit_code(runner.codes))


class CommandRunner:
    """One call of a command, from its arguments to its exit code."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.codes: list[int] = []
        """Exit codes of the jobs."""
        self.folder: Path | None = None
        """Folder of the job. It is None if this is a sweep, or if the folder is not chosen yet."""
        self.is_temporary = False
        self.scratch: Path | None = None
        """Temporary folder for the downloads of a dry run."""
        self.has_shared_job = False
        """True if this process has started to send the job to the other ranks of torchrun."""

    def run(self, arguments: list[str]) -> None:
        """Run a sweep if the arguments contain `-m` or `--multirun`. Otherwise, run one job.

        Raises:
            ConfigError: an override, the config or the folder is not valid.
        """
        options = [argument for argument in arguments if argument.startswith("-")]
        if options and set(options) <= set(MULTIRUN):
            self._sweep([argument for argument in arguments if argument not in MULTIRUN])
            return
        overrides = self._prepare(arguments)
        sys.argv = [sys.argv[0], *overrides]
        main = hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name=self.command.name)
        main(self._run_job)()

    def _sweep(self, arguments: list[str]) -> None:
        """Run a sweep, with one job for each combination of the values in the arguments."""
        from wmtp.sweep.sweep import run_sweep

        command = self.command
        if started_together():
            problem = "a sweep starts its own processes for each job; run it without torchrun"
            raise ConfigError([ConfigIssue("-m", "", problem)])
        if command.end_sweep is None:
            problem = f"only train supports sweeps; run {command.name} once per combination"
            raise ConfigError([ConfigIssue("-m", "", problem)])
        if resumed := [a for a in arguments if a.lstrip("+").startswith("resume=")]:
            problem = "a sweep starts new runs; resume an earlier sweep with sweep.resume=DIR"
            raise ConfigError([ConfigIssue(resumed[0], "", problem)])
        refuse_credentials(arguments)

        def _check(overrides: list[str]) -> list[ConfigIssue]:
            """Return the issues of the overrides of one job."""
            try:
                check_overrides(command, overrides)
            except ConfigError as error:
                return error.issues
            return []

        self.codes.append(run_sweep(command.name, self._download_remote(arguments), _check, command.end_sweep))

    def _prepare(self, arguments: list[str]) -> list[str]:
        """Check the arguments, choose the run folder, and return the overrides for Hydra."""
        command = self.command
        if started_together() and command.num_processes is None:
            problem = f"{command.name} runs in one process; run it without torchrun"
            raise ConfigError([ConfigIssue("torchrun", "", problem)])
        if any(argument in COMPLETION for argument in arguments):
            return arguments
        refuse_credentials(arguments)
        arguments = self._download_remote(arguments)
        if any(argument.startswith("-") for argument in arguments):  # --help, --cfg: Hydra's own
            return [to_hydra_override(argument) for argument in arguments if argument not in MULTIRUN]
        overrides, config = check_overrides(command, arguments)
        folder = command.folder(config, overrides)
        if folder is None:
            folder, self.is_temporary = Path(tempfile.mkdtemp(prefix=f"wmtp-{command.name}-")), True
        self.folder = folder
        for warning in command.preflight(config, folder):
            print(f"WARNING: {warning}", file=sys.stderr)
        if config.get("dry_run"):
            overrides.append(f"++cache_dir={quote(folder / 'cache')}")
        return [*overrides, f"hydra.run.dir={quote(folder)}"]

    def _download_remote(self, arguments: list[str]) -> list[str]:
        """Download the runs whose S3 URLs are in the arguments, and replace the URLs with local paths.

        In a dry run, the local copies are removed when the command ends.
        """
        options = {argument for argument in arguments if argument.startswith("-")}
        if not any("s3://" in argument for argument in arguments) or options - set(MULTIRUN):
            return arguments
        from wmtp.cli.s3_paths import replace_remote_args

        if "dry_run=true" in (argument.lstrip("+").lower() for argument in arguments):
            self.scratch = Path(tempfile.mkdtemp(prefix=f"wmtp-{self.command.name}-"))
        try:
            return replace_remote_args(arguments, self.command.remote_keys, self.scratch)
        except OSError as error:
            raise InputError(f"{error}; nothing was done") from error

    def _run_job(self, config: DictConfig) -> float | None:
        """Run one job. Record its end in status.json and `self.codes`, and the traceback of an error in the log."""
        hydra_config = HydraConfig.get()
        folder = Path(hydra_config.runtime.output_dir)
        try:
            status, progress = RunStatus(folder), JobProgress()
        except InputError as error:
            self.end(error.exit_code, str(error))
            return None

        def _record(error: BaseException) -> None:
            """Record the error as the end of the run, and print its message."""
            code, state = exit_state(error)
            if not (isinstance(error, InputError) and status.withdraw()):
                status.end(state, code, progress, error=str(error) or type(error).__name__)
            if progress.logged is not error:
                log.info("the job ended: %s", state, exc_info=error)
            self.end(code, final_message(error, None if self.is_temporary else folder, self.command))

        try:
            overrides = list(hydra_config.overrides.task)
            config = self.command.complete(config, overrides)
            if issues := self.command.find_issues(config):
                raise ConfigError(issues)
            value = self._dispatch(JobContext(config, folder, overrides, progress), _record)
            status.end("FINISHED", 0, progress)
        except BaseException as error:  # noqa: BLE001 - every end of the job is recorded
            with ignore_signals():
                _record(error)
            if isinstance(error, InterruptedRun):
                sys.exit(self.codes[-1])
            return None
        return value

    def _dispatch(self, context: JobContext, record: Callable[[BaseException], None]) -> float | None:
        """Run the job in as many processes as its config requires."""
        command = self.command
        if started_together():
            self.has_shared_job = True
            return run_rank0(command.job, context, record)
        size = command.num_processes(context.config) if command.num_processes else 1
        if size > 1:
            return launch(command.job, context, size)
        limit_threads()
        return command.job(context)

    def end(self, code: int, message: str) -> None:
        """Print a message about the end of a job, and record the exit code of the job."""
        print(message, file=sys.stderr)
        self.codes.append(code)

    def interrupted(self, code: int) -> None:
        """Record that a signal interrupted this process while no job was running.

        If the run folder has content but no status.json, this file is written with the state KILLED.
        """
        self.end(code, "interrupted before the job started")
        folder = None if self.is_temporary else self.folder
        if folder is not None and folder.exists() and any(folder.iterdir()) and not (folder / "status.json").exists():
            RunStatus(folder).end("KILLED", code, JobProgress(), error="interrupted before the job started")

    def close(self) -> None:
        """Remove temporary folders and an empty run folder. End the ranks of torchrun that still wait for a job."""
        for folder in (self.scratch, self.folder if self.is_temporary else None):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        if self.folder is not None and self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()
        if started_together() and not self.has_shared_job:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it as soon as one of the other ranks ends
            shutdown_workers(worst_exit_code(self.codes))


def check_overrides(command: Command, arguments: list[str]) -> tuple[list[str], DictConfig]:
    """Check the arguments of a command, and compose its config from them.

    Returns:
        The overrides in Hydra's syntax, and the config. If a run is resumed, its saved overrides are included.

    Raises:
        ConfigError: the arguments contain errors. The message lists all errors in syntax, groups, keys and values.
    """
    issues: list[ConfigIssue] = []
    overrides: dict[tuple[str, str | None], str] = {}
    for override in parse_overrides(load_saved_overrides(arguments) + arguments, issues):
        key, text = override.key_or_group, override.input_line or ""
        options = group_options(key) if is_group(key) else None
        if options is not None and str(override.value()) not in options:
            choice = str(override.value())
            issues.append(ConfigIssue(key, choice, f"no such option; {did_you_mean(choice, options)}"))
        else:
            overrides[key, override.package] = to_hydra_override(text)
    chosen = list(overrides.values())
    config = DictConfig({})
    try:
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            config = command.complete(hydra.compose(command.name, chosen), chosen)
    except (HydraException, OmegaConfBaseException) as error:
        issues.append(ConfigIssue("config", "", " ".join(str(error).split())))
    else:
        issues += command.find_issues(config)
    if issues:
        raise ConfigError(issues)
    return chosen, config


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
