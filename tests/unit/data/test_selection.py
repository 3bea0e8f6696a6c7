from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wmtp.data.dataset import read_dataset
from wmtp.data.records import Record
from wmtp.data.selection import (
    Selection,
    add_mismatched,
    allocate_counts,
    category_counts,
    draw,
    group_by_category,
    select,
)
from wmtp.data.sources import TaskSource
from wmtp.data.tokenizer import Tokenizer
from wmtp.errors import InputError


def records(right: int, wrong: int, difficulty: int = 1) -> list[Record]:
    return [
        Record(task_id=f"t{difficulty}/{i}", prompt="p", solution=f"s{i}", is_correct=i < right, difficulty=difficulty)
        for i in range(right + wrong)
    ]


def test_empty_selection_keeps_all_records() -> None:
    everything = records(3, 4)
    assert select(everything, Selection()) == everything


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0.05, 0.95))
def test_correct_ratio_selects_as_many_records_as_possible(right: int, wrong: int, ratio: float) -> None:
    try:
        chosen = select(records(right, wrong), Selection(correct_ratio=ratio))
    except InputError:
        assert min(right / ratio, wrong / (1 - ratio)) < 1
        return
    count = sum(record.is_correct for record in chosen)
    assert abs(count - ratio * len(chosen)) <= 1
    assert len(chosen) >= int(min(right / ratio, wrong / (1 - ratio))) - 1


def test_difficulty_bins_get_their_weights() -> None:
    everything = [record for d in (1, 2, 3, 4) for record in records(20, 20, d)]
    chosen = select(everything, Selection(n_samples=40, correct_ratio=0.5, difficulty_bins={"1-2": 3.0, "4": 1.0}))
    assert Counter(record.is_correct for record in chosen) == {True: 20, False: 20}
    counts = Counter(record.difficulty for record in chosen)
    assert counts[1] + counts[2] == 30 and counts[4] == 10 and counts[3] == 0


def test_the_seed_determines_the_selected_records() -> None:
    everything = records(50, 0)
    first = select(everything, Selection(n_samples=10, seed=1))
    assert first == select(everything, Selection(n_samples=10, seed=1))
    assert first != select(everything, Selection(n_samples=10, seed=2))


@pytest.mark.parametrize("selection", [Selection(n_samples=11), Selection(n_samples=8, correct_ratio=0.9)])
def test_too_few_records_raise_an_error(selection: Selection) -> None:
    with pytest.raises(InputError, match="are needed"):
        select(records(5, 5), selection)


def test_records_of_other_difficulties_are_in_no_category() -> None:
    everything = [*records(1, 1, 1), *records(1, 1, 2), *records(1, 1, 3)]
    selection = Selection(correct_ratio=0.5, difficulty_bins={"1": 1.0, "3": 1.0, "2": 0.0})
    found = group_by_category(everything, selection)
    assert found == {("1", True): [0], ("1", False): [1], ("3", True): [4], ("3", False): [5]}


def test_the_counts_of_categories_are_the_largest_that_fit() -> None:
    selection = Selection(difficulty_bins={"1": 2.0, "2": 1.0})
    assert category_counts({("1", None): 9, ("2", None): 3}, selection) == {("1", None): 6, ("2", None): 3}
    assert category_counts({("1", None): 3, ("2", None): 3}, selection) == {("1", None): 3, ("2", None): 1}


def test_an_empty_category_raises_an_error_that_names_it() -> None:
    selection = Selection(correct_ratio=0.5, difficulty_bins={"1": 1.0})
    with pytest.raises(InputError, match="some incorrect records of difficulty 1 are needed, but there are 0"):
        category_counts({("1", True): 5, ("1", False): 0}, selection)


