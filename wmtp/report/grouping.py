"""Runs that differ in nothing but their seed belong together; a group is called by what sets it apart."""

from collections.abc import Sequence
from typing import Any

from wmtp.config.flatten import flat
from wmtp.report.run_record import RunRecord

WITHOUT_EFFECT = (
    "seed", "algo.seed", "run_name", "tags", "resume", "resume_override", "dry_run", "cache_dir", "tracking",
    "checkpoint", "sweep", "report", "num_validation_samples", "num_samples", "sandbox", "log_interval",
    "save_interval", "pretrain.reuse", "hardware", "data.path",
)  # fmt: skip
"""Keys that say where a run is, whom it tells, what else is measured, or which of several alike it is."""


def grouped(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """The runs by the label of their group, in the order of the first of each.

    A label names the keys that tell the groups apart, but for those that follow from the ones before: `algo` first
    (without its name), then other options of config groups, then values.
    """
    settings = [differing(run) for run in runs]
    keys = _candidates(settings)
    groups: dict[str, list[RunRecord]] = {}
    for run, setting in zip(runs, settings, strict=True):
        groups.setdefault(_label(setting, keys, settings), []).append(run)
    return groups


def differing(run: RunRecord) -> dict[str, str]:
    """What can set a run apart: its chosen options, under `group=`, and its config's values, but for nulls."""
    chosen = {
        f"{group}=": option
        for group, option in run.choices.items()
        if _counts(group) and "@" not in group and run.config.get(group) is not None
    }
    values = flat(run.config).items()
    return chosen | {key: _word(value) for key, value in values if _counts(key) and value is not None}


def _word(value: Any) -> str:
    """A value as it stands in labels; numbers that are equal look alike.

    >>> _word(1), _word(1.0), _word(True), _word(3e-3)
    ('1', '1', 'true', '0.003')
    """
    if isinstance(value, bool):
        return str(value).lower()
    return repr(float(value)).removesuffix(".0") if isinstance(value, int | float) else str(value)


def _counts(key: str) -> bool:
    apart = key.startswith(("hydra", "experiment")) or any(
        key == name or key.startswith(f"{name}.") for name in WITHOUT_EFFECT
    )
    return not apart


def _candidates(settings: Sequence[dict[str, str]]) -> list[str]:
    """Keys whose values differ: `algo` first, then other options, then values as the config has them."""
    keys = dict.fromkeys(key for setting in settings for key in setting)
    varying = [key for key in keys if len({setting.get(key) for setting in settings}) > 1]
    return sorted(varying, key=lambda key: (key != "algo=", not key.endswith("="), "_target_" in key))


def _label(setting: dict[str, str], keys: Sequence[str], settings: Sequence[dict[str, str]]) -> str:
    parts, missing, alike = [], [], list(settings)
    for key in keys:
        value, name = setting.get(key), key.removesuffix("=")
        if len({other.get(key) for other in alike}) > 1:
            parts += [] if value is None else [f"{name}={value}".removeprefix("algo=")]
            missing += [f"no {name}"] if value is None else []
        alike = [other for other in alike if other.get(key) == value]
    return ", ".join(parts or missing) or "all"
