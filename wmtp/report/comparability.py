"""What runs must share for a difference between them to say anything of what sets them apart."""

from collections.abc import Sequence
from typing import Any

from wmtp.config.flatten import flat
from wmtp.errors import InputError
from wmtp.report.metrics import is_lower_better
from wmtp.report.run_record import RunRecord

SHARED = {
    "train_fingerprint": ("training data", "data."),
    "validation_fingerprint": ("validation set", "data."),
    "tokenizer": ("tokenizer", "model.tokenizer."),
}
"""What provenance.json says of a run's data, what that is called, and where in the config it is decided."""
MEANS_OVER_HEADS = ("val/loss", "val/mtp_loss")
SINGLE_HEAD = "val/head_1_loss"
ABSENT = "-"


def require_same_data(runs: Sequence[RunRecord]) -> list[str]:
    """Notes on runs that do not say what they were trained on, of which nothing can be checked.

    Raises:
        InputError: training data, validation set or tokenizer of two runs differ.
    """
    described = {run: dict(run.provenance.get("data", {})) for run in runs}
    problems, notes = [], []
    for key, (name, prefix) in SHARED.items():
        known = [run for run in runs if described[run].get(key) is not None]
        if silent := [run for run in runs if run not in known]:
            notes.append(f"whether the {name} is the same cannot be checked: {silent[0].folder} does not record it")
        first = known[0] if known else None
        other = next((run for run in known if described[run][key] != described[known[0]][key]), None)
        if first is not None and other is not None:
            problems.append(f"  {name} of {first.folder} and {other.folder}:")
            problems += difference(first, other, prefix)
    if problems:
        raise InputError("\n".join([
            "These runs did not learn and validate on the same, so a difference between them says nothing of a method.",
            *problems,
            "  Name only runs that share them, or train again with the values above alike for all runs.",
        ]))  # fmt: skip
    return notes


def difference(one: RunRecord, other: RunRecord, prefix: str) -> list[str]:
    """Lines on the config's keys below a prefix in which two runs differ."""
    before, after = (
        {key: value for key, value in flat(run.config).items() if key.startswith(prefix)} for run in (one, other)
    )
    keys = [key for key in dict.fromkeys([*before, *after]) if before.get(key) != after.get(key)]
    lines = [f"    {key}: {before.get(key, ABSENT)} and {after.get(key, ABSENT)}" for key in keys]
    return lines or [f"    their configs agree below {prefix[:-1]}; the files that they name must have changed"]


def require_comparable(metric: str, runs: Sequence[RunRecord]) -> None:
    """Raises `InputError` where a metric is a mean over heads, and runs have different numbers of them."""
    heads = num_heads(runs)
    if metric in MEANS_OVER_HEADS and len(heads) > 1:
        (one, first), (other, second) = list(heads.items())[:2]
        raise InputError(
            f"metric={metric}: is a mean over heads, of which {first.folder} has {one} and {second.folder} has {other} "
            f"(model.num_heads); compare the next token's loss, metric={SINGLE_HEAD}"
        )


def common_loss(runs: Sequence[RunRecord], asked: str) -> str:
    """The asked metric if it is a loss that all runs' validations have, else a loss that means the same in them."""
    if asked.startswith("val/") and is_lower_better(asked) and all(run.series(asked) for run in runs):
        return asked
    return SINGLE_HEAD if len(num_heads(runs)) > 1 else MEANS_OVER_HEADS[0]


def num_heads(runs: Sequence[RunRecord]) -> dict[Any, RunRecord]:
    """The numbers of heads that there are, each with the first run that has so many."""
    found: dict[Any, RunRecord] = {}
    for run in runs:
        found.setdefault(run.config.get("model", {}).get("num_heads"), run)
    return found
