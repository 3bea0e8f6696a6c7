"""The classes and functions that a config may name with `_target_`, and the places where it may name them."""

import importlib
import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

from wmtp.config.moved_targets import current_target

ALLOWED_TARGETS = ("wmtp.", "torch.optim.")
GROUP_KINDS = {
    "algo": "wmtp.algorithms.base.Algorithm",
    "checkpoint": "wmtp.checkpoint.store.CheckpointStore",
    "data": "wmtp.data.sources.DataSource",
    "early_stopping": "wmtp.training.early_stopping.EarlyStopping",
    "evaluation": "wmtp.evaluation.settings.Evaluation",
    "generation": "wmtp.generation.settings.Decoding",
    "hardware": "wmtp.distributed.device.Hardware",
    "model": "wmtp.models.source.ModelSource",
    "optimizer": "torch.optim.Optimizer",
    "pretrain": "wmtp.training.stages.Stage",
    "scheduler": "torch.optim.lr_scheduler.LRScheduler",
    "objective": "wmtp.objectives.mtp.MtpObjective",
    "sweep": "wmtp.sweep.grid.SweepOptions",
    "tracking": "wmtp.tracking.mlflow.MlflowTracker",
}
"""Path of the base class of the object that each top-level node of a config describes."""


def locate(target: str, kind: type | None = None) -> Callable[..., Any]:
    """Return the class or function at the path `target`, which may be a path from an earlier version.

    Only what the named module or a module below it defines is found, not what it imports. Of torch, only optimizers and
    schedulers are found.

    Raises:
        ValueError: the path is not allowed, no class or function can be imported from it, or it is neither a subclass
            of `kind` nor a function that returns an object of this class.
    """
    target = current_target(target)
    if not target.startswith(ALLOWED_TARGETS):
        raise ValueError(f"a target must begin with one of {', '.join(ALLOWED_TARGETS)}")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot be imported: {error}") from error
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        raise ValueError("is not a class or function")
    if not f"{found.__module__}.".startswith(f"{module}."):
        raise ValueError(f"is defined in {found.__module__}, not in {module}")
    made = found if inspect.isclass(found) else typing.get_type_hints(found).get("return")
    bases = inspect.getmro(made) if inspect.isclass(made) else ()
    if module.startswith("torch.") and not {"Optimizer", "LRScheduler"}.intersection(base.__name__ for base in bases):
        raise ValueError("is neither an optimizer nor a scheduler of torch")
    if kind is not None and kind not in bases:
        raise ValueError(f"has the wrong class; one of the kind {kind.__name__} belongs here")
    return typing.cast(Callable[..., Any], found)


def parameter_kinds(target: Callable[..., Any]) -> dict[str, type]:
    """Return the parameters of a class or function that take an object of wmtp, each with the class of this object."""
    hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target, include_extras=True)
    return {name: kind for name, hint in hints.items() if (kind := kind_of(hint)) is not None and name != "return"}


def kind_of(annotation: Any) -> type | None:
    """Return the class of wmtp whose objects a parameter takes, or None if the parameter takes plain values.

    >>> kind_of(int | None) is None
    True
    """
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated)
    for each in typing.get_args(annotation) if is_union else (annotation,):
        if inspect.isclass(each) and each.__module__.startswith("wmtp."):
            return each
    return None


def group_kind(group: str) -> type | None:
    """Return the base class of the object that a top-level node of a config describes. If it has none, return None."""
    module, _, name = GROUP_KINDS.get(group, "").rpartition(".")
    kind: type | None = getattr(importlib.import_module(module), name) if module else None
    return kind
