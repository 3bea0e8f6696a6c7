"""From what was typed to overrides that Hydra takes: plainer spellings, any text, those of a run to be resumed."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf

from wmtp.config.groups import is_group
from wmtp.config.schema import CONFIG_FOLDER, Fault
from wmtp.runtime.run_dir import ACCEPTED

NOT_SAVED = ("resume", "resume_override", "dry_run")
"""Overrides that belong to one start of a run, not to the run."""
TEXT, ANY_BYTES = "text", "surrogateescape"
OmegaConf.register_new_resolver(TEXT, lambda code: bytes.fromhex(code[1:]).decode(errors=ANY_BYTES), replace=True)


def quoted(value: object) -> str:
    """A value as an override that Hydra's grammar reads back unchanged."""
    escaped = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def named_folder(overrides: list[str]) -> Path | None:
    """The folder that the user chose, if one was."""
    named = [o.partition("=")[2].strip("'\"") for o in overrides if o.startswith("hydra.run.dir=")]
    return Path(named[-1]) if named else None


def plain(argument: str, texts: Collection[str], short: Mapping[str, str]) -> str:
    """An argument as Hydra wants it: a `short` key in full, and the value of one of the `texts` in a code."""
    key, equals, value = argument.partition("=")
    if not equals:
        return argument
    if key in texts and value:
        code = value.encode(errors=ANY_BYTES).hex()  # no character of it means anything to Hydra
        value = f"${{{TEXT}:x{code}}}"
    return grouped(f"{short.get(key, key)}={value}")


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
