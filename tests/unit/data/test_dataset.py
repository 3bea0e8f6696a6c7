"""Tests of the immutability of a data set and its splits, and of data sets with added columns."""

import hashlib
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import TINY, compose_config
from wmtp.data.collate import collate
from wmtp.data.dataset import Dataset
from wmtp.data.split import ADDED_COLUMNS, TOKEN_COLUMNS, TokenizedSplit
from wmtp.training.builders import build_components
from wmtp.training.start import build_stage, build_stage_trainer


def make_column(name: str, split: TokenizedSplit, extra: int = 0) -> np.ndarray:
    """Return an array that is a valid column of a split, or that has `extra` entries too many."""
    count = len(split.samples.tokens) if name in TOKEN_COLUMNS else len(split)
    numbers = np.arange(count + extra, dtype=np.float32)
    matrix = np.stack([numbers, -numbers], axis=1)
    return {"harmful": numbers % 2 == 0, "hidden_states": matrix, "reference_losses": matrix}.get(name, numbers)


def with_column(data: Dataset, name: str, fingerprint: str | None = None) -> Dataset:
    return data.with_columns(fingerprint=fingerprint, **{name: [make_column(name, split) for split in data.splits]})


@pytest.mark.parametrize("name", ["train", "validation", "test", "fingerprint", "seed"])
def test_no_attribute_of_a_data_set_can_be_set(name: str, tiny_data: Dataset) -> None:
    with pytest.raises(FrozenInstanceError):
        setattr(tiny_data, name, getattr(tiny_data, name))


@pytest.mark.parametrize("name", ["records", "samples", "is_correct", *ADDED_COLUMNS])
def test_no_attribute_of_a_split_can_be_set(name: str, tiny_data: Dataset) -> None:
    for split in tiny_data.splits:
        with pytest.raises(FrozenInstanceError):
            setattr(split, name, getattr(split, name))


@pytest.mark.parametrize("name", ["tasks", "is_correct", *ADDED_COLUMNS])
def test_the_arrays_of_a_split_are_read_only(name: str, tiny_data: Dataset) -> None:
    data = with_column(tiny_data, name) if name in ADDED_COLUMNS else tiny_data
    for split in data.splits:
        with pytest.raises(ValueError, match="read-only"):
            getattr(split, name)[:] = 0


@pytest.mark.parametrize("name", ["tokens", "offsets", "prompt_lengths", "kept"])
def test_the_arrays_of_tokenized_records_are_read_only(name: str, tiny_data: Dataset) -> None:
    with pytest.raises(ValueError, match="read-only"):
        getattr(tiny_data.train.samples, name)[:] = 0


@pytest.mark.parametrize("name", ADDED_COLUMNS)
def test_only_the_new_data_set_has_an_added_column(name: str, tiny_data: Dataset) -> None:
    before = [getattr(split, name) for split in tiny_data.splits]
    data = with_column(tiny_data, name)
    for new, old, column in zip(data.splits, tiny_data.splits, before, strict=True):
        np.testing.assert_array_equal(getattr(new, name), make_column(name, old))
        assert getattr(old, name) is column and new.samples is old.samples
    batch, original = (collate(d.train, [1], d.tokenizer.padding) for d in (data, tiny_data))
    assert getattr(batch, name) is not None
    assert (getattr(original, name) is None) == (name in TOKEN_COLUMNS)
    assert data.micro_batches(0, 0, 4, 4)[0].record_ids == tiny_data.micro_batches(0, 0, 4, 4)[0].record_ids


def test_an_added_column_keeps_the_columns_that_were_added_before(tiny_data: Dataset) -> None:
    both = with_column(with_column(tiny_data, "reference_losses"), "rewards")
    assert both.train.reference_losses is not None and both.train.rewards[1] == 1.0


@pytest.mark.parametrize("name", ADDED_COLUMNS)
@pytest.mark.parametrize("extra", [-1, 1])
def test_a_column_of_the_wrong_length_is_an_error(name: str, extra: int, tiny_data: Dataset) -> None:
    correct, wrong = (make_column(name, split, n) for split, n in zip(tiny_data.splits, (0, extra), strict=True))
    with pytest.raises(ValueError, match=f"validation.{name} has {len(wrong)} entries for {len(wrong) - extra} "):
        tiny_data.with_columns(**{name: (correct, wrong)})
    with pytest.raises(ValueError, match=f"train.{name} has"):
        replace(tiny_data.train, **{name: make_column(name, tiny_data.train, extra)})


@pytest.mark.parametrize("name", ["is_correct", "tasks", "labels"])
def test_only_columns_that_do_not_change_the_fingerprint_of_a_split_can_be_added(name: str, tiny_data: Dataset) -> None:
    with pytest.raises(ValueError, match=f"{name}: not one of the columns rewards, "):
        tiny_data.with_columns(**{name: [np.zeros(len(split)) for split in tiny_data.splits]})


@pytest.mark.parametrize("count", [1, 3])
def test_a_column_needs_one_array_for_each_split(count: int, tiny_data: Dataset) -> None:
    arrays = [split.rewards for split in (*tiny_data.splits, tiny_data.train)]
    with pytest.raises(ValueError, match="zip"):
        tiny_data.with_columns(rewards=arrays[:count])


def test_a_data_set_with_outputs_of_a_model_has_its_own_fingerprint(tiny_data: Dataset) -> None:
    original = tiny_data.fingerprint
    first, second = (with_column(tiny_data, "rewards", fingerprint) for fingerprint in ("model a", "model b"))
    assert first.fingerprint == hashlib.sha256(f"{original}model a".encode()).hexdigest()  # as in earlier checkpoints
    assert len({original, first.fingerprint, second.fingerprint}) == 3
    assert tiny_data.fingerprint == original
    assert with_column(tiny_data, "harmful").fingerprint == original


@pytest.mark.slow
def test_the_hidden_states_of_stage_1_are_only_in_the_data_of_stage_1(tmp_path: Path) -> None:
    overrides = [*TINY, "algo=critic", "pretrain.trains=head", "hardware=cpu", f"cache_dir={tmp_path}"]
    config = compose_config(*overrides)
    components = build_components(config)
    stage = build_stage(config, components)
    assert stage is not None
    trainer = build_stage_trainer(config, tmp_path / "pretrain", components, stage)
    assert all(split.hidden_states is not None for split in trainer.data.splits)
    assert all(split.hidden_states is None for split in components.data.splits)
    assert trainer.data.fingerprint == components.data.fingerprint
