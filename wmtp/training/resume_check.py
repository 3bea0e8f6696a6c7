"""Check that a run can be resumed, with the same settings as before except for those that `resume_override` names."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch.optim import Optimizer

from wmtp.config.schema import ConfigIssue
from wmtp.data.contents import content_changes, recorded_contents
from wmtp.data.dataset import Dataset
from wmtp.errors import InputError
from wmtp.models.mtp import MtpModel
from wmtp.objectives.base import Objective
from wmtp.runtime.run_dir import SAVED_OVERRIDES, is_running
from wmtp.training.plan import Plan

SETTINGS = "objective settings"
"""The entry of the settings of an algorithm. Checkpoints of earlier versions do not have it."""
OVERRIDABLE = ("data", "micro_batch_size", "objective", "optimizer", "seed")
"""Settings that `resume_override` may name.

If any other setting changed, the tensors or the position in the checkpoint would be invalid.
"""


def resume_issues(config: DictConfig) -> Iterator[ConfigIssue]:
    """Yield an issue if the run cannot be resumed."""
    try:
        problem = resume_problem(Path(config.resume))
    except InputError as error:
        problem = str(error)
    if problem:
        yield ConfigIssue("resume", str(config.resume), problem)


def resume_problem(folder: Path) -> str | None:
    """Return the reason why the run in a folder cannot be resumed, or None if it can be resumed."""
    if not (folder / SAVED_OVERRIDES).exists():
        return f"is not a run's folder: it has no {SAVED_OVERRIDES}"
    return "the run is still running; wait for its end or stop it" if is_running(folder) else None


def training_identity(
    data: Dataset, objective: Objective, plan: Plan, model: MtpModel, optimizer: Optimizer
) -> dict[str, Any]:
    """Return the settings that must be the same when a run is resumed, as plain JSON values.

    They determine the order of the samples and the result of each update.
    """
    return {
        "data": data.fingerprint,
        "tokenizer": data.tokenizer.fingerprint,
        "objective": objective.name,
        SETTINGS: dict(objective.settings),
        "seed": data.seed,
        "batch_size": plan.batch_size,
        "micro_batch_size": plan.micro_batch_size,
        "updates_per_epoch": plan.updates_per_epoch,
        "model": model.architecture.settings
        | {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        "base": model.base_fingerprint,
        "optimizer": {
            "type": type(optimizer).__name__,
            # JSON has lists where torch has tuples
            **{key: list(v) if isinstance(v, tuple) else v for key, v in optimizer.defaults.items()},
        },
    }


def require_same_contents(folder: Path, data: Dataset, declared: Sequence[str]) -> None:
    """Check that the data have the contents that the run in a folder has used.

    Unlike the fingerprint of the data, the contents include the test split. A run of an earlier version does not record
    them; then they are not checked.

    Raises:
        InputError: the contents differ, and `declared` does not contain "data".
    """
    changes = content_changes(recorded_contents(folder) or data.contents, data.contents)
    if changes and "data" not in declared:
        lines = ["The run cannot be resumed, because its data have changed:", *(f"  data: {line}" for line in changes)]
        raise InputError("\n".join([*lines, "Restore them, or allow the change: resume_override=[data]"]))


def declared_changes(before: dict[str, Any], now: dict[str, Any], declared: Sequence[str]) -> dict[str, str]:
    """Return the settings that have changed, each with a description of the change.

    Args:
        before: the settings in the checkpoint, from `training_identity`.
        now: the settings of the resumed run.
        declared: the names of the settings that are allowed to change.

    Raises:
        InputError: a setting that is not in `declared` has changed.
    """
    changed = {name: describe_change(old, now[name]) for name, old in before.items() if now.get(name) != old}
    undeclared = {name: "objective" if name == SETTINGS else name for name in changed}  # with the value that allows it
    undeclared = {name: allowed for name, allowed in undeclared.items() if allowed not in declared}
    if undeclared:
        lines = ["The run cannot be resumed, because settings that must stay the same have changed:"]
        lines += [f"  {name}: {changed[name]}" for name in undeclared]
        if all(allowed in OVERRIDABLE for allowed in undeclared.values()):
            options = ",".join(dict.fromkeys(undeclared.values()))
            lines.append(f"Set them back, or allow the change: resume_override=[{options}]")
        raise InputError("\n".join(lines))
    return changed


def describe_change(old: object, new: object) -> str:
    """Return a description of a changed setting as one line.

    If both values are dictionaries, the line contains the number of entries that differ, and the first such entry.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        return f"{len(keys)} entries differ, the first is {keys[0]}: was {old.get(keys[0])}, is now {new.get(keys[0])}"
    return f"was {old}, is now {new}"
