"""Checks that runs use the same data and tokenizer, and that a metric has the same meaning in all of them."""

from collections.abc import Sequence
from typing import Any

from wmtp.config.flatten import flatten
from wmtp.errors import InputError
from wmtp.report.metrics import is_lower_better
from wmtp.report.run_record import RunRecord

TRAINING_DATA = "train_fingerprint"
SHARED_DATA = {
    "validation_fingerprint": ("validation set", "data."),
    "test_fingerprint": ("test set", "data."),
    "tokenizer": ("tokenizer", "model.tokenizer."),
    TRAINING_DATA: ("training data", "data."),
}
"""Fields of provenance.json that are compared between runs.

Each field is mapped to its name in messages and to the prefix of the config keys that determine it.
"""
NOT_A_SETTING = "data.path"
"""Config key that does not distinguish groups. Files with other content are not a setting whose effect is measured."""
MEANS_OVER_HEADS = ("val/loss", "val/mtp_loss")
SINGLE_HEAD = "val/head_1_loss"
ABSENT = "-"


def require_same_data(runs: Sequence[RunRecord]) -> list[str]:
    """Check that all runs use the same held-out data and tokenizer, and that only settings change the training data.

    Returns:
        A note if the training data differ because of a setting, which is then a part of what the comparison measures,
        and a note for each check that is not possible, because a run does not record its data or its tokenizer.

    Raises:
        InputError: two runs differ in the validation set, the test set or the tokenizer, or their training data differ
            although no setting does, or although it is not known that the held-out data are equal.
    """
    data_by_run = {run: dict(run.provenance.get("data", {})) for run in runs}
    problems, notes = list[str](), list[str]()
    for key, (name, prefix) in SHARED_DATA.items():
        known = [run for run in runs if data_by_run[run].get(key) is not None]
        if unrecorded := [run for run in runs if run not in known]:
            notes.append(f"cannot check that all runs use the same {name}: {unrecorded[0].folder} does not record it")
        other = next((run for run in known if data_by_run[run][key] != data_by_run[known[0]][key]), None)
        if other is None:
            continue
        changes = config_changes(known[0], other, prefix)
        if key == TRAINING_DATA and changes.keys() - {NOT_A_SETTING} and not problems and not notes:
            notes.append(
                f"the training data differ ({format_changes(changes)}) and the held-out data do not: the comparison "
                "measures the effect of the training data as well"
            )
        else:
            problems.append(f"  {name} differs between {known[0].folder} and {other.folder}:")
            problems += [f"    {format_changes({each: changes[each]})}" for each in changes] or [
                f"    the configs are equal below {prefix[:-1]}, so the files that they refer to must have changed"
            ]
    if problems:
        raise InputError("\n".join([
            "The runs use different data, so a difference between them does not measure the method.",
            *problems,
            "  Compare only runs that use the same data, or train again with equal values for the keys above.",
        ]))  # fmt: skip
    return notes


def config_changes(one: RunRecord, other: RunRecord, prefix: str) -> dict[str, tuple[Any, Any]]:
    """Return the two values of each config key with the given prefix whose values differ between two runs."""
    before, after = (
        {key: value for key, value in flatten(run.config).items() if key.startswith(prefix)} for run in (one, other)
    )
    keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    return {key: (before.get(key, ABSENT), after.get(key, ABSENT)) for key in keys}


def format_changes(changes: dict[str, tuple[Any, Any]]) -> str:
    """Return the changed config keys with their two values as text.

    >>> format_changes({"data.correct_ratio": (0.5, 1.0)})
    'data.correct_ratio: 0.5 and 1.0'
    """
    return "; ".join(f"{key}: {before} and {after}" for key, (before, after) in changes.items())


def require_comparable(metric: str, runs: Sequence[RunRecord]) -> None:
    """Check that a metric has the same meaning in all runs.

    Raises:
        InputError: the metric is a mean over prediction heads, and the runs have different numbers of heads.
    """
    heads = runs_by_num_heads(runs)
    if metric in MEANS_OVER_HEADS and len(heads) > 1:
        (one, first), (other, second) = list(heads.items())[:2]
        raise InputError(
            f"metric={metric}: is a mean over heads, but model.num_heads is {one} in {first.folder} and {other} in "
            f"{second.folder}; compare the next-token loss instead: metric={SINGLE_HEAD}"
        )


def common_loss(runs: Sequence[RunRecord], metric: str) -> str:
    """Return the name of a validation loss that has the same meaning in all runs.

    The loss curves show this loss, and the tokens until a run reaches the baseline's best loss are counted by it. The
    result is `metric` if all runs recorded `metric` at validations and lower values of it are better. Otherwise, the
    result is `val/loss`, or the validation loss of the first head if the runs have different numbers of heads.
    """
    if metric.startswith("val/") and is_lower_better(metric) and all(run.series(metric) for run in runs):
        return metric
    return SINGLE_HEAD if len(runs_by_num_heads(runs)) > 1 else MEANS_OVER_HEADS[0]


def runs_by_num_heads(runs: Sequence[RunRecord]) -> dict[Any, RunRecord]:
    """Return a dictionary from each number of prediction heads to the first run with that many heads."""
    found: dict[Any, RunRecord] = {}
    for run in runs:
        found.setdefault(run.config.get("model", {}).get("num_heads"), run)
    return found
