"""From a command line to a job in a run's folder: overrides, checks, Hydra, status and exit code."""

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wmtp.config import CONFIG_FOLDER, ConfigError, Fault, did_you_mean
from wmtp.errors import InputError, InterruptedRun, PendingError, WmtpError
from wmtp.runtime.folder import ACCEPTED, RunStatus, create_run_folder
from wmtp.runtime.signals import raised_signals

log = logging.getLogger(__name__)
Job = Callable[[DictConfig, Path, RunStatus], float | None]
NOT_SAVED = ("resume", "dry_run")
"""Overrides that belong to one start of a run, not to the run."""
TEXT, ANY_BYTES = "text", "surrogateescape"
OmegaConf.register_new_resolver(TEXT, lambda code: bytes.fromhex(code[1:]).decode(errors=ANY_BYTES), replace=True)
CHECKPOINT_KEY = {"checkpoint": "checkpoint.path"}
"""Hydra takes `checkpoint` itself for the group of that name."""


def unchanged(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The config as it was composed."""
    return config


@dataclass(frozen=True)
class Command:
    """One door of the package: what it does, and what is its own about its config and its folder."""

    name: str
    """Of its config in conf/, and of its log file."""
    job: Job
    faults: Callable[[DictConfig], list[Fault]]
    """Everything that is wrong with a config."""
    folder: Callable[[DictConfig, list[str]], Path | None]
    """Where it writes; None: a folder that goes when the command ends."""
    complete: Callable[[DictConfig, list[str]], DictConfig] = unchanged
    """What the config becomes, given the overrides that were typed."""
    continues: Callable[[DictConfig], bool] = lambda config: False
    """Whether it goes on in a folder that was begun earlier."""
    advice: Callable[[Path], str] = lambda folder: "Nothing was saved; start anew."
    """What to do after an interruption."""
    texts: frozenset[str] = frozenset()
    """Keys whose values are text, whatever characters they hold."""
    short: Mapping[str, str] = field(default_factory=dict)
    """Keys that users may type for longer ones."""


def main(command: Command) -> None:
    """Run a command: check its overrides, choose its folder, hand over to Hydra, exit with the job's code."""
    arguments = [plain(argument, command) for argument in sys.argv[1:]]
    temporary: Path | None = None
    codes: list[int] = []
    try:
        if any(argument.startswith("-") for argument in arguments):  # --help, --cfg, -m: Hydra's own
            sweep = [a for a in arguments if a in ("-m", "--multirun")]  # its parser wants this before the overrides
            overrides = sweep + [forced(a) for a in arguments if a not in sweep]
            if sweep and not any(a.startswith("hydra.sweep.dir=") for a in arguments):
                overrides.append(f"hydra.sweep.dir={quoted(create_run_folder(suffix='-sweep'))}")
        else:
            overrides, config = checked_overrides(command, arguments)
            folder = command.folder(config, overrides)
            if folder is None:
                folder = temporary = Path(tempfile.mkdtemp(prefix=f"wmtp-{command.name}-"))
            if config.get("dry_run"):
                overrides.append(f"++cache_dir={quoted(folder / 'cache')}")
            overrides.append(f"hydra.run.dir={quoted(folder)}")
        sys.argv = [sys.argv[0], *overrides]
        recorded = _recorded(command, codes, temporary)
        hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name=command.name)(recorded)()
    except WmtpError as error:
        print(error, file=sys.stderr)
        codes.append(error.exit_code)
    except BrokenPipeError:  # `… --help | head`: nobody reads on, and the interpreter must not flush at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted before anything began", file=sys.stderr)
        codes.append(128 + signal.SIGINT)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    sys.exit(max(codes, default=0))


def quoted(value: object) -> str:
    """A value as an override that Hydra's grammar reads back unchanged."""
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def named_folder(overrides: list[str]) -> Path | None:
    """The folder that the user chose, if one was."""
    named = [o.partition("=")[2].strip("'\"") for o in overrides if o.startswith("hydra.run.dir=")]
    return Path(named[-1]) if named else None


def is_group(key: str) -> bool:
    """Whether a key chooses a config group's option rather than setting a value."""
    return bool(key) and (CONFIG_FOLDER / key).is_dir()


def plain(argument: str, command: Command) -> str:
    """An argument with its key in full and, where it is text, its value in a code; as Hydra wants it."""
    key, equals, value = argument.partition("=")
    if not equals:
        return argument
    if key in command.texts and value:
        code = value.encode(errors=ANY_BYTES).hex()  # no character of it means anything to Hydra
        value = f"${{{TEXT}:x{code}}}"
    return grouped(f"{command.short.get(key, key)}={value}")


