"""Which records train: how many, how many of them correct, and of what difficulty."""

import random
import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

from wmtp.data.records import Record
from wmtp.errors import InputError

MAKE_WRONG = ", or make wrong ones of other tasks' solutions: data.mismatched=true"
BIN = re.compile(r"(\d+)(?:-(\d+))?")


def _is_bin(text: str) -> str:
    match = BIN.fullmatch(text)
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"{text!r} is no difficulty bin; write one like '2' or '3-5'")
    return text


DifficultyBins = dict[Annotated[str, AfterValidator(_is_bin)], Annotated[float, Field(ge=0)]]


@dataclass(frozen=True)
class Sampling:
    """A wish for a composition of records; None leaves a property as it is."""

    n_samples: int | None = None
    correct_ratio: float | None = None
    difficulty_bins: DifficultyBins | None = None
    seed: int = 0


def bin_of(record: Record, bins: DifficultyBins) -> str | None:
    """The difficulty bin that a record falls into, if any."""
    for name in bins:
        match = BIN.fullmatch(name)
        assert match
        if record.difficulty is not None and int(match[1]) <= record.difficulty <= int(match[2] or match[1]):
            return name
    return None


def shares_of(sampling: Sampling) -> dict[tuple[str | None, bool | None], float]:
    """The wished share of each cell (difficulty bin, is correct); they sum to 1."""
    bins: dict[str | None, float] = {None: 1.0}
    if sampling.difficulty_bins:
        bins = {name: weight for name, weight in sampling.difficulty_bins.items()}  # noqa: C416 - widens the key's type
    total = sum(bins.values())
    if total <= 0:
        raise InputError("data.difficulty_bins: at least one weight must be above 0")
    ratio = sampling.correct_ratio
    correct: dict[bool | None, float] = {None: 1.0} if ratio is None else {True: ratio, False: 1 - ratio}
    shares = {(bin_, c): weight / total * part for bin_, weight in bins.items() for c, part in correct.items()}
    return {cell: share for cell, share in shares.items() if share > 0}


def counts_for(shares: list[float], n: int) -> list[int]:
    """Whole numbers that sum to n, nearest to the shares (largest remainders)."""
    floors = [int(share * n + 1e-9) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: floors[i] - shares[i] * n)
    for i in by_remainder[: n - sum(floors)]:
        floors[i] += 1
    return floors


def with_mismatched(records: list[Record], seed: int) -> list[Record]:
    """The records, and behind each task that has only right solutions another task's solution as a wrong one.

    Raises:
        InputError: no task has a solution that is not this task's own, too.
    """
    own: dict[str, set[str]] = {}
    lacking: dict[str, Record] = {}
    for record in records:
        own.setdefault(record.task_id, set()).add(record.solution)
        lacking[record.task_id] = record
    for record in records:
        if not record.is_correct:
            lacking.pop(record.task_id, None)
    donors = [record for record in records if record.is_correct]
    random_ = random.Random(f"{seed}/mismatched")
    added: list[Record] = []
    for task, record in lacking.items():
        start = random_.randrange(len(donors))
        donor = next((d for d in (*donors[start:], *donors[:start]) if d.solution not in own[task]), None)
        if donor is None:
            raise InputError(f"data.mismatched: no other task has a solution that could be a wrong one of {task}")
        changes = {"solution": donor.solution, "is_correct": False, "decisive": (), "noise": ()}
        added.append(record.model_copy(update=changes))
    return [*records, *added]


def select(records: list[Record], sampling: Sampling) -> list[Record]:
    """Records of the wished composition, in their old order, drawn without replacement by `seed`.

    Without `n_samples`, as many as the composition allows.

    Raises:
        InputError: a wished part does not exist, or has fewer records than `n_samples` needs.
    """
    shares = shares_of(sampling)
    bins = sampling.difficulty_bins or {}
    cells: dict[tuple[str | None, bool | None], list[int]] = {cell: [] for cell in shares}
    for index, record in enumerate(records):
        cell = (bin_of(record, bins), None if sampling.correct_ratio is None else record.is_correct)
        if cell in cells and (cell[0] is not None or not bins):
            cells[cell].append(index)
    n = sampling.n_samples
    if n is None:
        n = min(int(len(cells[cell]) / share + 1e-9) for cell, share in shares.items())
        while n and any(c > len(m) for c, m in zip(counts_for(list(shares.values()), n), cells.values(), strict=True)):
            n -= 1
    chosen: list[int] = []
    random_ = random.Random(f"{sampling.seed}/sampling")
    for (bin_, correct), count in zip(shares, counts_for(list(shares.values()), n), strict=True):
        members = cells[bin_, correct]
        if count > len(members) or not members:
            kind = "" if correct is None else ("correct " if correct else "incorrect ")
            where = "" if bin_ is None else f" of difficulty {bin_}"
            raise InputError(
                f"data: {count or 'some'} {kind}records{where} are asked for, but there are {len(members)}; "
                "change data.n_samples, data.correct_ratio or data.difficulty_bins"
                f"{MAKE_WRONG if correct is False else ''}"
            )
        chosen += random_.sample(members, count)
    return [records[index] for index in sorted(chosen)]
