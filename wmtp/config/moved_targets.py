"""Paths of `_target_` values in earlier versions, and the current paths of the same targets."""

from typing import Any

MOVED_TARGETS = {
    "wmtp.checkpoint.store.RemoteCheckpointStore": "wmtp.s3.store.RemoteCheckpointStore",
    "wmtp.data.tokenization.pretrained_tokenizer": "wmtp.data.tokenizer.pretrained_tokenizer",
    "wmtp.data.tokenization.task_tokenizer": "wmtp.data.tokenizer.task_tokenizer",
    "wmtp.early_stopping.EarlyStopping": "wmtp.training.early_stopping.EarlyStopping",
    "wmtp.optimization.constant": "wmtp.training.optim.constant",
    "wmtp.optimization.cosine": "wmtp.training.optim.cosine",
    "wmtp.optimization.linear": "wmtp.training.optim.linear",
    "wmtp.report.comparison.CompareOptions": "wmtp.report.results.CompareOptions",
    "wmtp.runtime.hardware.Hardware": "wmtp.distributed.device.Hardware",
    "wmtp.stages.ReferenceStage": "wmtp.training.stages.ReferenceStage",
    "wmtp.stages.ValueStage": "wmtp.training.stages.ValueStage",
    "wmtp.sweep.options.SweepOptions": "wmtp.sweep.grid.SweepOptions",
    "wmtp.trainer.Trainer": "wmtp.training.trainer.Trainer",
}


def current_target(target: str) -> str:
    """Return the current path of a target that may have had another path in an earlier version."""
    return MOVED_TARGETS.get(target, target)


def update_targets(value: Any) -> Any:
    """Return a copy of nested dictionaries and lists in which every `_target_` has its current path."""
    if isinstance(value, dict):
        return {
            key: current_target(item) if key == "_target_" and isinstance(item, str) else update_targets(item)
            for key, item in value.items()
        }
    return [update_targets(item) for item in value] if isinstance(value, list) else value
