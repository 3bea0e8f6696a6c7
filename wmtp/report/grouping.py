"""Groups of runs whose configs differ only in the seed, and their labels."""

from collections.abc import Sequence
from typing import Any

from wmtp.config.flatten import flatten
from wmtp.report.run_record import RunRecord

IGNORED_KEYS = (
    "seed", "algo.seed", "run_name", "tags", "resume", "resume_override", "dry_run", "cache_dir", "tracking",
    "checkpoint", "sweep", "report", "num_validation_samples", "num_samples", "sandbox", "log_interval",
    "save_interval", "pretrain.reuse", "hardware", "data.path",
)  # fmt: skip
"""Config keys that do not distinguish groups: the seed, paths, tracking, and additional measurements."""


def group_runs(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Return the runs by group label, in the order of the first run of each group.

    A label consists of the keys that distinguish the groups, without keys that follow from earlier ones: first `algo`
    (without its name), then options of other config groups, then values.
    """
    settings = [distinguishing_settings(run) for run in runs]
    keys = _varying_keys(settings)
    groups: dict[str, list[RunRecord]] = {}
    for run, setting in zip(runs, settings, strict=True):
        groups.setdefault(_label(setting, keys, settings), []).append(run)
    return groups


def distinguishing_settings(run: RunRecord) -> dict[str, str]:
    """Return all settings that can distinguish a run: chosen options as `group=`, and non-null config values."""
    chosen = {
        f"{group}=": option
        for group, option in run.choices.items()
        if _is_relevant(group) and "@" not in group and run.config.get(group) is not None
    }
    values = flatten(run.config).items()
    return chosen | {key: _format_value(value) for key, value in values if _is_relevant(key) and value is not None}


def _format_value(value: Any) -> str:
    """Return a value as it appears in labels; equal numbers look the same.

    >>> _format_value(1), _format_value(1.0), _format_value(True), _format_value(3e-3)
    ('1', '1', 'true', '0.003')
    """
    if isinstance(value, bool):
        return str(value).lower()
    return repr(float(value)).removesuffix(".0") if isinstance(value, int | float) else str(value)


def _is_relevant(key: str) -> bool:
    ignored = key.startswith(("hydra", "experiment")) or any(
        key == name or key.startswith(f"{name}.") for name in IGNORED_KEYS
    )
    return not ignored


def _varying_keys(settings: Sequence[dict[str, str]]) -> list[str]:
    """Return the keys whose values differ: `algo` first, then other options, then config values in their order."""
    keys = dict.fromkeys(key for setting in settings for key in setting)
    varying = [key for key in keys if len({setting.get(key) for setting in settings}) > 1]
    return sorted(varying, key=lambda key: (key != "algo=", not key.endswith("="), "_target_" in key))


def _label(setting: dict[str, str], keys: Sequence[str], settings: Sequence[dict[str, str]]) -> str:
    parts, missing, matching = [], [], list(settings)
    for key in keys:
        value, name = setting.get(key), key.removesuffix("=")
        if len({other.get(key) for other in matching}) > 1:
            parts += [] if value is None else [f"{name}={value}".removeprefix("algo=")]
            missing += [f"no {name}"] if value is None else []
        matching = [other for other in matching if other.get(key) == value]
    return ", ".join(parts or missing) or "all"
