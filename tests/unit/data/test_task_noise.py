"""Tests of the noise in the embedded tasks, and of several incorrect solutions per task."""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from omegaconf import DictConfig

from tests.unit.data.test_tasks import ALL, verdicts
from wmtp.config.schema import build
from wmtp.data import tasks
from wmtp.data.dataset import Dataset, read_dataset
from wmtp.data.records import Record
from wmtp.data.sources import TaskSource
from wmtp.data.task_noise import LICENSE, NoiseKind
from wmtp.data.task_steps import STEPS
from wmtp.data.token_labels import harmful_tokens, label_tokens
from wmtp.data.tokenizer import Tokenizer
from wmtp.errors import InputError
from wmtp.objectives.value_loss import ValueLoss

HASHES = {
    ("train", 100, 0.0, 0): "43180a5c39e51a91c64f8a5b604dd56ef057a2b26889d0326d4db1c7081ed5a6",
    ("train", 100, 0.5, 0): "6fa22d7befa288a4c95849c235eaace31755dcd3b6808d6bb25dd85542f026d0",
    ("validation", 60, 0.5, 1): "40e54ad8bf1da528642a7d32c8cb67f518eeac7811a63ba1681e6463a6a50370",
}
"""SHA-256 of records that were generated when `footer` was the only kind and each task had one incorrect solution.

The numbers in the key are the number of tasks, the share of noise and the seed.
"""
DIGITS = re.compile(r"# [0-9a-f]{24}\n")


def sha256(records: list[Record]) -> str:
    """Return a hash of all fields of the records."""
    return hashlib.sha256("\n".join(record.model_dump_json() for record in records).encode()).hexdigest()


@pytest.mark.parametrize(("split", "size", "noise", "seed"), HASHES)
def test_one_kind_of_noise_and_one_incorrect_solution_need_no_other_draws(
    split: str, size: int, noise: float, seed: int
) -> None:
    expected = HASHES[split, size, noise, seed]
    assert sha256(tasks.generate(split, size, ALL, noise, seed)) == expected
    if noise:
        drawn = tasks.generate(split, size, ALL, noise, seed, noise_kinds=("footer", "footer"))
        assert sha256(drawn) != expected, "the control: the kind is drawn, although there is only one"


@pytest.mark.parametrize("num_lines", [1, 4])
def test_digits_are_random_lines_after_the_program(num_lines: int) -> None:
    records = tasks.generate("train", 40, ALL, 1.0, 0, noise_kinds=("digits",), noise_lines=num_lines)
    lines = [line for record in records for line in DIGITS.findall(record.solution)]
    assert len(lines) == len(set(lines)) == num_lines * len(records)
    counts = Counter("".join(line[2:-1] for line in lines))
    assert set(counts) == set("0123456789abcdef") and max(counts.values()) < 2 * min(counts.values())
    for record in records:
        ((start, end),) = record.noise
        assert record.solution[start:end] == "".join(DIGITS.findall(record.solution)) and end == len(record.solution)
        assert DIGITS.sub("", record.solution) == record.solution[:start]


def test_a_license_shifts_the_decisive_spans() -> None:
    clean = tasks.generate("train", 60, ALL, 0.0, 5)
    licensed = tasks.generate("train", 60, ALL, 1.0, 5, noise_kinds=("license",))
    for before, after in zip(clean, licensed, strict=True):  # the draws are equal, because a license needs none
        assert after.solution == LICENSE + before.solution and after.noise == ((0, len(LICENSE)),)
        texts = [[record.solution[start:end] for start, end in record.decisive] for record in (before, after)]
        assert texts[0] == texts[1]
        if before.decisive:
            unshifted = [after.solution[start:end] for start, end in before.decisive]
            assert unshifted != texts[0], "the control: without a shift, the spans are in the license"
    assert sum(bool(record.decisive) for record in clean) > 100


def test_the_kind_is_drawn_for_each_noisy_solution() -> None:
    kinds = ("license", "digits", "footer")
    records = tasks.generate("train", 300, ALL, 0.5, 0, noise_kinds=kinds)
    found = Counter(
        "license" if record.solution.startswith(LICENSE)
        else "digits" if DIGITS.search(record.solution)
        else "footer" if record.noise
        else "none"
        for record in records
    )  # fmt: skip
    assert 250 < found.pop("none") < 350
    assert set(found) == set(get_args(NoiseKind)) and min(found.values()) > 70


@pytest.fixture(scope="module")
def variants() -> list[Record]:
    """Return the solutions to 80 tasks, each with three incorrect ones, with noise of all kinds."""
    return tasks.generate(
        "train", 80, ALL, 0.6, 2, noise_kinds=("footer", "digits", "license"), wrong_variants=3
    )  # fmt: skip


def programs(records: list[Record]) -> list[str]:
    """Return the solutions without comments."""
    return [re.sub(r"^#.*\n", "", record.solution, flags=re.MULTILINE) for record in records]


