"""Tests of nonfinite losses and gradients: no rank makes the update, and all ranks report the reason."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.support.ranks import Ranks
from tests.support.training import STRATEGIES, digest, make_trainer, parameters
from tests.unit.training.test_early_stopping import MissesNan
from wmtp.algorithms.base import Observations
from wmtp.data.collate import Batch
from wmtp.data.dataset import Dataset
from wmtp.errors import TrainingError
from wmtp.models.value_heads import StateValueHead
from wmtp.training.early_stopping import EarlyStopping
from wmtp.training.nonfinite import FiniteCheck
from wmtp.training.trainer import Trainer

ALGORITHMS = ("baseline", "critic_state", "rho1")
SAMPLE = [("baseline", "ddp"), ("critic_state", "ddp"), ("rho1", "fsdp")]
REST = [(name, strategy) for name in ALGORITHMS for strategy in STRATEGIES if (name, strategy) not in SAMPLE]


class FinalState(NamedTuple):
    """The state of one rank after training with nonfinite batches."""

    error: str | None
    step: int
    skipped: int
    hashes: list[str]
    """Hashes of all parameters before the first update, after each update, and at the end."""
    nan_share: float
    nan_records: list[str]
    """Ids of the records in the nonfinite batches."""


def with_nan(batch: Batch) -> Batch:
    """Return the batch with rewards and reference losses of NaN."""
    losses = batch.reference_losses
    return replace(
        batch, rewards=batch.rewards * math.nan, reference_losses=None if losses is None else losses * math.nan
    )


def train_with_nan(
    folder: Path, overrides: Sequence[str], updates: Sequence[int], has_check: bool = True
) -> FinalState:
    """Train as one rank or alone; the last process gets NaN in the given updates.

    The baseline uses neither rewards nor reference losses, so its weights become NaN instead.
    """
    trainer = make_trainer(folder, "max_steps=4", "eval_interval=99", *overrides)
    processes, make_batches, records = trainer.processes, trainer.data.micro_batches, []
    compute_weights, update = trainer.objective.algorithm.weights, trainer.train_update  # type: ignore[attr-defined]

    def is_nan_update() -> bool:
        return processes.rank == processes.size - 1 and trainer.position.step + 1 in updates

    def micro_batches(*arguments: Any) -> list[Batch]:
        batches = make_batches(*arguments)
        if not is_nan_update():
            return batches
        records.extend(record for batch in batches for record in batch.record_ids)
        return [with_nan(batch) for batch in batches]

    def weights(observed: Observations) -> torch.Tensor:
        factor = math.nan if is_nan_update() and trainer.model.training else 1.0
        return compute_weights(observed) * (factor if "algo=baseline" in overrides else 1.0)

    def train_update() -> dict[str, float]:
        metrics = update()
        hashes.append(digest(parameters(trainer.model)))
        return metrics

    error, hashes = None, [digest(parameters(trainer.model))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "micro_batches", lambda _, *arguments: micro_batches(*arguments))
        patch.setattr(trainer.objective.algorithm, "weights", weights)  # type: ignore[attr-defined]
        patch.setattr(trainer, "train_update", train_update)
        if not has_check:
            patch.setattr(FiniteCheck, "passes", lambda *arguments: True)
        try:
            trainer.fit()
        except TrainingError as problem:
            error = str(problem)
    end = parameters(trainer.model)
    hashes.append(digest(end))
    nan_share = float(torch.isnan(end).float().mean())
    return FinalState(error, trainer.position.step, trainer.finite_check.num_skipped, hashes, nan_share, records)


def train_all_variants(folder: Path, overrides: Sequence[str]) -> list[FinalState]:
    skip = [*overrides, "on_nonfinite=skip", "max_skipped_updates=2"]
    return [
        train_with_nan(folder / "stop", overrides, (2,)),
        train_with_nan(folder / "skip", skip, (2,)),
        train_with_nan(folder / "limit", skip, (2, 3, 4)),
        train_with_nan(folder / "control", overrides, (2,), has_check=False),
    ]


def check_stop(final: FinalState, location: str, nan_records: list[str]) -> None:
    assert final.error is not None and final.error.startswith("update 2: the loss is nan")
    ((found_location, measured, records),) = re.findall(r"\n(.*)[Nn]ot finite: (.*); records: (.*)", final.error)
    assert found_location == location and "loss" in measured.split(", ") and records.split(", ") == nan_records
    assert final.step == 1 and final.nan_share == 0
    start, first, end = final.hashes
    assert start != first == end, "the refused update changed the parameters"


def check_skip(final: FinalState) -> None:
    assert (final.error, final.step, final.skipped, final.nan_share) == (None, 4, 1, 0.0)
    assert final.hashes[1] == final.hashes[2] and len(set(final.hashes)) == 4


def check_limit(final: FinalState) -> None:
    assert final.error is not None and "More than max_skipped_updates=2 updates" in final.error
    assert final.error.startswith("update 4: ") and final.step == 3 and final.nan_share == 0


@pytest.mark.slow
@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize(
    ("algorithm", "strategy"), [*SAMPLE, *(pytest.param(*one, marks=pytest.mark.deep) for one in REST)]
)
def test_a_nonfinite_batch_of_one_process_stops_or_skips_the_update_in_both(
    ranks: Ranks, tmp_path: Path, cache: Path, algorithm: str, strategy: str
) -> None:
    overrides = [f"cache_dir={cache}", f"algo={algorithm}", *STRATEGIES[strategy]]
    first, second = ranks(train_all_variants, tmp_path, overrides, timeout=60)
    for mine, other in zip(first, second, strict=True):
        assert mine.hashes == other.hashes, "the processes have different parameters"
    for rank, (stop, skip, limit, control) in enumerate((first, second)):
        check_stop(stop, "In process 1: ", second[0].nan_records)
        check_skip(skip)
        check_limit(limit)
        assert control.nan_share == 1.0, f"without the check, process {rank} has parameters other than NaN"
        for check in (check_skip, check_limit):
            with pytest.raises(AssertionError):
                check(control)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_single_process_stops_or_skips_in_the_same_way(tmp_path: Path, cache: Path, algorithm: str) -> None:
    stop, skip, limit, control = train_all_variants(tmp_path, [f"cache_dir={cache}", f"algo={algorithm}"])
    check_stop(stop, "", stop.nan_records)
    check_skip(skip)
    check_limit(limit)
    assert control.nan_share == 1.0


# Early stopping after skipped updates

UPDATES = 20
SKIPPING = [
    "on_nonfinite=skip",
    f"max_skipped_updates={UPDATES}",
    f"max_steps={UPDATES}",
    "eval_interval=5",
    "num_epochs=4",
]


def train_from_nonfinite_update(
    folder: Path, overrides: Sequence[str], source: str, first: int, stopper: EarlyStopping
) -> Trainer:
    """Train with skipping; from the update `first` on, the loss, the gradient or the values are nonfinite."""
    trainer = make_trainer(folder, *SKIPPING, *overrides)
    trainer.early_stopping = stopper

    def is_nonfinite() -> bool:
        return trainer.model.training and trainer.position.step + 1 >= first

    if source == "loss":
        algorithm = trainer.objective.algorithm  # type: ignore[attr-defined]
        compute_weights = algorithm.weights
        algorithm.weights = lambda observed: compute_weights(observed) * (math.nan if is_nonfinite() else 1.0)
    if source == "gradient":
        trainer.model.norm.weight.register_hook(lambda gradient: gradient * (math.inf if is_nonfinite() else 1.0))
    if source == "values":
        assert isinstance(trainer.model.value_head, StateValueHead)
        trainer.model.value_head.register_forward_hook(
            lambda module, inputs, values: values * (math.nan if is_nonfinite() else 1.0)
        )
    trainer.fit()
    return trainer


@pytest.mark.slow
@pytest.mark.parametrize("source", ["loss", "gradient"])
def test_skipped_updates_count_as_unstable(tmp_path: Path, cache: Path, source: str) -> None:
    def train_with(stopper: EarlyStopping) -> Trainer:
        return train_from_nonfinite_update(
            tmp_path / type(stopper).__name__, [f"cache_dir={cache}"], source, 1, stopper
        )

    trainer = train_with(EarlyStopping(window=10, ratio=0.7))
    assert (trainer.position.step, trainer.finite_check.num_skipped) == (10, 10)
    assert trainer.early_stopping.reason == "unstable: 10 of the last 10 gradient norms exceeded 50"
    assert math.isfinite(trainer.best.metrics["val/loss"])
    if source == "loss":
        control = train_with(MissesNan(window=10, ratio=0.7))
        assert (control.position.step, control.early_stopping.reason) == (UPDATES, None), (
            "the naive stopper detected NaN"
        )


def test_a_nonfinite_loss_is_no_improvement(tmp_path: Path, cache: Path) -> None:
    stopper = EarlyStopping(monitor="train/loss", patience=8)
    trainer = train_from_nonfinite_update(tmp_path, [f"cache_dir={cache}"], "loss", 3, stopper)
    assert trainer.position.step == 10, "the run did not stop after two improvements and eight nonfinite losses"
    best = stopper.metrics()["early_stopping/best"]
    assert math.isfinite(best) and stopper.metrics()["early_stopping/counter"] == 8
    naive = [5.0, 4.0, math.nan, 3.0]
    assert not any(value < math.nan for value in naive), "the control: a value can be better than NaN"


@pytest.mark.slow
def test_a_nonfinite_variance_is_out_of_range(tmp_path: Path, cache: Path) -> None:
    overrides = [f"cache_dir={cache}", "algo=critic_state"]
    trainer = train_from_nonfinite_update(tmp_path, overrides, "values", 4, EarlyStopping(variance_max=100.0))
    assert trainer.early_stopping.reason == "out of range: value variance nan is not finite"
    assert (trainer.position.step, trainer.finite_check.num_skipped) == (4, 1)
    without = train_from_nonfinite_update(tmp_path / "control", overrides, "values", 4, EarlyStopping(window=10))
    assert without.position.step > 4, "the control: another criterion stopped the run"
