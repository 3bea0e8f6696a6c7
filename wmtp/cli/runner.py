"""From a command line to a job in a run's folder: overrides, checks, Hydra, status and exit code."""

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
from wmtp.cli.job import Task, dismiss, follow, launch, lead, work
from wmtp.config.groups import is_group, options_of
from wmtp.config.overrides import forced, parsed, plain, quoted, saved_overrides
from wmtp.config.schema import CONFIG_FOLDER, ConfigError, Fault, did_you_mean
from wmtp.distributed.worker import TASK
from wmtp.errors import InputError, InterruptedRun, PendingError, WmtpError, worst
from wmtp.runtime.processes import die_with, keep_to_share, started_together
from wmtp.runtime.run_dir import Ending, RunStatus
from wmtp.runtime.signals import ignored_signals, raised_signals
from wmtp.sweep.local_launcher import PARENT

log = logging.getLogger(__name__)
MULTIRUN = ("-m", "--multirun")
COMPLETION = ("-sc", "--shell-completion")
"""Hydra's options that install Tab completion in a shell and answer it."""


def run(command: Command) -> NoReturn:
    """Run a command: check its overrides, choose its folder, hand over to Hydra, exit with the job's code.

    A process that was started to help with a job does only that. A sweep's job dies with its sweep.
    """
    if (sweep := os.environ.pop(PARENT, None)) is not None:
        die_with(int(sweep))
    if TASK in os.environ:
        work(command.job)
    if started_together() and "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())
    if started_together() and os.environ["RANK"] != "0":
        follow(command.job)
    session = Session(command)
    try:
        load_environment()
        with raised_signals():
            arguments = command.in_full(sys.argv[1:])
            session.run([plain(argument, command.texts, command.short) for argument in arguments])
    except WmtpError as error:
        session.end(error.exit_code, str(error))
    except BrokenPipeError:  # `… --help | head`: nobody reads on, and the interpreter must not flush at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (InterruptedRun, KeyboardInterrupt) as error:
        session.interrupted(ending(error)[0])
    finally:
        session.close()
    sys.exit(worst(session.codes))


