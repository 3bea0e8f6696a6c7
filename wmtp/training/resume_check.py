"""What a resumed run must share with the run that it goes on with, and what may be declared to have changed."""

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from wmtp.data.dataset import Dataset
from wmtp.errors import InputError
from wmtp.models.mtp import MtpModel
from wmtp.objectives.base import Objective
from wmtp.training.plan import Plan

DECLARABLE = ("data", "micro_batch_size", "objective", "optimizer", "seed")
"""What `resume_override` may name. Of the rest a checkpoint's tensors or its position have no meaning any more."""


def identity(data: Dataset, objective: Objective, plan: Plan, model: MtpModel, optimizer: Optimizer) -> dict[str, Any]:
    """What decides which sample comes when, and what is done with it."""
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
    """What changed and was declared to, in words.

    Raises:
        InputError: something else changed.
    """
    changed = {name: difference(old, now[name]) for name, old in before.items() if now.get(name) != old}
    undeclared = [name for name in changed if name not in declared]
    if undeclared:
        lines = ["The run cannot be resumed, for what must stay the same has changed:"]
        lines += [f"  {name}: {changed[name]}" for name in undeclared]
        if all(name in DECLARABLE for name in undeclared):
            lines.append(f"Set it back, or declare that it is meant: resume_override=[{','.join(undeclared)}]")
        raise InputError("\n".join(lines))
    return changed


def difference(old: object, new: object) -> str:
    """What changed, short enough for a line."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        return f"{len(keys)} entries differ, the first is {keys[0]}: was {old.get(keys[0])}, is now {new.get(keys[0])}"
    return f"was {old}, is now {new}"
