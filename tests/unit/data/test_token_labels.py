"""Tests of the labels of tokens, against labels that are found by hand or with loops."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wmtp.data.records import Record, Span
from wmtp.data.sources import TaskSource
from wmtp.data.split import TokenizedSplit, build_split
from wmtp.data.token_labels import first_decisive_tokens, label_shares, label_tokens
from wmtp.data.tokenizer import Tokenizer

SOLUTION = "def run(x):\n    return x + 17 - x * 17\n"


def span_of(text: str, part: str) -> Span:
    """Return the characters of the last occurrence of a part of a text."""
    return text.rindex(part), text.rindex(part) + len(part)


def record(solution: str, *, decisive: tuple[str, ...] = (), noise: tuple[str, ...] = (), right: bool = True) -> Record:
    """Return a record in which the last occurrences of the given parts of its solution are labelled."""
    return Record(
        task_id="a", prompt="Say", solution=solution, is_correct=right,
        decisive=tuple(span_of(solution, part) for part in decisive),
        noise=tuple(span_of(solution, part) for part in noise),
    )  # fmt: skip


def split_of(tokenizer: Tokenizer, cache: Path, *records: Record) -> TokenizedSplit:
    """Return the records as a split."""
    return build_split("train", list(records), TaskSource(tokenizer=tokenizer, difficulties={1: 1}), None, cache)


@pytest.fixture
def labelled_split(tokenizer: Tokenizer, tmp_path: Path) -> TokenizedSplit:
    """Return four solutions: with two decisive ranges, with none, with an exchanged step, with one decisive range."""
    return split_of(
        tokenizer, tmp_path,
        record(SOLUTION, decisive=("+", "*")),
        record(SOLUTION),
        record(SOLUTION, decisive=("return x + 17",), right=False),
        record(SOLUTION, decisive=("*",), right=False),
    )  # fmt: skip


def test_the_first_decisive_token_of_each_solution_is_found(
    labelled_split: TokenizedSplit, tokenizer: Tokenizer
) -> None:
    decisive, _, _ = label_tokens(labelled_split, tokenizer)
    first = first_decisive_tokens(decisive, labelled_split)
    expected = np.zeros_like(decisive)
    texts = []
    for start, end in zip(labelled_split.samples.offsets, labelled_split.samples.offsets[1:], strict=False):
        for position in range(start, end):
            if decisive[position]:
                expected[position] = True
                texts.append(tokenizer.decode([int(labelled_split.samples.tokens[position])]).strip())
                break
    assert first.dtype == bool and first.tolist() == expected.tolist()
    assert (texts[0], texts[2]) == ("+", "*") and "return".startswith(texts[1]), "by hand"
    assert decisive.sum() > first.sum() == 3, "the control: all decisive tokens are more"
    runs = np.flatnonzero(np.diff(decisive.astype(int), prepend=0) == 1)
    assert first.sum() < len(runs), "the control: the first tokens of all decisive ranges are more"


def test_without_decisive_tokens_there_is_no_first_one(labelled_split: TokenizedSplit) -> None:
    nothing = np.zeros(len(labelled_split.samples.tokens), bool)
    assert not first_decisive_tokens(nothing, labelled_split).any()


@pytest.mark.parametrize(
    ("correct", "wrong", "labelled", "first"),
    [
        ("x = 17 + 3", "x = 17 - 3", "17 -", "-"),  # a wide range
        ("x = 17 + 3 + 4", "x = 17 - 3 + 4", "4", "4"),  # too far from the difference: the label is kept
        ("y = 5", "x = 17 - 3", "-", "-"),
    ],
)
def test_a_wrong_solution_becomes_wrong_at_the_first_token_that_differs_from_a_correct_one(
    tokenizer: Tokenizer, tmp_path: Path, correct: str, wrong: str, labelled: str, first: str
) -> None:
    header = "# a header\n"
    records = [record(correct), record(header + wrong, decisive=(labelled,), noise=(header,), right=False)]
    split = split_of(tokenizer, tmp_path, *records)

    def first_text(split: TokenizedSplit) -> str:
        found = first_decisive_tokens(label_tokens(split, tokenizer)[0], split)
        return tokenizer.decode(split.samples.tokens[found].tolist()).strip()

    assert first_text(split) == first
    if labelled.startswith("17"):
        alone = split_of(tokenizer, tmp_path, *records[1:])
        assert first_text(alone) != first, "the control: without a correct solution, the range begins earlier"


def test_the_first_decisive_token_of_every_generated_wrong_solution_is_the_first_difference(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    source = TaskSource(
        tokenizer=tokenizer, num_train=300, num_validation=1, num_test=1, noise=0.7, noise_kinds=["license", "footer"],
        difficulties={1: 1, 2: 1, 3: 1},
    )  # fmt: skip
    split = build_split("train", source.read().train, source, None, tmp_path)
    decisive, noise, _ = label_tokens(split, tokenizer)
    first, samples, checked = first_decisive_tokens(decisive, split), split.samples, 0
    for index in range(0, len(split), 2):
        assert split.tasks[index] == split.tasks[index + 1] and split.is_correct[index] > split.is_correct[index + 1]
        parts = []
        for sample in (index, index + 1):
            start, end = samples.offsets[sample] + samples.prompt_lengths[sample], samples.offsets[sample + 1]
            parts.append([position for position in range(start, end) if not noise[position]])
        right, wrong = parts
        while right and wrong and samples.tokens[right[0]] == samples.tokens[wrong[0]]:
            right, wrong = right[1:], wrong[1:]
        assert first[wrong[0]], split.records[samples.kept[index + 1]].solution
        checked += 1
    assert checked == 300


RANGES = st.lists(st.tuples(st.integers(0, len(SOLUTION) - 1), st.integers(1, 9)), max_size=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(ranges=RANGES, text=st.sampled_from([SOLUTION, "é" * 20 + "字" * 25]), max_length=st.sampled_from([18, 200]))
def test_all_tokens_that_overlap_a_range_are_labelled(
    tokenizer: Tokenizer, tmp_path: Path, ranges: list[Span], text: str, max_length: int
) -> None:
    spans = tuple((start, min(start + size, len(text))) for start, size in ranges)
    records = [Record(task_id=f"{n}", prompt="Say" * n, solution=text, noise=spans[n:]) for n in range(3)]
    source = TaskSource(
        tokenizer=tokenizer, difficulties={1: 1}, max_length=max_length, long_samples="cut"
    )  # fmt: skip
    split = build_split("train", records, source, None, tmp_path)
    _, noise, response = label_tokens(split, tokenizer)
    expected: list[bool] = []
    in_solution: list[bool] = []
    for n, (start, stop) in enumerate(zip(split.samples.offsets, split.samples.offsets[1:], strict=False)):
        prompt = int(split.samples.prompt_lengths[n])
        (tokens,) = tokenizer.character_spans([text])
        labels = [any(i < b and a < j for a, b in spans[n:]) for i, j in tokens]
        expected += ([False] * prompt + labels + [False])[: stop - start]
        in_solution += [False] * prompt + [True] * int(stop - start - prompt)
    assert noise.tolist() == expected and response.tolist() == in_solution


def test_shares_of_labels_by_hand(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = SOLUTION + "# id: 00417\n"
    split = split_of(
        tokenizer, tmp_path,
        record(text, decisive=("+", "*"), noise=("00417",)),
        record(text, decisive=("return x + 17",), noise=("00417",), right=False),
        record(SOLUTION, right=False),
    )  # fmt: skip
    noise = len([a for a, b in tokenizer.character_spans([text])[0] if b > text.index("00417") and b < len(text)])
    total = sum(len(tokens) + 1 for tokens in tokenizer.encode([text, text, SOLUTION]))
    expected = {"noise": 2 * noise, "decisive_correct": 2, "decisive_incorrect": 1}
    shares = label_shares(split, tokenizer)
    assert shares.pop("other") == pytest.approx(1 - sum(expected.values()) / total)
    assert shares == pytest.approx({name: count / total for name, count in expected.items()})
    decisive, _, _ = label_tokens(split, tokenizer)
    assert decisive.sum() > 3, "the control: the exchanged step has several decisive tokens, but counts once"


def test_records_without_labels_have_no_shares(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert label_shares(split_of(tokenizer, tmp_path, record(SOLUTION)), tokenizer) == {}
