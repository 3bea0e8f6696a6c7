"""Check that a resumed run continues with the same settings, except those named by `resume_override`."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from wmtp.data.dataset import Dataset
from wmtp.errors import InputError
from wmtp.models.mtp import MtpModel
from wmtp.objectives.base import Objective
from wmtp.training.plan import Plan

OVERRIDABLE = ("data", "micro_batch_size", "objective", "optimizer", "seed")
"""Settings that `resume_override` may name. With any other change, the saved tensors or position would be invalid."""


def training_identity(
    data: Dataset, objective: Objective, plan: Plan, model: MtpModel, optimizer: Optimizer
) -> dict[str, Any]:
    """Return the settings that determine the order of the samples and the training on them, as plain JSON values."""
    return {
        "data": data.fingerprint,
        "tokenizer": data.tokenizer.fingerprint,
        "objective": objective.name,
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


def declared_changes(before: dict[str, Any], now: dict[str, Any], declared: Sequence[str]) -> dict[str, str]:
    """Return the declared settings that have changed, each with a description of the change.

    Args:
        before: the settings in the checkpoint, from `training_identity`.
        now: the settings of the resumed run.
        declared: names of settings that may have changed.

    Raises:
        InputError: a setting that is not declared has changed.
    """
    changed = {name: describe_change(old, now[name]) for name, old in before.items() if now.get(name) != old}
    undeclared = [name for name in changed if name not in declared]
    if undeclared:
        lines = ["The run cannot be resumed, because settings that must stay the same have changed:"]
        lines += [f"  {name}: {changed[name]}" for name in undeclared]
        if all(name in OVERRIDABLE for name in undeclared):
            lines.append(f"Set them back, or allow the change: resume_override=[{','.join(undeclared)}]")
        raise InputError("\n".join(lines))
    return changed


def describe_change(old: object, new: object) -> str:
    """Return a line that describes a changed setting; of two dictionaries, only the first difference."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        return f"{len(keys)} entries differ, the first is {keys[0]}: was {old.get(keys[0])}, is now {new.get(keys[0])}"
    return f"was {old}, is now {new}"
