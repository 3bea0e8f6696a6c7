"""Tests of precomputed per-token columns, and of the order and the selection of samples."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import tiny_model
from wmtp.data.collate import IGNORED, collate
from wmtp.data.dataset import Dataset, read_dataset
from wmtp.data.records import Record
from wmtp.data.sampler import epoch_batches
from wmtp.data.sources import TaskSource
from wmtp.data.split import TokenizedSplit
from wmtp.data.tokenizer import Tokenizer, task_tokenizer
from wmtp.distributed.device import Hardware
from wmtp.errors import InputError
from wmtp.evaluation.token_columns import TokenColumns, column_fingerprint
from wmtp.models.llama import LlamaArchitecture, create_llama
from wmtp.models.mtp import MtpModel
from wmtp.ops.targets import shift_to_heads, targets

CPU = Hardware(device="cpu")
KINDS = {"reference losses": "reference_losses", "hidden states": "hidden_states"}


@pytest.fixture
def columns(tmp_path: Path, tokenizer: Tokenizer) -> TokenColumns:
    return TokenColumns(tmp_path, tokenizer, CPU)


def with_column(columns: TokenColumns, kind: str, model: MtpModel, data: Dataset) -> Dataset:
    """Return a data set with the column."""
    if kind == "hidden states":
        return columns.with_hidden_states(model, data)
    losses = [column[:, None] for column in columns.reference_losses(model, data)]
    return data.with_columns(fingerprint=column_fingerprint(model), reference_losses=losses)


def get_column(kind: str, split: TokenizedSplit) -> np.ndarray:
    found: np.ndarray = getattr(split, KINDS[kind])
    return found[:, 0] if kind == "reference losses" else found


def cache_files(columns: TokenColumns) -> set[str]:
    return {path.name for path in columns.cache_dir.glob("*.npy")}


def iter_samples(split: TokenizedSplit) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """Yield start, end, prompt length and tokens of each sample."""
    samples = split.samples
    for start, stop, prompt in zip(samples.offsets, samples.offsets[1:], samples.prompt_lengths, strict=False):
        yield start, stop, prompt, torch.tensor(samples.tokens[start:stop]).long()


@torch.no_grad()
def test_a_reference_loss_is_that_of_a_token_after_its_prefix(columns: TokenColumns, tiny_data: Dataset) -> None:
    model = tiny_model(dropout=0.3)
    data = with_column(columns, "reference losses", model, tiny_data)
    model.eval()
    shifted = 0.0
    for split in (data.train, data.validation):
        losses = get_column("reference losses", split)
        assert losses.shape == split.samples.tokens.shape and losses.dtype == np.float32
        for start, stop, prompt, tokens in iter_samples(split):
            log_p = torch.log_softmax(model.unembedding(model(tokens[None]).states[0, 0]), dim=-1)
            expected = np.zeros(len(tokens), np.float32)
            for i in range(prompt, len(tokens)):
                expected[i] = -log_p[i - 1, tokens[i]]
            np.testing.assert_allclose(losses[start:stop], expected, rtol=1e-4, atol=1e-5)
            shifted = max(shifted, float(np.abs(losses[start : stop - 1] - expected[1:]).max()))
    assert shifted > 1.0  # a column shifted by one token would be detected


@torch.no_grad()
def test_hidden_states_equal_those_of_the_trunk(columns: TokenColumns, tiny_data: Dataset) -> None:
    model = tiny_model(dropout=0.3)
    data = with_column(columns, "hidden states", model, tiny_data)
    model.eval()
    for split in (data.train, data.validation):
        states = get_column("hidden states", split)
        assert states.shape == (len(split.samples.tokens), 64)
        for start, stop, _, tokens in iter_samples(split):
            np.testing.assert_allclose(states[start:stop], model.trunk_states(tokens[None])[0], rtol=1e-4, atol=1e-4)
            assert not np.allclose(states[start:stop], model(tokens[None]).states[0, 0], atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_is_computed_once_and_read_memory_mapped(
    kind: str, columns: TokenColumns, tiny_data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = with_column(columns, kind, tiny_model(), tiny_data)
    for split in (first.train, first.validation):
        assert isinstance(get_column(kind, split), np.memmap) and not get_column(kind, split).flags.writeable
    names = cache_files(columns)
    assert len(names) == 2 and not list(columns.cache_dir.glob("*.tmp"))

    def fail_if_called(*arguments: object, **options: object) -> None:
        raise AssertionError("a forward ran")

    monkeypatch.setattr(MtpModel, "trunk_states", fail_if_called)
    again = with_column(TokenColumns(columns.cache_dir, columns.tokenizer, CPU), kind, tiny_model(), tiny_data)
    assert np.array_equal(get_column(kind, again.train), get_column(kind, first.train))
    assert cache_files(columns) == names
    with pytest.raises(AssertionError, match="a forward ran"):
        with_column(columns, kind, tiny_model(seed=1), tiny_data)
    assert cache_files(columns) == names, "an unfinished column was written"


def with_shape(num_attention_heads: int = 4, num_kv_heads: int = 2, **options: float) -> MtpModel:
    """Return a model with equal parameters in a different architecture."""
    torch.manual_seed(0)
    return create_llama(LlamaArchitecture(
        vocab_size=512, dim=64, num_layers=2, num_heads=4, num_attention_heads=num_attention_heads,
        num_kv_heads=num_kv_heads, hidden_dim=128, **options,
    ))  # fmt: skip


OTHERS: dict[str, Callable[[], MtpModel]] = {
    "weights": lambda: tiny_model(seed=1),
    "rotation": lambda: with_shape(rope_theta=50.0),
    "norm": lambda: with_shape(norm_eps=0.1),
    "attention heads": lambda: with_shape(num_attention_heads=2, num_kv_heads=1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", OTHERS)
def test_another_model_never_reads_a_stale_column(
    kind: str, other: str, columns: TokenColumns, tiny_data: Dataset
) -> None:
    first = with_column(columns, kind, tiny_model(), tiny_data)
    second = with_column(columns, kind, OTHERS[other](), tiny_data)
    assert len(cache_files(columns)) == 4
    assert np.abs(get_column(kind, first.validation) - get_column(kind, second.validation)).max() > 1e-4


@pytest.mark.slow
def test_other_data_tokenizer_or_precision_never_read_a_stale_column(
    columns: TokenColumns, tiny_data: Dataset, tmp_path: Path
) -> None:
    model = tiny_model()
    swapped_splits = replace(tiny_data, train=tiny_data.validation, validation=tiny_data.train)
    with_column(columns, "reference losses", model, tiny_data)
    with_column(columns, "reference losses", model, swapped_splits)
    assert len(cache_files(columns)) == 2  # one file for each split, independent of its use
    other = task_tokenizer(tmp_path / "other", vocab_size=400)
    with_column(TokenColumns(columns.cache_dir, other, CPU), "reference losses", model, tiny_data)
    assert len(cache_files(columns)) == 4
    bf16 = Hardware(device="cpu", precision="bf16")
    with_column(TokenColumns(columns.cache_dir, columns.tokenizer, bf16), "reference losses", model, tiny_data)
    assert len(cache_files(columns)) == 6
    with_column(columns, "hidden states", model, tiny_data)
    assert len(cache_files(columns)) == 8
    model.add_value_head()  # no column depends on the value head
    with_column(columns, "reference losses", model, tiny_data)
    assert len(cache_files(columns)) == 8


def test_the_fingerprint_of_a_data_set_depends_on_the_reference(columns: TokenColumns, tiny_data: Dataset) -> None:
    fingerprints = [
        with_column(columns, "reference losses", tiny_model(seed=seed), tiny_data).fingerprint for seed in (0, 0, 1)
    ]
    assert fingerprints[0] == fingerprints[1]
    assert len({*fingerprints, tiny_data.fingerprint}) == 3


@pytest.mark.parametrize("damage", ["half", "header", "nothing", "text"])
def test_damaged_column_is_reported_with_the_file_to_delete(
    damage: str, columns: TokenColumns, tiny_data: Dataset
) -> None:
    original = np.array(
        get_column("reference losses", with_column(columns, "reference losses", tiny_model(), tiny_data).train)
    )
    path = max(columns.cache_dir.glob("*.npy"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    path.write_bytes(
        {"half": content[: len(content) // 2], "header": content[:20], "nothing": b"", "text": b"text" * 99}[damage]
    )
    with pytest.raises(InputError, match=f"{path}.*delete this file"):
        with_column(columns, "reference losses", tiny_model(), tiny_data)
    path.unlink()
    again = with_column(columns, "reference losses", tiny_model(), tiny_data)
    assert np.array_equal(get_column("reference losses", again.train), original)


def test_batch_has_the_reference_loss_of_each_target(columns: TokenColumns, tokenizer: Tokenizer) -> None:
    source = TaskSource(tokenizer=tokenizer, num_train=6, num_validation=1, num_test=1, difficulties={1: 1, 2: 1})
    data, model = read_dataset(source, columns.cache_dir, seed=0), tiny_model()
    data = columns.with_hidden_states(model, with_column(columns, "reference losses", model, data))
    batch = collate(data.train, [3, 0, 5], tokenizer.padding)
    assert batch.reference_losses is not None and batch.hidden_states is not None
    target = targets(batch.labels, 1)[0]
    log_p = torch.log_softmax(model.unembedding(model(batch.tokens).states[0]), dim=-1)
    option = -log_p.gather(-1, target.clamp(min=0)[..., None])[..., 0].where(target != IGNORED, 0.0)
    assert len(set(batch.response.sum(dim=1).tolist())) > 1  # the samples have different lengths
    got = shift_to_heads(batch.reference_losses, 1, 0.0)[0, :, :, 0]
    torch.testing.assert_close(got, option.detach(), rtol=1e-4, atol=1e-5)
    real = torch.zeros(batch.tokens.shape, dtype=torch.bool)
    for row, index in enumerate([3, 0, 5]):
        real[row, : data.train.samples.lengths[index]] = True
    torch.testing.assert_close(batch.hidden_states[real], model.trunk_states(batch.tokens)[real].detach())
    assert not batch.hidden_states[~real].any() and not batch.reference_losses[~real].any()


# The order and choice of samples


def count_split_groups(batches: list[list[int]], groups: np.ndarray) -> int:
    """Return the number of groups that are in more than one batch."""
    batches_of_group: dict[int, set[int]] = {}
    for number, batch in enumerate(batches):
        for index in batch:
            batches_of_group.setdefault(int(groups[index]), set()).add(number)
    return sum(len(found) > 1 for found in batches_of_group.values())


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 6), st.integers(0, 4))
def test_both_solutions_of_a_task_are_in_one_batch_and_every_sample_occurs_once(
    num_tasks: int, half_size: int, epoch: int
) -> None:
    random = np.random.default_rng(num_tasks)
    groups = np.repeat(np.arange(num_tasks), 2)
    lengths = random.integers(5, 60, len(groups))
    batches = epoch_batches(lengths, 2 * half_size, 7, epoch, groups)
    assert sorted(index for batch in batches for index in batch) == list(range(len(groups)))
    assert all(len(batch) == 2 * half_size for batch in batches[:-1])
    assert count_split_groups(batches, groups) == 0
    if num_tasks > 20 and num_tasks > 5 * half_size:
        assert batches != epoch_batches(lengths, 2 * half_size, 7, epoch + 1, groups)
        assert (
            count_split_groups(epoch_batches(lengths, 2 * half_size, 7, epoch), groups) > 0
        )  # the control: without groups


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=40), st.integers(1, 9))
def test_only_groups_at_the_edge_of_a_batch_are_split(sizes: list[int], batch_size: int) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    lengths = np.random.default_rng(0).integers(5, 60, len(groups))
    batches = epoch_batches(lengths, batch_size, 0, 0, groups)
    assert sorted(index for batch in batches for index in batch) == list(range(len(groups)))
    for batch in batches:  # the samples of a group are adjacent
        numbers = [int(groups[index]) for index in batch]
        assert len([i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1]]) == len(set(numbers)) - 1
    assert (
        count_split_groups(batches, groups) <= sum(max(0, -(-size // batch_size)) for size in sizes) + len(batches) - 1
    )


def both_solutions(tokenizer: Tokenizer, cache: Path, **options: bool) -> Dataset:
    source = TaskSource(
        tokenizer=tokenizer, num_train=40, num_validation=11, num_test=1, difficulties={1: 1, 2: 1}, noise=0.4,
        **options,
    )  # fmt: skip
    return read_dataset(source, cache, seed=0)


def test_group_tasks_pairs_the_solutions_of_a_data_set(tokenizer: Tokenizer, cache: Path) -> None:
    def pairs(data: Dataset) -> int:
        """Return the number of tasks with both solutions in one micro-batch."""
        trained = [b for update in range(10) for b in data.micro_batches(0, update, 8, 4)]
        return sum(len(b.tasks) - len(b.tasks.unique()) for b in (*trained, *data.validation_batches(4)))

    grouped, ungrouped = (both_solutions(tokenizer, cache, group_tasks=option) for option in (True, False))
    assert pairs(grouped) == 40 + 11
    assert pairs(ungrouped) < 30
    assert grouped.fingerprint != ungrouped.fingerprint
    batches = list(grouped.validation_batches(4))
    assert sorted(record for b in batches for record in b.record_ids) == sorted(grouped.validation.record_ids)


def test_curated_data_has_no_incorrect_or_noisy_solutions(tokenizer: Tokenizer, cache: Path) -> None:
    everything, curated = (both_solutions(tokenizer, cache, curated=option) for option in (False, True))
    for name in ("train", "validation"):
        before: tuple[Record, ...] = getattr(everything, name).records
        after: tuple[Record, ...] = getattr(curated, name).records
        assert after == tuple(record for record in before if record.is_correct and not record.noise)
        assert 0 < len(after) < sum(record.is_correct for record in before) < len(before)
