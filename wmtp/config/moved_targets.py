"""Values of `_target_` and config keys of earlier versions, and their current names."""

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
S3_STORE, S3_SETTINGS = "wmtp.s3.store.RemoteCheckpointStore", "wmtp.s3.options.S3Settings"
MOVED_TO_S3 = {
    "remote": "url",
    "endpoint_url": "endpoint_url",
    "addressing_style": "addressing_style",
    "checksums": "checksums",
    "stall_seconds": "stall_seconds",
    "close_seconds": "close_seconds",
}
"""Keys that were in the node of the class `S3_STORE`, and their names in its node `s3`."""
PRETRAINED_TOKENIZERS = (
    "wmtp.data.tokenizer.pretrained_tokenizer",
    "wmtp.models.huggingface.smollm2.smollm2_tokenizer",
)
FIRST_TOKEN = "add_bos_token"
"""Key of the tokenizers above. Earlier versions had no such key, and added no token before a prompt."""
ADDED_KEYS: dict[str, dict[str, Any]] = {
    "wmtp.data.sources.FileSource": {"select_validation": True},
    "wmtp.data.sources.TaskSource": {
        "select_validation": True,
        "noise_kinds": ["footer"],
        "noise_lines": 4,
        "wrong_variants": 1,
    },
    "wmtp.training.stages.ValueStage": {"value": "state"},
    **{target: {FIRST_TOKEN: False} for target in PRETRAINED_TOKENIZERS},
}
"""Keys that nodes of earlier versions do not have, by target, with the values that make them do the same as before."""
MOVED_KEYS = {f"checkpoint.{old}": f"checkpoint.s3.{new}" for old, new in MOVED_TO_S3.items()}


def current_target(target: str) -> str:
    """Return the current path of a target that may have had another path in an earlier version."""
    return MOVED_TARGETS.get(target, target)


def current_key(key: str) -> str:
    """Return the current name of a dotted key. The key may be that of stage 1, as in `pretrain.checkpoint.remote`."""
    prefix = "pretrain." if key.startswith("pretrain.") else ""
    name = key.removeprefix(prefix)
    return prefix + MOVED_KEYS.get(name, name)


def current_override(text: str) -> str:
    """Return a saved override with the current name of its key. The value and a prefix such as `++` are not changed."""
    key, equals, value = text.partition("=")
    name = key.lstrip("+~")
    return f"{key.removesuffix(name)}{current_key(name)}{equals}{value}"


def update_config(value: Any) -> Any:
    """Return a copy of nested dictionaries and lists of an earlier version, with the current targets and keys."""
    if isinstance(value, list):
        return [update_config(item) for item in value]
    if not isinstance(value, dict):
        return value
    node = {key: update_config(item) for key, item in value.items()}
    if isinstance(node.get("_target_"), str):
        node["_target_"] = current_target(node["_target_"])
        node = ADDED_KEYS.get(node["_target_"], {}) | node
    moved = {MOVED_TO_S3[key]: item for key, item in node.items() if key in MOVED_TO_S3}
    if node.get("_target_") != S3_STORE or not moved:
        return node
    kept = {key: item for key, item in node.items() if key not in MOVED_TO_S3}
    return {"s3": {"_target_": S3_SETTINGS} | moved, **kept}
