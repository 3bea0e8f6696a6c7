"""Tests of the losses of the previous epoch: what is recorded, who receives it, and that a resumed run has it."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import tiny_model
from tests.support.ranks import Ranks
from tests.support.training import make_trainer, parameters, train_run
from tests.support.weights import plain_losses
from wmtp.algorithms.history import History
from wmtp.checkpoint.state import Snapshot, split_objective_state
from wmtp.checkpoint.store import CheckpointStore, load
from wmtp.data.collate import IGNORED, Batch, collate
from wmtp.data.dataset import Dataset
from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError
from wmtp.objectives.loss_history import LossHistory
from wmtp.objectives.mtp import MtpObjective
from wmtp.ops.targets import targets
from wmtp.training.trainer import Trainer

OPTIONS = ["algo=history", "algo.temperature=0.2", "data.num_train=24", "batch_size=8", "num_epochs=3"]


def epoch_batches(data: Dataset, epoch: int, size: int = 8) -> list[list[Batch]]:
    return [data.micro_batches(epoch, update, 8, size) for update in range(5)]


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 3])
def test_weights_are_exponentials_of_the_decrease_since_the_previous_epoch(tiny_data: Dataset, size: int) -> None:
    """The losses of the first epoch are computed again, from all logits of another model with the same weights."""
    then, now = tiny_model(seed=0), tiny_model(seed=1)
    with torch.no_grad():
        now.norm.weight.mul_(3)
    objective = MtpObjective(History(rescale=False), history=LossHistory(tiny_data.train, Processes.single_process()))
    before: dict[str, Tensor] = {}
    for batches in epoch_batches(tiny_data, 0, size):
        for prepared in objective.prepare(then, batches):
            _, sums = objective.loss(then, prepared)
            assert objective.metrics(sums)["weight_min"] == objective.metrics(sums)["weight_max"] == 1
            losses = plain_losses(then, prepared.batch)
            for row, (name, labels) in enumerate(zip(prepared.batch.record_ids, prepared.batch.labels, strict=True)):
                length = int((labels != IGNORED).nonzero().max()) + 1
                before[name] = losses[:, row, :length]
    checked = 0
    for batches in epoch_batches(tiny_data, 1, size):
        for prepared in objective.prepare(now, batches):
            batch = prepared.batch
            expected = torch.ones(now.num_heads, *batch.tokens.shape, dtype=torch.double)
            for row, name in enumerate(batch.record_ids):
                length = before[name].shape[1]
                progress = before[name] - plain_losses(now, batch)[:, row, :length]
                expected[:, row, :length] = progress.exp().clamp(0.1, 5.0)
            target = targets(batch.labels, now.num_heads)
            weights = prepared.weights
            if weights is None:
                shares = (target != IGNORED).float()
                _, _, weights = objective._weighted_sum(now(batch.tokens), now, prepared, target, shares)
            valid = target != IGNORED
            assert torch.allclose(weights[valid].double(), expected[valid], atol=1e-4)
            assert expected[valid].std() > 0.1, "the control: the weights differ"
            objective.loss(now, prepared)
            checked += int(valid.sum())
    assert checked > 1000


def test_losses_of_other_samples_and_losses_that_are_not_finite_are_unknown(tiny_data: Dataset) -> None:
    history = LossHistory(tiny_data.train, Processes.single_process())
    ((first,), (second,), *_) = epoch_batches(tiny_data, 0)
    losses = torch.rand(4, *first.tokens.shape)
    losses[2, 1, 5] = torch.inf
    history.record(first, losses)
    found = history.previous(first, 4)
    assert torch.equal(found[found.isfinite()], losses[found.isfinite()]) and found[2, 1, 5].isnan()
    assert history.previous(second, 4).isnan().all()
    unknown = replace(first, record_ids=tuple(f"other {name}" for name in first.record_ids))
    assert history.previous(unknown, 4).isnan().all(), "as for validation samples"


def record_own_half(data: Dataset, folder: Path) -> dict[str, Any]:
    """Record the losses of this rank's samples, and return the known losses before and after an epoch.

    The losses are also saved in checkpoints of both formats, and loaded from them.
    """
    processes = Processes()
    history = LossHistory(data.train, processes)
    everything = [batch for batches in epoch_batches(data, 0) for batch in batches]
    for number, batch in enumerate(everything):
        history.begin_update(batch)
        if number % 2 == processes.rank:
            history.record(batch, torch.full((4, *batch.tokens.shape), float(number)))

    def known() -> list[float]:
        found = [history.previous(batch, 4)[:, 0, 0] for batch in everything]
        return [float(x[0]) if x.isfinite().all() else -1 for x in found]

    before = known()
    history.begin_update(data.micro_batches(1, 0, 8, 8)[0])
    result: dict[str, Any] = {"before": before, "after": known()}
    tensors, state = split_objective_state(history.state_dict())
    formats: tuple[Literal["whole", "sharded"], ...] = ("whole", "sharded")
    for form in formats:
        store = CheckpointStore(folder / form, processes, format=form)
        saved = store.save(1, Snapshot({}, tensors, {"objective": state}))
        history = LossHistory(data.train, processes)
        history.load_state_dict(load(saved).objective_state())
        result[form] = known()
    return result


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
def test_every_rank_receives_the_losses_of_all_ranks_when_an_epoch_begins(
    ranks: Ranks, tiny_data: Dataset, tmp_path: Path
) -> None:
    first, second = ranks(record_own_half, replace(tiny_data), tmp_path)  # a copy that has not cached its batches
    assert first["before"] == [0, -1, 2, -1, 4] and second["before"] == [-1, 1, -1, 3, -1]
    for rank in (first, second):
        assert rank["after"] == rank["whole"] == rank["sharded"] == [0, 1, 2, 3, 4]


def train(trainer: Trainer, count: int) -> list[dict[str, float]]:
    return [trainer.train_update() for _ in range(count)]


@pytest.mark.slow
def test_a_run_that_is_resumed_within_an_epoch_has_the_same_weights(tmp_path: Path) -> None:
    whole = make_trainer(tmp_path / "whole", *OPTIONS)
    assert all(metrics["train/weight_std"] < 1e-3 for metrics in train(whole, whole.plan.updates_per_epoch))
    train(whole, 1)
    saved = copy.deepcopy(whole.snapshot())
    saved.state = json.loads(json.dumps(saved.state))
    rest = train(whole, 4)
    assert all(metrics["train/weight_std"] > 0.05 for metrics in rest)

    def resumed(tensors: dict[str, Tensor]) -> tuple[list[dict[str, float]], Tensor]:
        trainer = make_trainer(tmp_path / "resumed", *OPTIONS)
        trainer.restore(replace(saved, optimizer=tensors))
        return train(trainer, 4), parameters(trainer.model)

    metrics, values = resumed(saved.optimizer)
    assert metrics == rest and torch.equal(values, parameters(whole.model))
    without = {name: tensor for name, tensor in saved.optimizer.items() if not name.startswith("objective:")}
    assert len(without) < len(saved.optimizer) and resumed(without)[0] != rest, "the control: without the losses"


def test_the_losses_of_other_training_data_are_not_restored(tiny_data: Dataset, caplog: Any) -> None:
    history = LossHistory(tiny_data.train, Processes.single_process())
    ((batch,), *_) = epoch_batches(tiny_data, 0)
    history.record(batch, torch.ones(4, *batch.tokens.shape))
    for split, is_known in ((tiny_data.train, True), (tiny_data.train.first(39), False)):
        restored = LossHistory(split, Processes.single_process())
        restored.load_state_dict(history.state_dict())
        assert bool(restored.previous(batch, 4).isfinite().any()) is is_known
        assert ("training data have changed" in caplog.text) is not is_known


def test_losses_in_the_form_of_an_earlier_version_are_refused(tiny_data: Dataset) -> None:
    history = LossHistory(tiny_data.train, Processes.single_process())
    with pytest.raises(InputError, match="earlier form"):
        history.load_state_dict({"history": {"data": "x", "losses": "eJw="}})


def test_the_state_of_another_algorithm_is_not_loaded(tmp_path: Path) -> None:
    saved = make_trainer(tmp_path / "critic", *OPTIONS[2:]).snapshot()
    trainer = make_trainer(tmp_path / "history", *OPTIONS)
    with pytest.raises(InputError, match="objective"):
        trainer.restore(saved)
    assert "objective" in trainer.restore(saved, ["objective"])
    train(trainer, 1)


def test_the_first_samples_of_a_split_keep_their_tokens_and_labels(tiny_data: Dataset) -> None:
    whole = tiny_data.train.with_columns(harmful=np.arange(len(tiny_data.train.samples.tokens)) % 3 == 0)
    part = whole.first(5)
    expected, found = (collate(split, [1, 4], padding=0) for split in (whole, part))
    assert len(part) == 5 and found.record_ids == expected.record_ids
    assert torch.equal(found.labels, expected.labels) and torch.equal(found.harmful, expected.harmful)
    assert len(whole.first(99)) == len(whole) and len(whole.first(0)) == 0


@pytest.mark.slow
def test_the_weights_of_training_solutions_are_measured(tmp_path: Path) -> None:
    train_run(tmp_path, *OPTIONS, "data.noise=0.5", "num_epochs=2")
    content = json.loads((tmp_path / "tokens.json").read_text())
    assert content["split"] == "train"
    weights = [token["weight"] for sample in content["samples"] for token in sample["tokens"]]
    assert max(weights) > min(weights) + 0.01, "the control: weights of validation solutions are 1"
    assert json.loads((tmp_path / "summary.json").read_text())["weights"].keys() >= {"noise_auc"}


def test_a_run_of_one_epoch_says_that_all_weights_are_one(tmp_path: Path) -> None:
    from wmtp.training.dry_run import describe_training

    text = "no second epoch"
    assert text in describe_training(make_trainer(tmp_path, *OPTIONS, "num_epochs=1"))
    assert text not in describe_training(make_trainer(tmp_path, *OPTIONS))
    assert text not in describe_training(make_trainer(tmp_path, "num_epochs=1"))
