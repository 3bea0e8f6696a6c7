"""Tests of the labels of tokens, against labels that are found by hand or with loops."""

from pathlib import Path

import numpy as np
import pytest

from wmtp.data.records import Record, Span
from wmtp.data.sources import TaskSource
from wmtp.data.split import TokenizedSplit, build_split
from wmtp.data.token_labels import first_decisive_tokens, label_tokens
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
