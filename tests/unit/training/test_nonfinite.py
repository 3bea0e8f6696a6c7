"""Test losses and gradients that are not finite: no rank makes the update, and all ranks report the reason."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.support.ranks import Ranks
from tests.support.training import BOTH, digest, parameters, trainer_in
from tests.unit.training.test_early_stopping import MissesNan
from wmtp.algorithms.base import Observations
from wmtp.data.collate import Batch
from wmtp.errors import TrainingError
from wmtp.models.heads import ValueHead
from wmtp.training.early_stopping import EarlyStopping
from wmtp.training.nonfinite import FiniteGate
from wmtp.training.trainer import Trainer

ALGORITHMS = ("baseline", "critic", "rho1")


class Ended(NamedTuple):
    """The state of one rank in a training with invalid batches."""

    error: str | None
    step: int
    skipped: int
    hashes: list[str]
    """Of all parameters, before the first update, after each, and at the end."""
    nan_share: float
    spoiled: list[str]
    """The records of the batches."""


def spoil(batch: Batch) -> Batch:
    """A batch of which all that was measured before is NaN."""
    losses = batch.reference_losses
    return replace(
        batch, rewards=batch.rewards * math.nan, reference_losses=None if losses is None else losses * math.nan
    )


def train_with_spoiled_batches(
    folder: Path, overrides: Sequence[str], updates: Sequence[int], gated: bool = True
) -> Ended:
    """Train as a rank, or alone; the last process gets NaN in some updates. The baseline, which needs nothing of a
    batch but its tokens, gets weights that are NaN."""
    trainer = trainer_in(folder, "max_steps=4", "eval_interval=99", *overrides)
    processes, give, records = trainer.processes, trainer.data.micro_batches, []
    weigh, update = trainer.objective.algorithm.weights, trainer.train_update  # type: ignore[attr-defined]

    def is_spoiled() -> bool:
        return processes.rank == processes.size - 1 and trainer.position.step + 1 in updates

    def micro_batches(*arguments: Any) -> list[Batch]:
        batches = give(*arguments)
        if not is_spoiled():
            return batches
        records.extend(record for batch in batches for record in batch.record_ids)
        return [spoil(batch) for batch in batches]

    def weights(observed: Observations) -> torch.Tensor:
        factor = math.nan if is_spoiled() and trainer.model.training else 1.0
        return weigh(observed) * (factor if "algo=baseline" in overrides else 1.0)

    def train_update() -> dict[str, float]:
        metrics = update()
        hashes.append(digest(parameters(trainer.model)))
        return metrics

    error, hashes = None, [digest(parameters(trainer.model))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.data, "micro_batches", micro_batches)
        patch.setattr(trainer.objective.algorithm, "weights", weights)  # type: ignore[attr-defined]
        patch.setattr(trainer, "train_update", train_update)
        if not gated:
            patch.setattr(FiniteGate, "passes", lambda *arguments: True)
        try:
            trainer.fit()
        except TrainingError as problem:
            error = str(problem)
    end = parameters(trainer.model)
    hashes.append(digest(end))
    nan_share = float(torch.isnan(end).float().mean())
    return Ended(error, trainer.position.step, trainer.gate.num_skipped, hashes, nan_share, records)


def stopped_skipped_limited_ungated(folder: Path, overrides: Sequence[str]) -> list[Ended]:
    skip = [*overrides, "on_nonfinite=skip", "max_skipped_updates=2"]
    return [
        train_with_spoiled_batches(folder / "stop", overrides, (2,)),
        train_with_spoiled_batches(folder / "skip", skip, (2,)),
        train_with_spoiled_batches(folder / "limit", skip, (2, 3, 4)),
        train_with_spoiled_batches(folder / "control", overrides, (2,), gated=False),
    ]


def check_stop(ended: Ended, where: str, spoiled: list[str]) -> None:
    assert ended.error is not None and ended.error.startswith("update 2: the loss is nan")
    ((place, measured, records),) = re.findall(r"\n(.*)[Nn]ot finite: (.*); records: (.*)", ended.error)
    assert place == where and "loss" in measured.split(", ") and records.split(", ") == spoiled
    assert ended.step == 1 and ended.nan_share == 0
    start, first, end = ended.hashes
    assert start != first == end, "the parameters are those of the update before"


def check_skip(ended: Ended) -> None:
    assert (ended.error, ended.step, ended.skipped, ended.nan_share) == (None, 4, 1, 0.0)
    assert ended.hashes[1] == ended.hashes[2] and len(set(ended.hashes)) == 4


def check_limit(ended: Ended) -> None:
    assert ended.error is not None and "More than max_skipped_updates=2 updates" in ended.error
    assert ended.error.startswith("update 4: ") and ended.step == 3 and ended.nan_share == 0


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("strategy", BOTH)
def test_a_batch_of_one_process_that_is_not_finite_stops_or_skips_the_update_in_both(
    ranks: Ranks, tmp_path: Path, cache: Path, algorithm: str, strategy: str
) -> None:
    overrides = [f"cache_dir={cache}", f"algo={algorithm}", *BOTH[strategy]]
    first, second = ranks(stopped_skipped_limited_ungated, tmp_path, overrides, timeout=60)
    for mine, other in zip(first, second, strict=True):
        assert mine.hashes == other.hashes, "the processes agree bit for bit"
    for rank, (stop, skip, limit, control) in enumerate((first, second)):
        check_stop(stop, "In process 1: ", second[0].spoiled)
        check_skip(skip)
        check_limit(limit)
        assert control.nan_share == 1.0, f"without the gate process {rank} has nothing but NaN"
        for check in (check_skip, check_limit):
            with pytest.raises(AssertionError):
                check(control)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_single_process_behaves_the_same(tmp_path: Path, cache: Path, algorithm: str) -> None:
    stop, skip, limit, control = stopped_skipped_limited_ungated(tmp_path, [f"cache_dir={cache}", f"algo={algorithm}"])
    check_stop(stop, "", stop.spoiled)
    check_skip(skip)
    check_limit(limit)
    assert control.nan_share == 1.0


# Early stopping sees what was skipped

UPDATES = 20
SKIPPING = [
    "on_nonfinite=skip",
    f"max_skipped_updates={UPDATES}",
    f"max_steps={UPDATES}",
    "eval_interval=5",
    "num_epochs=4",
]


def spoiled_run(folder: Path, overrides: Sequence[str], what: str, first: int, stopper: EarlyStopping) -> Trainer:
    """A training that skips; from the update `first` on, the loss, the gradient or the values are not finite."""
    trainer = trainer_in(folder, *SKIPPING, *overrides)
    trainer.early_stopping = stopper

    def broken() -> bool:
        return trainer.model.training and trainer.position.step + 1 >= first

    if what == "loss":
        algorithm = trainer.objective.algorithm  # type: ignore[attr-defined]
        weigh = algorithm.weights
        algorithm.weights = lambda observed: weigh(observed) * (math.nan if broken() else 1.0)
    if what == "gradient":
        trainer.model.norm.weight.register_hook(lambda gradient: gradient * (math.inf if broken() else 1.0))
    if what == "values":
        assert isinstance(trainer.model.value_head, ValueHead)
        trainer.model.value_head.register_forward_hook(
            lambda module, inputs, values: values * (math.nan if broken() else 1.0)
        )
    trainer.fit()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_updates_that_were_skipped_count_as_unstable(tmp_path: Path, cache: Path, what: str) -> None:
    def stopped(stopper: EarlyStopping) -> Trainer:
        return spoiled_run(tmp_path / type(stopper).__name__, [f"cache_dir={cache}"], what, 1, stopper)

    trainer = stopped(EarlyStopping(window=10, ratio=0.7))
    assert (trainer.position.step, trainer.gate.num_skipped) == (10, 10)
    assert trainer.early_stopping.reason == "unstable: 10 of the last 10 gradient norms exceeded 50"
    assert trainer.best_loss is not None and math.isfinite(trainer.best_loss)
    if what == "loss":
        control = stopped(MissesNan(window=10, ratio=0.7))
        assert (control.position.step, control.early_stopping.reason) == (UPDATES, None), "0 of 20 are noticed"


def test_a_loss_that_is_not_finite_is_no_improvement(tmp_path: Path, cache: Path) -> None:
    stopper = EarlyStopping(monitor="train/loss", patience=8)
    trainer = spoiled_run(tmp_path, [f"cache_dir={cache}"], "loss", 3, stopper)
    assert trainer.position.step == 10, "two losses are better each time, then eight are none"
    best = stopper.metrics()["early_stopping/best"]
    assert math.isfinite(best) and stopper.metrics()["early_stopping/counter"] == 8
    naive = [5.0, 4.0, math.nan, 3.0]
    assert not any(value < math.nan for value in naive), "the control: once NaN is the best, nothing is better"


@pytest.mark.slow
def test_a_variance_that_is_not_finite_is_out_of_range(tmp_path: Path, cache: Path) -> None:
    overrides = [f"cache_dir={cache}", "algo=critic"]
    trainer = spoiled_run(tmp_path, overrides, "values", 4, EarlyStopping(variance_max=100.0))
    assert trainer.early_stopping.reason == "out of range: value variance nan is not finite"
    assert (trainer.position.step, trainer.gate.num_skipped) == (4, 1)
    without = spoiled_run(tmp_path / "control", overrides, "values", 4, EarlyStopping(window=10))
    assert without.position.step > 4, "the control: no other criterion stops there"
