from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wmtp.data.collate import IGNORED, collate
from wmtp.data.contents import hash_records
from wmtp.data.dataset import read_dataset
from wmtp.data.records import Record, StdioTest
from wmtp.data.sampler import batches_by_length, epoch_batches
from wmtp.data.sources import TaskSource
from wmtp.data.split import build_split
from wmtp.data.token_cache import TokenizedRecords, cached_tokens, tokenize
from wmtp.data.tokenizer import Tokenizer, pretrained_tokenizer, task_tokenizer
from wmtp.errors import InputError

RECORDS = [
    Record(task_id="a", prompt="Say a", solution="print('a')\n"),
    Record(task_id="b", prompt="Say nothing at all, please", solution="pass\n"),
]


def test_every_text_is_decoded_unchanged(tokenizer: Tokenizer) -> None:
    texts = ["def f(x):\n    return x + 17\n", "naïve 日本語 🙂\t\r\n\x00", ""]
    assert [tokenizer.decode(tokens) for tokens in tokenizer.encode(texts)] == texts
    assert tokenizer.vocab_size == 512


def test_a_byte_order_mark_in_the_files_of_a_tokenizer_is_ignored(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8-sig")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}', encoding="utf-8-sig")
    read = pretrained_tokenizer(path=tmp_path)
    assert (read.fingerprint, read.end) == (tokenizer.fingerprint, tokenizer.end)


@pytest.mark.slow
def test_the_task_tokenizer_is_deterministic(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert task_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint
    assert task_tokenizer(tmp_path, vocab_size=400).fingerprint != tokenizer.fingerprint


def test_labels_cover_exactly_the_solution_and_its_end(tokenizer: Tokenizer, tmp_path: Path) -> None:
    split = build_split("train", RECORDS, TaskSource(tokenizer=tokenizer, difficulties={1: 1}), None, tmp_path)
    samples = split.samples
    batch = collate(split, [0, 1], tokenizer.padding)
    for row, record in enumerate(RECORDS):
        learned = batch.labels[row][batch.labels[row] != IGNORED].tolist()
        assert learned[-1] == tokenizer.end
        assert tokenizer.decode(learned[:-1]) == record.solution
        solution = tokenizer.encode([record.solution])[0]
        prompt = tokenizer.encode([record.prompt + "\n"])[0]
        assert batch.tokens[row, : len(prompt) + len(solution) + 1].tolist() == [*prompt, *solution, tokenizer.end]
    assert batch.num_tokens == int(samples.lengths.sum())
    assert batch.record_ids == tuple(f"{record.task_id}#{i}" for i, record in enumerate(RECORDS))
    assert torch.equal(batch.is_correct, torch.tensor([record.is_correct for record in RECORDS]))
    assert torch.equal(batch.rewards, batch.is_correct.float())


@given(st.integers(3, 30))
def test_a_sample_that_is_too_long_is_counted_and_dropped_or_truncated(max_length: int) -> None:
    tokenizer = LENGTHS
    untruncated = tokenize(RECORDS, tokenizer, "{prompt}\n", 1_000, "drop")
    dropped = tokenize(RECORDS, tokenizer, "{prompt}\n", max_length, "drop")
    assert dropped.num_long == int((untruncated.lengths > max_length).sum()) == len(RECORDS) - len(dropped)
    cut = tokenize(RECORDS, tokenizer, "{prompt}\n", max_length, "cut")
    assert cut.num_long == dropped.num_long
    assert (cut.lengths <= max_length).all()
    assert (cut.prompt_lengths < cut.lengths).all()


class _Characters(Tokenizer):
    """A tokenizer with one token per character, so that lengths are known."""

    def __init__(self) -> None:
        self.end, self.padding, self.vocab_size, self.fingerprint = 1, 0, 10_000, "characters"
        self.prefix: list[int] = []
        self._control_names = {"\x01": "\x01"}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[ord(character) for character in text] for text in texts]


LENGTHS = _Characters()


def test_changed_inputs_are_tokenized_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def tokenize_records(
        records: list[Record] = RECORDS, template: str = "{prompt}\n", max_length: int = 100
    ) -> TokenizedRecords:
        return cached_tokens(records, tokenizer, template, max_length, "drop", tmp_path)

    first = tokenize_records()
    (path,) = tmp_path.glob("tokens-*")
    written = path.stat().st_mtime_ns
    again = tokenize_records()
    assert np.array_equal(again.tokens, first.tokens) and path.stat().st_mtime_ns == written

    changed = [RECORDS[0], RECORDS[1].model_copy(update={"solution": "quit\n"})]
    assert not np.array_equal(tokenize_records(changed).tokens, first.tokens)
    assert not np.array_equal(tokenize_records(template="{prompt}:").tokens, first.tokens)
    assert len(tokenize_records(max_length=20)) < len(first)
    assert len(list(tmp_path.glob("tokens-*"))) == 4


def test_the_tests_of_a_problem_are_not_dumped_for_each_of_its_solutions(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A problem of CodeContests may have megabytes of tests and hundreds of solutions."""
    test, dumped, dump = StdioTest(stdin="1 " * 5_000, stdout="2"), [], Record.model_dump_json
    records = [Record(task_id="a", prompt="p", solution=f"s{i}", tests=(test,)) for i in range(50)]

    def counting(self: Record, **options: Any) -> str:
        text = dump(self, **options)
        dumped.append(len(text))
        return text

    monkeypatch.setattr(Record, "model_dump_json", counting)
    cached_tokens(records, tokenizer, "{prompt}\n", 100, "drop", tmp_path)
    one = hash_records(records)
    assert sum(dumped) < 20_000, "a dump of all records has 500,000 characters"
    changed = StdioTest(stdin=test.stdin, stdout="3")
    assert hash_records([*records[:-1], records[-1].model_copy(update={"tests": (changed,)})]) != one


def test_a_damaged_cache_error_contains_the_file_to_delete(tokenizer: Tokenizer, tmp_path: Path) -> None:
    cached_tokens(RECORDS, tokenizer, "{prompt}\n", 100, "drop", tmp_path)
    (path,) = tmp_path.glob("tokens-*")
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match=str(path)):
        cached_tokens(RECORDS, tokenizer, "{prompt}\n", 100, "drop", tmp_path)


def test_a_cache_that_cannot_be_read_or_written_is_an_input_error(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr("wmtp.data.token_cache.os.replace", fail)
        with pytest.raises(InputError, match=r"cannot be written: .*; choose another folder with cache_dir=DIR"):
            cached_tokens(RECORDS, tokenizer, "{prompt}\n", 100, "drop", tmp_path)
    assert not list(tmp_path.glob("tokens-*"))
    cached_tokens(RECORDS, tokenizer, "{prompt}\n", 100, "drop", tmp_path)
    monkeypatch.setattr("wmtp.data.token_cache.load_file", fail)
    with pytest.raises(InputError, match="Permission denied"):
        cached_tokens(RECORDS, tokenizer, "{prompt}\n", 100, "drop", tmp_path)


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 5))
def test_every_epoch_has_every_sample_once_in_a_different_order(count: int, batch_size: int, epoch: int) -> None:
    lengths = np.arange(count) % 17 + 1
    batches = epoch_batches(lengths, batch_size, 7, epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    assert [len(batch) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
    assert batches == epoch_batches(lengths, batch_size, 7, epoch)
    if count > 5 * batch_size:
        assert batches != epoch_batches(lengths, batch_size, 7, epoch + 1)
        assert batches != epoch_batches(lengths, batch_size, 8, epoch)
    assert sorted(i for batch in batches_by_length(lengths, batch_size) for i in batch) == list(range(count))


Batches = list[list[int]]


def padding(batches: Batches, lengths: np.ndarray) -> float:
    """Return the share of padding among all tokens of the batches."""
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 1 - float(lengths.sum()) / float(padded)


def share_that_meets_again(batches: Batches, others: Batches, groups: np.ndarray | None = None) -> float:
    """Return the share of the pairs in one batch of `batches` that are also in one batch of `others`.

    Pairs of the same group are left out.
    """
    first, second = (
        {pair for batch in found for pair in combinations(sorted(batch), 2)
         if groups is None or groups[pair[0]] != groups[pair[1]]}
        for found in (batches, others)
    )  # fmt: skip
    return len(first & second) / len(first)


def sorted_in_windows(lengths: np.ndarray, batch_size: int, window: int, epoch: int) -> Batches:
    """Return batches of samples that are sorted by length in random windows of the given number of samples."""
    shuffled = np.random.default_rng(epoch).permutation(len(lengths))
    windows = [shuffled[i : i + window] for i in range(0, len(lengths), window)]
    ordered = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in windows])
    return [ordered[i : i + batch_size].tolist() for i in range(0, len(ordered), batch_size)]


@pytest.mark.parametrize("is_grouped", [False, True])
@pytest.mark.parametrize(("count", "batch_size"), [(100, 16), (374, 8), (374, 16), (374, 32), (1000, 16), (10_000, 16)])
def test_other_epochs_and_seeds_have_batches_of_other_samples(count: int, batch_size: int, is_grouped: bool) -> None:
    lengths = np.random.default_rng(0).lognormal(5.4, 0.4, count).astype(int)
    groups = np.arange(count) // 2 if is_grouped else None
    first, next_epoch, other_seed = (
        epoch_batches(lengths, batch_size, seed, epoch, groups) for seed, epoch in ((0, 0), (0, 1), (1, 0))
    )
    assert share_that_meets_again(first, next_epoch, groups) < 0.35
    assert share_that_meets_again(first, other_seed, groups) < 0.35
    # the controls: windows of 64 batches, and batches at random
    naive = [sorted_in_windows(lengths, batch_size, 64 * batch_size, epoch) for epoch in (0, 1)]
    assert count == 10_000 or share_that_meets_again(*naive) > 0.5
    at_random = sorted_in_windows(lengths, batch_size, 1, 0)
    assert is_grouped or padding(first, lengths) < padding(at_random, lengths)


def test_less_than_fifteen_percent_of_the_tasks_tokens_are_padding(tokenizer: Tokenizer, tmp_path: Path) -> None:
    difficulties = {1: 0.2, 2: 0.4, 3: 0.25, 4: 0.15}
    source = TaskSource(tokenizer=tokenizer, num_train=800, difficulties=difficulties, correct_ratio=1.0)
    data = read_dataset(source, tmp_path, seed=0)
    lengths = data.train.samples.lengths

    for some in (lengths, lengths[:374]):
        at_random = sorted_in_windows(some, 16, 1, 0)
        assert padding(epoch_batches(some, 16, 0, 0), some) < 0.15 < padding(at_random, some)
