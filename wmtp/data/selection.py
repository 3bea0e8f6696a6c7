"""Selection of records by their number, by the ratio of correct records, and by difficulty."""

import random
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, Field

from wmtp.data.records import Record, Splits
from wmtp.errors import InputError

MISMATCHED_HINT = ", or add the solutions of other tasks as incorrect ones: data.mismatched=true"
BIN = re.compile(r"(\d+)(?:-(\d+))?")


def _check_bin(text: str) -> str:
    match = BIN.fullmatch(text)
    if not match or int(match[1]) > int(match[2] or match[1]):
        raise ValueError(f"{text!r} is not a difficulty bin; write one like '2' or '3-5'")
    return text


DifficultyBins = dict[Annotated[str, AfterValidator(_check_bin)], Annotated[float, Field(ge=0)]]
Category = tuple[str | None, bool | None]
"""A pair of a difficulty bin and of the correctness, which identifies a category of records.

If the bin is None, the category contains records of any difficulty. If the correctness is None, it contains both
correct and incorrect records.
"""


@dataclass(frozen=True)
class Selection:
    """The number of records to select, and their composition by correctness and difficulty.

    A setting that is None imposes no constraint. If `by_task` is true and the ratio of correct records is given, the
    correct and the incorrect records are drawn from the same tasks, as far as possible.
    """

    n_samples: int | None = None
    correct_ratio: float | None = None
    difficulty_bins: DifficultyBins | None = None
    seed: int = 0
    by_task: bool = False


def find_bin(record: Record, bins: DifficultyBins) -> str | None:
    """Return the name of the bin that contains the difficulty of a record; None if no bin contains it."""
    for name in bins:
        match = BIN.fullmatch(name)
        assert match
        if record.difficulty is not None and int(match[1]) <= record.difficulty <= int(match[2] or match[1]):
            return name
    return None


def target_shares(selection: Selection) -> dict[Category, float]:
    """Return the target share of each category of records. The shares sum to 1. Shares of 0 are left out.

    Raises:
        InputError: the weights of all bins are 0.
    """
    bins: dict[str | None, float] = {None: 1.0}
    if selection.difficulty_bins:
        bins = {name: weight for name, weight in selection.difficulty_bins.items()}  # noqa: C416 - widens the key's type
    total = sum(bins.values())
    if total <= 0:
        raise InputError("data.difficulty_bins: at least one weight must be greater than 0")
    ratio = selection.correct_ratio
    correct: dict[bool | None, float] = {None: 1.0} if ratio is None else {True: ratio, False: 1 - ratio}
    shares = {(bin_, c): weight / total * part for bin_, weight in bins.items() for c, part in correct.items()}
    return {category: share for category, share in shares.items() if share > 0}


def allocate_counts(shares: list[float], n: int) -> list[int]:
    """Divide `n` into integers that are as close as possible to the given shares (largest remainder method)."""
    floors = [int(share * n + 1e-9) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: floors[i] - shares[i] * n)
    for i in by_remainder[: n - sum(floors)]:
        floors[i] += 1
    return floors


def add_mismatched(records: list[Record], seed: int) -> list[Record]:
    """Add an incorrect solution to each task that has none, and return all records.

    The added solution is a correct solution to another task, which is drawn at random.

    Raises:
        InputError: a task has no incorrect solution, and every correct solution to another task is also a solution to
            this task.
    """
    solutions_of: dict[str, set[str]] = {}
    without_wrong: dict[str, Record] = {}
    for record in records:
        solutions_of.setdefault(record.task_id, set()).add(record.solution)
        without_wrong[record.task_id] = record
    for record in records:
        if not record.is_correct:
            without_wrong.pop(record.task_id, None)
    donors = [record for record in records if record.is_correct]
    random_ = random.Random(f"{seed}/mismatched")
    added: list[Record] = []
    for task, record in without_wrong.items():
        start = random_.randrange(len(donors))
        donor = next((d for d in (*donors[start:], *donors[:start]) if d.solution not in solutions_of[task]), None)
        if donor is None:
            raise InputError(f"data.mismatched: no other task has a solution that could be an incorrect one for {task}")
        changes = {"solution": donor.solution, "is_correct": False, "decisive": (), "noise": ()}
        added.append(record.model_copy(update=changes))
    return [*records, *added]


def group_by_category(records: list[Record], selection: Selection) -> dict[Category, list[int]]:
    """Return the indices of the records in each category that has a share greater than 0 in the selection.

    >>> records = [Record(task_id="a", prompt="p", solution="s", is_correct=correct) for correct in (True, False, True)]
    >>> group_by_category(records, Selection(correct_ratio=0.5))
    {(None, True): [0, 2], (None, False): [1]}
    """
    members: dict[Category, list[int]] = {category: [] for category in target_shares(selection)}
    for index, record in enumerate(records):
        bin_ = find_bin(record, selection.difficulty_bins or {})
        category = (bin_, None if selection.correct_ratio is None else record.is_correct)
        if category in members:
            members[category].append(index)
    return members


