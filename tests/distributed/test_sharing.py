"""Tests of sharing work among processes: micro-batches of an update, validation batches, stop reasons and signals."""

import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from tests.support.ranks import Ranks
from tests.support.training import STRATEGIES, gradients, make_trainer
from wmtp.data import dataset as dataset_module
from wmtp.data.collate import Batch
from wmtp.data.sampler import items_for_rank
from wmtp.errors import InterruptedRun
from wmtp.models.mtp import MtpModel
from wmtp.ops.metric_sums import MetricSums
from wmtp.runtime.signals import DeferredSignals
from wmtp.training.trainer import Trainer

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.slow]

# The micro-batches of an update

ELEVEN_MICRO_BATCHES = ["batch_size=22", "micro_batch_size=2", "num_epochs=1", "data.num_train=44", "max_steps=2"]
"""Options of a run with two updates of eleven micro-batches."""


def without_empty_batches(items: Sequence[Any], rank: int, size: int) -> list[Any]:
    return [item for item in items_for_rank(items, rank, size) if item is not None]


def first_gradient(folder: Path, overrides: Sequence[str], naive: bool = False) -> tuple[list[int], np.ndarray]:
    """Return the number of samples of each micro-batch of this process, and the gradient of the update."""
    trainer = make_trainer(folder, *ELEVEN_MICRO_BATCHES, *overrides)
    with pytest.MonkeyPatch.context() as patch:
        if naive:
            patch.setattr(dataset_module, "items_for_rank", without_empty_batches)
        batches = trainer._next_micro_batches()
        trainer._accumulate_gradients(batches)
    if naive:
        time.sleep(4)  # a further collective would interfere with that of the other process, and gloo would abort
        return [], np.empty(0)
    return [len(batch.record_ids) for batch in batches], gradients(trainer.model).numpy()


def count_updates(folder: Path, overrides: Sequence[str]) -> int:
    return make_trainer(folder, *ELEVEN_MICRO_BATCHES, *overrides).fit().total_steps


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_eleven_micro_batches_become_six_and_five_plus_an_empty_one(
    ranks: Ranks, tmp_path: Path, cache: Path, strategy: str
) -> None:
    overrides = [f"cache_dir={cache}"]
    sizes, single_process = first_gradient(tmp_path, overrides)
    assert sizes == [2] * 11
    results = ranks(first_gradient, tmp_path, [*overrides, *STRATEGIES[strategy]])
    assert [sizes for sizes, _ in results] == [[2] * 6, [2] * 5 + [0]]
    for _, gradient in results:
        np.testing.assert_allclose(gradient, single_process, rtol=0, atol=1e-6 * np.abs(single_process).max())
    assert ranks(count_updates, tmp_path, [*overrides, *STRATEGIES[strategy]]) == [2, 2]

    traffic = [*overrides, *STRATEGIES[strategy], "hardware.reduce_each_micro_batch=true"]
    waiting = ranks.outcomes(first_gradient, tmp_path, traffic, True, timeout=3.0)[0]
    assert waiting.error is not None and waiting.seconds > 3, "the control: the process with six forwards does not wait"


# Validation

LOSSES = [1.0, 2.0, 3.0, 4.0, 100.0]


class FixedLosses:
    """An objective with given losses of five samples."""

    def __init__(self, losses: dict[str, float]) -> None:
        self.losses = losses

    def evaluate(self, model: MtpModel, batch: Batch) -> MetricSums:
        found = [self.losses[record] for record in batch.record_ids]
        return MetricSums({"loss": (torch.tensor(sum(found)), torch.tensor(float(len(found))))})

    def metrics(self, sums: MetricSums) -> dict[str, float]:
        return sums.results() | {"count": float(sums.means["loss"][1])}


def validate_fixed_losses(folder: Path, overrides: Sequence[str]) -> dict[str, float]:
    trainer = make_trainer(folder, "data.num_validation=5", "batch_size=2", "micro_batch_size=1", *overrides)
    split = trainer.data.validation
    order = [split.record_ids[split.samples.kept[i]] for (i,) in trainer.data.validation_order(1)]
    trainer.objective = FixedLosses(dict(zip(order, LOSSES, strict=True)))  # type: ignore[assignment]
    trainer.validate()
    return trainer.last_validation


def test_validation_counts_each_of_five_samples_once(ranks: Ranks, tmp_path: Path, cache: Path) -> None:
    overrides = [f"cache_dir={cache}"]
    expected = {"val/loss": 22.0, "val/count": 5.0}
    assert validate_fixed_losses(tmp_path, overrides) == expected
    for hardware in STRATEGIES.values():
        assert ranks(validate_fixed_losses, tmp_path, [*overrides, *hardware]) == [expected] * 2

    def mean_with_torch_sampler(drop_last: bool) -> float:
        samplers = [DistributedSampler(LOSSES, 2, rank, shuffle=False, drop_last=drop_last) for rank in (0, 1)]
        return float(np.mean([LOSSES[index] for sampler in samplers for index in sampler]))

    assert mean_with_torch_sampler(drop_last=False) == 18.5
    assert mean_with_torch_sampler(drop_last=True) == 2.5