class Session:
    """One call of a command, from what was typed to its exit code."""

    def __init__(self, command: Command) -> None:
        self.command = command
        self.codes: list[int] = []
        """The exit codes of its jobs."""
        self.folder: Path | None = None
        """The folder of its only job."""
        self.is_temporary = False
        self.scratch: Path | None = None
        """A folder for what is only looked at."""
        self.has_shared = False
        """Whether the processes that torchrun started besides this one know what to do."""

    def run(self, arguments: list[str]) -> None:
        """Do the sweep; or check, choose the folder, and do the job.

        Raises:
            ConfigError: something is wrong with the overrides, the config or the folder.
        """
        options = [argument for argument in arguments if argument.startswith("-")]
        if options and set(options) <= set(MULTIRUN):
            self._sweep([argument for argument in arguments if argument not in MULTIRUN])
            return
        overrides = self._choose(arguments)
        sys.argv = [sys.argv[0], *overrides]
        main = hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name=self.command.name)
        main(self._do)()

    def _sweep(self, arguments: list[str]) -> None:
        """Do a job for each combination of the values that were named."""
        from wmtp.sweep.sweep import run_sweep

        command = self.command
        if started_together():
            problem = "a sweep starts outside, and each of its jobs starts its processes; leave torchrun out"
            raise ConfigError([Fault("-m", "", problem)])
        if command.end_sweep is None:
            raise ConfigError([Fault("-m", "", f"only trainings are swept; call {command.name} for each by itself")])
        if resumed := [a for a in arguments if a.lstrip("+").startswith("resume=")]:
            problem = "a sweep begins new runs; sweep.resume=DIR goes on with one that was begun"
            raise ConfigError([Fault(resumed[0], "", problem)])
        refuse_credentials(arguments)

        def check(overrides: list[str]) -> list[Fault]:
            try:
                checked_overrides(command, overrides)
            except ConfigError as error:
                return error.faults
            return []

        self.codes.append(run_sweep(command.name, self._with_copies(arguments), check, command.end_sweep))

    def _choose(self, arguments: list[str]) -> list[str]:
        command = self.command
        if started_together() and command.num_processes is None:
            raise ConfigError([Fault("torchrun", "", f"{command.name} works in one process; leave torchrun out")])
        if any(argument in COMPLETION for argument in arguments):
            return arguments
        refuse_credentials(arguments)
        arguments = self._with_copies(arguments)
        if any(argument.startswith("-") for argument in arguments):  # --help, --cfg: Hydra's own
            return [forced(argument) for argument in arguments if argument not in MULTIRUN]
        overrides, config = checked_overrides(command, arguments)
        folder = command.folder(config, overrides)
        if folder is None:
            folder, self.is_temporary = Path(tempfile.mkdtemp(prefix=f"wmtp-{command.name}-")), True
        self.folder = folder
        self._warn(config, folder)
        if config.get("dry_run"):
            overrides.append(f"++cache_dir={quoted(folder / 'cache')}")
        return [*overrides, f"hydra.run.dir={quoted(folder)}"]

    def _with_copies(self, arguments: list[str]) -> list[str]:
        """The arguments with local copies in the place of addresses in S3; a rehearsal's go when the command ends."""
        options = {argument for argument in arguments if argument.startswith("-")}
        if not any("s3://" in argument for argument in arguments) or options - {"-m", "--multirun"}:
            return arguments
        from wmtp.cli.s3_paths import fetched

        if "dry_run=true" in (argument.lstrip("+").lower() for argument in arguments):
            self.scratch = Path(tempfile.mkdtemp(prefix=f"wmtp-{self.command.name}-"))
        try:
            return fetched(arguments, self.command.fetches, self.scratch)
        except OSError as error:
            raise InputError(f"{error}; nothing was done") from error

    def _do(self, config: DictConfig) -> float | None:
        """One job: its outcome goes to status.json and the exit codes, its traceback to the log file."""
        hydra_config = HydraConfig.get()
        folder = Path(hydra_config.runtime.output_dir)
        try:
            status, progress = RunStatus(folder), Ending()
        except InputError as error:
            self.end(error.exit_code, str(error))
            return None

        def record(error: BaseException) -> None:
            code, state = ending(error)
            if not (isinstance(error, InputError) and status.withdraw()):
                status.end(state, code, progress, error=str(error) or type(error).__name__)
            if progress.logged is not error:
                log.info("it ended: %s", state, exc_info=error)
            self.end(code, farewell(error, None if self.is_temporary else folder, self.command))

        try:
            config = self.command.complete(config, list(hydra_config.overrides.task))
            if faults := self.command.faults(config):
                raise ConfigError(faults)
            task = Task(config, folder, list(hydra_config.overrides.task), progress)
            value = self._perform(task, record)
            status.end("FINISHED", 0, progress)
        except BaseException as error:  # noqa: BLE001 - whatever ends the job is recorded
            with ignored_signals():
                record(error)
            if isinstance(error, InterruptedRun):
                sys.exit(self.codes[-1])
            return None
        return value

    def _perform(self, task: Task, record: Callable[[BaseException], None]) -> float | None:
        """Do the job, in as many processes as it asks for."""
        command = self.command
        if started_together():
            self.has_shared = True
            return lead(command.job, task, record)
        size = command.num_processes(task.config) if command.num_processes else 1
        if size > 1:
            return launch(command.job, task, size)
        keep_to_share()
        return command.job(task)

    def _warn(self, config: DictConfig, folder: Path) -> None:
        for problem in self.command.problems(config, folder):
            print(f"WARNING: {problem}", file=sys.stderr)

    def end(self, code: int, message: str) -> None:
        """Say how a job ended, and note its exit code."""
        print(message, file=sys.stderr)
        self.codes.append(code)

    def interrupted(self, code: int) -> None:
        """A signal came when no job was going on; a folder that was chosen for one says so, if it holds anything."""
        self.end(code, "interrupted before anything began")
        folder = None if self.is_temporary else self.folder
        if folder is not None and folder.exists() and any(folder.iterdir()) and not (folder / "status.json").exists():
            RunStatus(folder).end("KILLED", code, Ending(), error="interrupted before anything began")

    def close(self) -> None:
        """Remove what is not to stay, and let nobody wait."""
        for folder in (self.scratch, self.folder if self.is_temporary else None):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        if self.folder is not None and self.folder.exists() and not any(self.folder.iterdir()):
            self.folder.rmdir()  # it was chosen, and nothing came of it
        if started_together() and not self.has_shared:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which torchrun sends as soon as one of the others has ended
            dismiss(worst(self.codes))


def checked_overrides(command: Command, arguments: list[str]) -> tuple[list[str], DictConfig]:
    """The overrides to run with, those of the run to be resumed included, and the config they compose.

    Raises:
        ConfigError: with every fault of the syntax, the groups, the keys and their values.
    """
    faults: list[Fault] = []
    overrides: dict[tuple[str, str | None], str] = {}
    for override in parsed(saved_overrides(arguments) + arguments, faults):
        key, text = override.key_or_group, override.input_line or ""
        options = options_of(key) if is_group(key) else None
        if options is not None and str(override.value()) not in options:
            choice = str(override.value())
            faults.append(Fault(key, choice, f"no such option; {did_you_mean(choice, options)}"))
        else:
            overrides[key, override.package] = forced(text)
    chosen = list(overrides.values())
    config = DictConfig({})
    try:
        with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
            config = command.complete(hydra.compose(command.name, chosen), chosen)
    except (HydraException, OmegaConfBaseException) as error:
        faults.append(Fault("config", "", " ".join(str(error).split())))
    else:
        faults += command.faults(config)
    if faults:
        raise ConfigError(faults)
    return chosen, config


def farewell(error: BaseException, folder: Path | None, command: Command) -> str:
    """What an end is said to be, and what can be done about it; without a folder, the traceback of a crash."""
    if isinstance(error, InterruptedRun):
        return f"{error}\n{command.advice(folder)}" if folder else str(error)
    if isinstance(error, PendingError):
        return str(error)
    if folder is None:
        return str(error) if isinstance(error, WmtpError) else "".join(traceback.format_exception(error))
    kind = "" if isinstance(error, WmtpError) else f"{type(error).__name__}: "
    return f"{kind}{error}\nThe traceback is in {folder / command.name}.log."


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code and the recorded state of a run that an exception ended."""
    if isinstance(error, InterruptedRun):
        return error.exit_code, "KILLED"
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "KILLED"
    if isinstance(error, PendingError):
        return error.exit_code, "FINISHED"
    return error.exit_code if isinstance(error, WmtpError) else 1, "FAILED"