def category_counts(sizes: dict[Category, int], selection: Selection) -> dict[Category, int]:
    """Return the number of records to select from each category. `sizes` contains the sizes of the categories.

    If `n_samples` is None, the sum of the numbers is as large as possible.

    >>> category_counts({(None, True): 5, (None, False): 2}, Selection(correct_ratio=0.5))
    {(None, True): 2, (None, False): 2}

    Raises:
        InputError: a category is empty or has too few records.
    """
    shares, n = target_shares(selection), selection.n_samples
    if n is None:  # n * share <= size, so a rounded count is at most the size too
        n = min(int(sizes[category] / share + 1e-9) for category, share in shares.items())
    counts = dict(zip(shares, allocate_counts(list(shares.values()), n), strict=True))
    for category, count in counts.items():
        if count > sizes[category] or not sizes[category]:
            bin_, correct = category
            kind = "" if correct is None else ("correct " if correct else "incorrect ")
            where = "" if bin_ is None else f" of difficulty {bin_}"
            raise InputError(
                f"data: {count or 'some'} {kind}records{where} are needed, but there are {sizes[category]}; "
                "change data.n_samples, data.correct_ratio or data.difficulty_bins"
                f"{MISMATCHED_HINT if correct is False else ''}"
            )
    return counts


def draw(members: dict[Category, list[int]], counts: dict[Category, int], seed: int) -> list[int]:
    """Draw the given number of indices from each category at random, and return them in ascending order.

    >>> draw({(None, True): [0, 2], (None, False): [1, 3]}, {(None, True): 2, (None, False): 0}, seed=0)
    [0, 2]
    """
    random_ = random.Random(f"{seed}/sampling")
    return sorted(index for category, count in counts.items() for index in random_.sample(members[category], count))


def draw_by_task(
    tasks: list[str], members: dict[Category, list[int]], counts: dict[Category, int], seed: int
) -> list[int]:
    """Draw indices like `draw`, but from as many tasks as possible, and from the same tasks in all categories.

    The tasks are put in a random order. From each category, one record of each task is drawn in this order, then
    another one of each task, and so on. `tasks` contains the task of each record.

    >>> draw_by_task(["a", "a", "a", "b", "b"], {(None, True): [0, 3], (None, False): [1, 2, 4]},
    ...              {(None, True): 2, (None, False): 2}, seed=1)
    [0, 2, 3, 4]
    """
    random_ = random.Random(f"{seed}/sampling")
    names = list(dict.fromkeys(tasks))
    place = dict(zip(random_.sample(names, len(names)), range(len(names)), strict=True))
    drawn: list[int] = []
    for category, count in counts.items():
        num_before: Counter[str] = Counter()
        order: dict[int, tuple[int, int]] = {}
        for index in random_.sample(members[category], len(members[category])):
            order[index] = (num_before[tasks[index]], place[tasks[index]])
            num_before[tasks[index]] += 1
        drawn += sorted(order, key=order.__getitem__)[:count]
    return sorted(drawn)


def select(records: list[Record], selection: Selection) -> list[Record]:
    """Draw records at random so that they have the given composition. No record is drawn twice.

    The records remain in their original order. If `n_samples` is None, as many records as possible are selected.

    Raises:
        InputError: a category of the composition (for example, a difficulty) has no records, or too few for
            `n_samples`.
    """
    members = group_by_category(records, selection)
    counts = category_counts({category: len(indices) for category, indices in members.items()}, selection)
    if selection.by_task and selection.correct_ratio is not None:
        tasks = [record.task_id for record in records]
        return [records[index] for index in draw_by_task(tasks, members, counts, selection.seed)]
    return [records[index] for index in draw(members, counts, selection.seed)]


def split_by_task(records: list[Record]) -> Splits:
    """Divide the tasks of records among the training, validation and test splits in the ratio 90 : 5 : 5.

    The split of a task depends on a hash of its name. The solutions to a task are therefore in one split, and added
    tasks do not change the splits of the other tasks. Only if a split would be empty, a twentieth of the tasks, and at
    least one, is moved to it: the tasks whose hashes are closest. Two tasks are not enough for a test split, and one is
    not enough for a validation split.
    """
    hashes = {record.task_id: zlib.crc32(record.task_id.encode()) for record in records}
    ordered = sorted(hashes, key=lambda task: (hashes[task] % 100, hashes[task], task))
    count = len(ordered)
    moved = max(1, count // 20)
    validation, test = (sum(hashes[task] % 100 < share for task in ordered) for share in (90, 95))
    if test == count > 2:
        test = count - moved
    if validation >= test:
        validation = test - moved
    validation = max(validation, 1)
    test = max(test, min(validation + 1, count))
    number = {task: index for index, task in enumerate(ordered)}
    splits = Splits([], [], [])
    for record in records:
        index = number[record.task_id]
        (splits.train if index < validation else splits.validation if index < test else splits.test).append(record)
    return splits
