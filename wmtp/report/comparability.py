"""Checks that runs use the same data and tokenizer, and that a metric has the same meaning in all of them."""

from collections.abc import Sequence
from typing import Any

from wmtp.config.flatten import flatten
from wmtp.errors import InputError
from wmtp.report.metrics import is_lower_better
from wmtp.report.run_record import RunRecord

SHARED_DATA = {
    "train_fingerprint": ("training data", "data."),
    "validation_fingerprint": ("validation set", "data."),
    "test_fingerprint": ("test set", "data."),
    "tokenizer": ("tokenizer", "model.tokenizer."),
}
"""Fields of provenance.json that must be equal in all compared runs.

Each field is mapped to its name in error messages and to the prefix of the config keys that determine it.
"""
MEANS_OVER_HEADS = ("val/loss", "val/mtp_loss")
SINGLE_HEAD = "val/head_1_loss"
ABSENT = "-"


def require_same_data(runs: Sequence[RunRecord]) -> list[str]:
    """Check that all runs use the same data and tokenizer.

    Returns:
        A note for each check that is not possible, because a run does not record its data or its tokenizer.

    Raises:
        InputError: two runs differ in the training data, the validation set or the tokenizer.
    """
    data_by_run = {run: dict(run.provenance.get("data", {})) for run in runs}
    problems, notes = [], []
    for key, (name, prefix) in SHARED_DATA.items():
        known = [run for run in runs if data_by_run[run].get(key) is not None]
        if unrecorded := [run for run in runs if run not in known]:
            notes.append(f"cannot check that all runs use the same {name}: {unrecorded[0].folder} does not record it")
        first = known[0] if known else None
        other = next((run for run in known if data_by_run[run][key] != data_by_run[known[0]][key]), None)
        if first is not None and other is not None:
            problems.append(f"  {name} differs between {first.folder} and {other.folder}:")
            problems += config_differences(first, other, prefix)
    if problems:
        raise InputError("\n".join([
            "The runs use different data, so a difference between them does not measure the method.",
            *problems,
            "  Compare only runs that use the same data, or train again with equal values for the keys above.",
        ]))  # fmt: skip
    return notes


def config_differences(one: RunRecord, other: RunRecord, prefix: str) -> list[str]:
    """Return lines that list the config keys with the given prefix whose values differ between two runs.

    If the two runs have the same values for all of these keys, the result is a single line. It says that the contents
    of the files that the config names must have changed between the two runs.
    """
    before, after = (
        {key: value for key, value in flatten(run.config).items() if key.startswith(prefix)} for run in (one, other)
    )
    keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    lines = [f"    {key}: {before.get(key, ABSENT)} and {after.get(key, ABSENT)}" for key in keys]
    return lines or [
        f"    the configs are equal below {prefix[:-1]}, so the files that they refer to must have changed"
    ]


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
