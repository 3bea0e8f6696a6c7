"""From a command line to a job in a run's folder: overrides, checks, Hydra, status and exit code."""

import json
import logging
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from wmtp.config import CONFIG_FOLDER, ConfigError, Fault, did_you_mean
from wmtp.errors import InputError, InterruptedRun, PendingError, WmtpError
from wmtp.runtime.folder import ACCEPTED, RunStatus, create_run_folder, typed
from wmtp.runtime.signals import raised_signals

log = logging.getLogger(__name__)
Job = Callable[[DictConfig, Path, RunStatus], float | None]
NOT_SAVED = ("resume", "dry_run")
"""Overrides that belong to one start of a run, not to the run."""


def main(config_name: str, job: Job) -> None:
    """Run a command: check its overrides, choose its folder, hand over to Hydra, exit with the job's code."""
    arguments = [grouped(argument) for argument in sys.argv[1:]]
    temporary: Path | None = None
    codes: list[int] = []
    try:
        if any(argument.startswith("-") for argument in arguments):  # --help, --cfg, -m: Hydra's own
            sweep = [a for a in arguments if a in ("-m", "--multirun")]  # its parser wants this before the overrides
            overrides = sweep + [forced(a) for a in arguments if a not in sweep]
            if sweep and not any(a.startswith("hydra.sweep.dir=") for a in arguments):
                overrides.append(f"hydra.sweep.dir={quoted(create_run_folder(suffix='-sweep'))}")
        else:
            overrides, config = checked_overrides(config_name, arguments)
            if config.dry_run:
                temporary = Path(tempfile.mkdtemp(prefix="wmtp-dry-run-"))
                overrides += [f"hydra.run.dir={temporary}", f"++cache_dir={temporary / 'cache'}"]
            else:
                overrides.append(f"hydra.run.dir={quoted(run_folder(config, overrides))}")
        sys.argv = [sys.argv[0], *overrides]
        recorded = _recorded(job, codes)
        hydra.main(version_base="1.3", config_path=str(CONFIG_FOLDER), config_name=config_name)(recorded)()
    except WmtpError as error:
        print(error, file=sys.stderr)
        codes.append(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted before the run began", file=sys.stderr)
        codes.append(128 + signal.SIGINT)
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    sys.exit(max(codes, default=0))


def quoted(value: object) -> str:
    """A value as an override that Hydra's grammar reads back unchanged."""
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def run_folder(config: DictConfig, overrides: list[str]) -> Path:
    """The folder of the run: that of the run to resume, the one the user named, or a new one.

    Raises:
        ConfigError: the named folder belongs to a run already.
    """
    named = next((o.partition("=")[2].strip("'\"") for o in overrides if o.startswith("hydra.run.dir=")), None)
    if config.resume is not None:
        if named is not None:
            raise ConfigError([Fault("hydra.run.dir", named, "a resumed run goes on in its own folder")])
        return Path(config.resume)
    if named is None:
        return create_run_folder()
    if (Path(named) / "status.json").exists():
        problem = f"holds a run already; go on with it (resume={named}) or name another folder"
        raise ConfigError([Fault("hydra.run.dir", named, problem)])
    return Path(named)


def is_group(key: str) -> bool:
    """Whether a key chooses a config group's option rather than setting a value."""
    return bool(key) and (CONFIG_FOLDER / key).is_dir()


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


def checked_overrides(config_name: str, arguments: list[str]) -> tuple[list[str], DictConfig]:
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
            config = hydra.compose(config_name, chosen)
    except (HydraException, OmegaConfBaseException) as error:
        faults.append(Fault("config", "", " ".join(str(error).split())))
    else:
        from wmtp.checks import config_faults  # imports torch

        faults += config_faults(config)
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


def _recorded(job: Job, codes: list[int]) -> Callable[[DictConfig], float | None]:
    """The job for Hydra: its outcome goes to status.json and `codes`, its traceback to the log file."""

    def run(config: DictConfig) -> float | None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        if config.resume is None and (folder / "status.json").exists():
            print(f"{folder} holds a run already; name another hydra.sweep.dir", file=sys.stderr)
            codes.append(InputError.exit_code)
            return None
        status = RunStatus(folder)
        try:
            with raised_signals():
                value = job(config, folder, status)
        except BaseException as error:
            code, state = ending(error)
            if isinstance(error, InputError) and config.resume is not None:
                status.withdraw()
            else:
                status.end(state, code, error=str(error) or type(error).__name__)
            log.info("the run ended: %s", state, exc_info=error)
            print(farewell(error, folder), file=sys.stderr)
            codes.append(code)
            if isinstance(error, InterruptedRun):
                sys.exit(code)
            return None
        status.end("FINISHED", 0)
        return value

    return run


def farewell(error: BaseException, folder: Path) -> str:
    """What a run's end is said to be, and what can be done about it."""
    if isinstance(error, InterruptedRun):
        resumable = any(folder.glob("**/step_*/manifest.json"))
        return f"{error}\n" + (f"Go on with resume={typed(folder)}" if resumable else "Nothing was saved; start anew.")
    kind = "" if isinstance(error, WmtpError) else f"{type(error).__name__}: "
    return f"{kind}{error}\nThe traceback is in {folder / 'train.log'}."


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code and the recorded state of a run that an exception ended."""
    if isinstance(error, InterruptedRun):
        return error.exit_code, "KILLED"
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, "KILLED"
    if isinstance(error, PendingError):
        return error.exit_code, "FINISHED"
    return error.exit_code if isinstance(error, WmtpError) else 1, "FAILED"