def validate(folder: Path, overrides: Sequence[str]) -> dict[str, float]:
    trainer = make_trainer(folder, "data.num_validation=21", "algo=critic", *overrides)
    assert trainer.model.value_head is not None
    for parameter in trainer.model.value_head.parameters():
        torch.nn.init.ones_(parameter)
    trainer.validate()
    return trainer.last_validation


def mean_of_means(folder: Path, overrides: Sequence[str]) -> float:
    trainer = make_trainer(folder, "data.num_validation=21", "algo=critic", *overrides)
    batches = list(trainer.data.validation_batches(trainer.plan.micro_batch_size))
    losses = [trainer.objective.metrics(trainer.objective.evaluate(trainer.model.eval(), b))["loss"] for b in batches]
    return (float(np.mean(losses[::2])) + float(np.mean(losses[1::2]))) / 2


def test_validation_is_bitwise_equal_to_one_process(ranks: Ranks, tmp_path: Path, cache: Path) -> None:
    overrides = [f"cache_dir={cache}"]
    single_process = validate(tmp_path, overrides)
    assert single_process["val/value_variance"] > 0
    for hardware in STRATEGIES.values():
        assert ranks(validate, tmp_path, [*overrides, *hardware]) == [single_process] * 2
    assert abs(mean_of_means(tmp_path, overrides) - single_process["val/loss"]) > 1e-4


# Stopping and signals


def train_until_second_stops(
    folder: Path, overrides: Sequence[str], synchronizes: bool = True
) -> tuple[int, str | None, float]:
    """Train in two processes; only the second has a reason to stop, at the third update.

    Return the last update, the reason, and the seconds since the third update.
    """
    trainer = make_trainer(folder, *overrides)
    observe = trainer.early_stopping.observe_update
    times: list[float] = []

    def _observe(grad_norm: float, value_variance: float | None) -> None:
        observe(grad_norm, value_variance)
        times.append(time.monotonic())
        if trainer.processes.rank == 1 and trainer.position.step == 3:
            trainer.early_stopping.stop("only here")

    trainer.early_stopping.observe_update = _observe  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        if not synchronizes:
            patch.setattr(Trainer, "_synchronize", lambda *arguments: None)
            # a further collective would interfere with that of the other process, and gloo would abort
            patch.setattr(Trainer, "validate", lambda *arguments: time.sleep(4))
            patch.setattr(Trainer, "save", lambda *arguments, **options: None)
        result = trainer.fit()
    return result.total_steps, result.stop_reason, time.monotonic() - times[2]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stop_reason_of_one_process_stops_both_after_the_same_update(
    ranks: Ranks, tmp_path: Path, cache: Path, strategy: str
) -> None:
    overrides = [f"cache_dir={cache}", *STRATEGIES[strategy]]
    for step, reason, seconds in ranks(train_until_second_stops, tmp_path / "run", overrides):
        assert (step, reason) == (3, "only here") and seconds < 5
    control = ranks.outcomes(train_until_second_stops, tmp_path / "control", overrides, False, timeout=3.0)
    assert control[0].error is not None and control[0].seconds > 3, (
        "the control: the first process does not wait for the second"
    )
    assert control[1].value[:2] == (3, "only here")


def keep_signal(trainer: Trainer, signals: DeferredSignals) -> None:
    """Do not share a signal with the other processes."""
    trainer.interrupted_by = signals.received


def train_until_second_is_interrupted(folder: Path, overrides: Sequence[str], shares: bool = True) -> tuple[int, int]:
    """Train in two processes; only the second gets a SIGTERM, at the third update.

    Return the last update and the exit code.
    """
    trainer = make_trainer(folder, *overrides)
    observe = trainer.early_stopping.observe_update

    def _observe(grad_norm: float, value_variance: float | None) -> None:
        observe(grad_norm, value_variance)
        if trainer.processes.rank == 1 and trainer.position.step == 3:
            signal.raise_signal(signal.SIGTERM)

    trainer.early_stopping.observe_update = _observe  # type: ignore[method-assign]
    with pytest.MonkeyPatch.context() as patch:
        if not shares:
            patch.setattr(Trainer, "_synchronize", keep_signal)
            patch.setattr(Trainer, "save", lambda *arguments, **options: None)  # saving is a collective operation
        with pytest.raises(InterruptedRun) as interrupted:
            trainer.fit()
    return trainer.position.step, interrupted.value.exit_code


def test_a_signal_to_one_process_interrupts_both_after_the_same_update(
    ranks: Ranks, tmp_path: Path, cache: Path
) -> None:
    overrides = [f"cache_dir={cache}", *STRATEGIES["ddp"]]
    assert ranks(train_until_second_is_interrupted, tmp_path / "run", overrides) == [(3, 143)] * 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")] == ["step_00000003"]
    control = ranks.outcomes(train_until_second_is_interrupted, tmp_path / "control", overrides, False, timeout=3.0)
    assert control[0].error is not None and control[1].value == (3, 143), "control: the first process trains on alone"