def test_all_incorrect_solutions_of_a_task_differ_and_fail(variants: list[Record]) -> None:
    assert [record.is_correct for record in variants] == [True, False, False, False] * 80
    assert verdicts(variants) == [record.is_correct for record in variants]
    for number in range(80):
        task = variants[4 * number : 4 * number + 4]
        assert len({(record.task_id, record.prompt, record.tests) for record in task}) == 1
        assert len(set(programs(task))) == 4
    assert len({record.task_id for record in variants}) == 80


def test_independently_drawn_incorrect_solutions_can_be_equal() -> None:
    """The control of the test above: each draw alone may repeat an earlier one."""
    random_ = random.Random(0)
    task = None
    while task is None:
        task = tasks.with_tests(random_, tasks.draw_task(random_, 1))
    drawn = [tasks.wrong_solution(random_, task) for _ in range(30)]
    assert len(set(drawn)) < 30


def test_tasks_with_too_few_incorrect_solutions_are_left_out() -> None:
    step = next(step for step in STEPS if step.code == "[len({e}) for {e} in {v}.split()]")  # nothing can be confused
    task = tasks.Task((tasks.Line(step, "", step.code),), "run", "s", "w", "", ("assert run('a b') == [1, 1]",))
    assert tasks.wrong_solutions(random.Random(0), task, 1) is None
    drawn = tasks.generate("train", 60, {1: 1.0}, 0.0, 0, wrong_variants=8)
    assert len(drawn) == 60 * 9 and len(set(Counter(record.task_id for record in drawn).values())) == 1


def test_an_error_suggests_fewer_incorrect_solutions_if_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "wrong_solutions", lambda *about: None)
    monkeypatch.setattr(tasks, "with_tests", lambda random_, task: task)
    for number in (1, 2):
        with pytest.raises(InputError) as raised:
            tasks.generate("train", 1, ALL, 0.0, 0, wrong_variants=number)
        assert ("data.wrong_variants" in str(raised.value)) == (number > 1)


def read_variants(tokenizer: Tokenizer, cache: Path, *, group_tasks: bool, ratio: float | None = 0.5) -> Dataset:
    """Return 60 training tasks with three incorrect solutions each."""
    source = TaskSource(
        tokenizer=tokenizer, num_train=60, num_validation=8, num_test=1, difficulties={1: 1, 2: 1},
        wrong_variants=3, correct_ratio=ratio, group_tasks=group_tasks,
    )  # fmt: skip
    return read_dataset(source, cache, seed=0)


def num_pairs(data: Dataset, batch_size: int) -> int:
    """Return the number of pairs of the ranking loss in the first epoch."""
    batches = [
        batch
        for update in range(-(-len(data.train) // batch_size))
        for batch in data.micro_batches(0, update, batch_size, batch_size)
    ]
    return sum(int(ValueLoss("ranking").denominator(batch)) for batch in batches)


def test_each_correct_solution_has_an_incorrect_one_of_its_task_in_its_batch(tokenizer: Tokenizer, cache: Path) -> None:
    grouped, ungrouped = (read_variants(tokenizer, cache, group_tasks=option) for option in (True, False))
    for data in (grouped, ungrouped):
        assert data.train.is_correct.sum() == 60 and len(data.train) == 120
    assert num_pairs(grouped, 16) == 60
    wrong = {task for task, right in zip(ungrouped.train.tasks, ungrouped.train.is_correct, strict=True) if not right}
    assert len(wrong) < 50, "the control: some tasks have no selected incorrect solution"
    assert num_pairs(ungrouped, 16) < 30


def test_all_solutions_of_a_task_are_pairs_in_one_batch(tokenizer: Tokenizer, cache: Path) -> None:
    grouped, ungrouped = (
        read_variants(tokenizer, cache, group_tasks=option, ratio=None) for option in (True, False)
    )  # fmt: skip
    assert len(grouped.train) == 240 and num_pairs(grouped, 16) == 180
    assert num_pairs(ungrouped, 16) < 90, "the control"


@pytest.mark.slow
@pytest.mark.parametrize("override", ["data=tasks_noisy", "data=tasks"])
def test_seven_of_ten_targets_of_the_noisy_tasks_are_harmful(
    override: str, compose: Callable[..., DictConfig], tokenizer: Tokenizer, cache: Path
) -> None:
    config = compose(override, "data.num_train=300", "data.num_validation=20", "data.num_test=20")
    source: TaskSource = build(config.data, tokenizer=tokenizer)
    train = read_dataset(source, cache, seed=0).train
    _, _, response = label_tokens(train, tokenizer)
    share = harmful_tokens(train, tokenizer)[response].mean()
    assert train.samples.num_long == 0
    if override == "data=tasks":
        assert share == 0, "the control"
    else:
        assert 0.68 < share < 0.76 and train.is_correct.mean() == 0.5 and len(train) == 600