def grouped(argument: str) -> str:
    """An override that chooses a group's option in a plainer way than Hydra's: as Hydra wants it.

    `algo.of=rho1` chooses from the group `algo/of`; `pretrain.model=nano` an option of `model` for the stage.
    """
    key, _, value = argument.partition("=")
    if "." in key and is_group(key.replace(".", "/")):
        return f"{key.replace('.', '/')}={value}"
    outer, _, group = key.partition(".")
    if outer == "pretrain" and is_group(group) and (CONFIG_FOLDER / group / f"{value}.yaml").exists():
        # the stage's own early stopping is chosen in its file already, anything else is added
        return f"{'' if group == 'early_stopping' else '+'}{group}@{key}={value}"
    return argument


def forced(argument: str) -> str:
    """An override as Hydra needs it.

    `key=value` becomes `++key=value`: unknown keys then reach the check, which reports them with all
    others. `experiment=name` becomes `experiment@_global_=name`: the files say nothing of packages.
    """
    key = argument.partition("=")[0]
    if key == "experiment":
        return argument.replace("experiment=", "experiment@_global_=", 1)
    if "=" not in argument or key.startswith(("-", "~", "hydra")) or is_group(key.lstrip("+").split("@")[0]):
        return argument
    return f"++{argument.lstrip('+')}"


def checked_overrides(command: Command, arguments: list[str]) -> tuple[list[str], DictConfig]:
    """The overrides to run with, those of the run to be resumed included, and the config they compose.

    Raises:
        ConfigError: with every fault of the syntax, the groups, the keys and their values.
    """
    faults: list[Fault] = []
    overrides: dict[tuple[str, str | None], str] = {}
    for override in parsed(saved_overrides(arguments) + arguments, faults):
        key, text = override.key_or_group, override.input_line or ""
        options = [path.stem for path in (CONFIG_FOLDER / key).glob("*.yaml")] if is_group(key) else None
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


def parsed(arguments: list[str], faults: list[Fault]) -> list[Override]:
    """The overrides that Hydra's grammar understands; the others become faults."""
    parser, overrides = OverridesParser.create(), []
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException:
            faults.append(Fault(argument, "", "is no override; write key=value, or group=option"))
            continue
        if override.is_sweep_override():
            faults.append(Fault(override.key_or_group, "", "several values make a sweep: add -m, or quote the value"))
        else:
            overrides.append(override)
    return overrides


def saved_overrides(arguments: list[str]) -> list[str]:
    """The overrides of the run that `resume=` names, if it does; a wrong folder is left to the checks."""
    resume = next((a.partition("=")[2] for a in reversed(arguments) if a.lstrip("+").startswith("resume=")), None)
    path = Path(str(resume).strip("'\"")) / ACCEPTED
    if resume is None or not path.exists():
        return []
    saved: list[str] = json.loads(path.read_text())
    return [text for text in saved if text.lstrip("+").partition("=")[0] not in NOT_SAVED]


def _recorded(command: Command, codes: list[int], temporary: Path | None) -> Callable[[DictConfig], float | None]:
    """The job for Hydra: its outcome goes to status.json and `codes`, its traceback to the log file."""

    def run(config: DictConfig) -> float | None:
        hydra_config = HydraConfig.get()
        folder = Path(hydra_config.runtime.output_dir)
        if not command.continues(config) and (folder / "status.json").exists():
            print(f"{folder} holds a run already; name another hydra.sweep.dir", file=sys.stderr)
            codes.append(InputError.exit_code)
            return None
        status = RunStatus(folder)
        try:
            with raised_signals():
                config = command.complete(config, list(hydra_config.overrides.task))
                if faults := command.faults(config):
                    raise ConfigError(faults)
                value = command.job(config, folder, status)
        except BaseException as error:
            code, state = ending(error)
            if not (isinstance(error, InputError) and status.withdraw()):
                status.end(state, code, error=str(error) or type(error).__name__)
            log.info("it ended: %s", state, exc_info=error)
            print(farewell(error, None if temporary else folder, command), file=sys.stderr)
            codes.append(code)
            if isinstance(error, InterruptedRun):
                sys.exit(code)
            return None
        status.end("FINISHED", 0)
        return value

    return run


def farewell(error: BaseException, folder: Path | None, command: Command) -> str:
    """What an end is said to be, and what can be done about it; without a folder, the traceback of a crash."""
    if isinstance(error, InterruptedRun):
        return f"{error}\n{command.advice(folder)}" if folder else str(error)
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