def test_records_are_drawn_from_their_categories_in_ascending_order() -> None:
    members = {("1", None): list(range(0, 40, 2)), ("2", None): list(range(1, 40, 2))}
    drawn = draw(members, {("1", None): 9, ("2", None): 4}, seed=0)
    assert drawn == sorted(set(drawn)) and Counter(index % 2 for index in drawn) == {0: 9, 1: 4}
    assert drawn != draw(members, {("1", None): 9, ("2", None): 4}, seed=1)


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=6), st.integers(0, 100))
def test_counts_sum_to_n_and_are_near_their_shares(weights: list[float], n: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    counts = allocate_counts(shares, n)
    assert sum(counts) == n
    assert all(abs(count - share * n) < 1 + 1e-6 for count, share in zip(counts, shares, strict=True))


@pytest.mark.parametrize(("num_wrong", "n_samples"), [(3, None), (3, 20), (1, 20)])
def test_correct_and_incorrect_records_are_of_the_same_tasks(num_wrong: int, n_samples: int | None) -> None:
    everything = [
        create_record(task, f"{number}", is_correct=number == 0)
        for task in range(40)
        for number in range(1 + num_wrong)
    ]

    def tasks_of(chosen: list[Record], *, correct: bool) -> Counter[str]:
        return Counter(record.task_id for record in chosen if record.is_correct == correct)

    for by_task in (True, False):
        chosen = select(everything, Selection(n_samples, correct_ratio=0.5, by_task=by_task))
        assert len(chosen) == (n_samples or 80) and chosen == [record for record in everything if record in chosen]
        right, wrong = (tasks_of(chosen, correct=correct) for correct in (True, False))
        assert right.total() == wrong.total() == len(chosen) // 2
        if by_task:
            assert right == wrong, "one incorrect solution for each correct one"
        else:
            assert len(right.keys() & wrong.keys()) < 0.9 * len(right), "the control"


def test_second_solutions_of_tasks_are_drawn_if_a_category_needs_them() -> None:
    everything = [create_record(task, f"{number}", is_correct=number < 2) for task in range(10) for number in range(5)]
    chosen = select(everything, Selection(n_samples=32, correct_ratio=0.5, by_task=True))
    counts = {
        correct: Counter(record.task_id for record in chosen if record.is_correct == correct)
        for correct in (True, False)
    }
    assert counts[True] == counts[False] and sorted(counts[True].values()) == [1] * 4 + [2] * 6
    drawn = {record.solution for record in chosen if not record.is_correct}
    assert drawn == {"2", "3", "4"}, "not always the first of a task"
    assert chosen != select(everything, Selection(n_samples=32, correct_ratio=0.5, by_task=True, seed=1))


def create_record(task: int, solution: str, *, is_correct: bool = True) -> Record:
    return Record(task_id=f"t{task}", prompt=f"p{task}", solution=solution, is_correct=is_correct, decisive=((0, 1),))


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("abcd"), st.booleans()), min_size=1, max_size=12))
def test_every_task_gets_an_incorrect_solution_from_another_task(rows: list[tuple[int, str, bool]]) -> None:
    given_records = [create_record(task, solution, is_correct=right) for task, solution, right in rows]
    try:
        everything = add_mismatched(given_records, seed=3)
    except InputError:
        everything = []
        tasks = {record.task_id for record in given_records}
        solutions = {task: {r.solution for r in given_records if r.task_id == task} for task in tasks}
        right = {r.solution for r in given_records if r.is_correct}
        assert any(right <= solutions[task] for task in tasks), (
            "another task has a solution that is incorrect for this task"
        )
    assert everything[: len(given_records)] == given_records[: len(everything)]
    for record in everything[len(given_records) :]:
        own = [r for r in given_records if r.task_id == record.task_id]
        assert record.prompt == own[0].prompt and not record.is_correct and not record.decisive
        assert all(r.is_correct and r.solution != record.solution for r in own)
    wrong = {r.task_id for r in everything if not r.is_correct}
    assert not everything or wrong == {r.task_id for r in given_records}


def test_the_seed_determines_mismatched_solutions() -> None:
    everything = records(20, 0)
    assert add_mismatched(everything, seed=1) == add_mismatched(everything, seed=1)
    assert add_mismatched(everything, seed=1) != add_mismatched(everything, seed=2)


def test_a_solution_shared_by_all_tasks_cannot_be_mismatched() -> None:
    with pytest.raises(InputError, match="data.mismatched: no other task"):
        add_mismatched([create_record(1, "same"), create_record(2, "same")], seed=0)


def test_runs_with_different_training_data_can_have_the_same_validation_data(tokenizer: Tokenizer, cache: Path) -> None:
    def fingerprints(**selection: Any) -> tuple[str, str]:
        sizes = {"num_train": 30, "num_validation": 20, "num_test": 1}
        source = TaskSource(tokenizer=tokenizer, difficulties={1: 1}, noise=0.5, **sizes, **selection)
        data = read_dataset(source, cache, seed=0)
        return data.train.fingerprint, data.validation.fingerprint

    settings: list[dict[str, Any]] = [
        {"correct_ratio": 0.5, "group_tasks": True},
        {"correct_ratio": 1},
        {"curated": True},
    ]
    selected = [fingerprints(**each) for each in settings]
    shared = [fingerprints(**each, select_validation=False) for each in settings]
    assert [train for train, _ in shared] == [train for train, _ in selected]
    assert {validation for _, validation in shared} == {selected[0][1]}, "half of all solutions are correct"
    assert len({validation for _, validation in selected}) == 3, "the control"
