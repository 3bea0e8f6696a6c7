"""Assignment of runs to labeled groups. The configs of the runs in a group differ only in the seed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from wmtp.config.flatten import flatten
from wmtp.report.run_record import RunRecord

IGNORED_KEYS = (
    "seed", "order_seed", "algo.seed", "run_name", "tags", "resume", "resume_override", "dry_run", "cache_dir",
    "tracking", "checkpoint", "sweep", "report", "num_validation_samples", "num_validation_attempts", "num_samples",
    "sandbox", "log_interval", "save_interval", "pretrain.reuse", "hardware", "data.path",
)  # fmt: skip
"""Config keys whose values do not distinguish groups, such as the seed, paths, and settings of extra measurements."""


def group_runs(runs: Sequence[RunRecord]) -> dict[str, list[RunRecord]]:
    """Return a dictionary from the label of each group to its runs. Groups are ordered by their first run.

    A label lists the settings that distinguish a group from the others: first the chosen algorithm, then the chosen
    options of other config groups, then config values. A setting is omitted if it follows from the settings before it.
    """
    settings = [distinguishing_settings(run) for run in runs]
    keys = _varying_keys(settings)
    groups: dict[str, list[RunRecord]] = {}
    for run, setting in zip(runs, settings, strict=True):
        groups.setdefault(_label(setting, keys, settings), []).append(run)
    return groups


def group_with_failed(
    runs: Sequence[RunRecord], failed: Sequence[RunRecord], notes: list[str]
) -> tuple[dict[str, list[RunRecord]], dict[str, set[int]]]:
    """Return the groups of finished runs, and the seeds of the failed runs of each group.

    A note is added to `notes` for failed runs that belong to no group.
    """
    groups = group_runs(runs)
    labels = {run: label for label, group in groups.items() for run in group}
    seeds: dict[str, set[int]] = {}
    for name, members in group_runs([*runs, *failed]).items():
        lost = {run.seed for run in members if run not in labels}
        if label := next((labels[run] for run in members if run in labels), None):
            seeds[label] = lost
        else:
            notes.append(f"{name} is left out: {len(lost)} of {len(lost)} runs failed")
    return groups, seeds


def unequal_search_note(groups: Mapping[str, Sequence[RunRecord]]) -> str | None:
    """Return a note if some algorithms have more groups, which are settings of the algorithm, than others.

    The best of several settings looks better by chance, so every algorithm should have the same number of them.
    """
    counts = Counter(runs[0].choices.get("algo", label) for label, runs in groups.items() if runs)
    if len(set(counts.values())) < 2:
        return None
    parts = ", ".join(f"{algo} has {count}" for algo, count in counts.most_common())
    return (
        f"unequal search: of the compared settings, {parts}; the best of more settings looks better by chance, so give "
        "each method the same number of trials (python -m wmtp.study)"
    )


def distinguishing_settings(run: RunRecord) -> dict[str, str]:
    """Return all settings that can distinguish a run from others.

    The settings are the config values that are not null, and the chosen option of each config group. The key of a
    chosen option is the name of the config group with an equals sign, for example `algo=`.
    """
    chosen = {
        f"{group}=": option
        for group, option in run.choices.items()
        if _is_relevant(group) and "@" not in group and run.config.get(group) is not None
    }
    values = flatten(run.config).items()
    return chosen | {key: format_value(value) for key, value in values if _is_relevant(key) and value is not None}


def format_value(value: Any) -> str:
    """Return a config value as text for a label. Equal numbers give the same text.

    >>> format_value(1), format_value(1.0), format_value(True), format_value(3e-3)
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
    """Return the keys whose values differ between the settings of runs.

    The key of the algorithm is first, then the keys of other chosen options follow, then the keys of config values.
    """
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
