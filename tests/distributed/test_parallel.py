"""Tests that training in two processes gives the results of training in one process, for each algorithm."""

import functools
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.conftest import compose_config
from tests.support.ranks import Ranks
from tests.support.training import COMMON, STRATEGIES, make_trainer, metrics_of, train_run
from wmtp.distributed.parallelize import synchronize_gradients
from wmtp.distributed.process_group import Processes
from wmtp.objectives.base import total_denominators
from wmtp.training import trainer as trainer_module
from wmtp.training.dry_run import dry_run

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.slow]

STAGE_1 = ["pretrain.max_steps=3", "pretrain.num_epochs=1"]
ALGORITHMS = {
    "baseline": [],
    "critic": ["algo=critic", *STAGE_1],
    "rho1": ["algo=rho1", *STAGE_1],
    "rho1_token_skip": ["algo=rho1_token_skip", *STAGE_1],
    "shuffled": ["algo=shuffled", "algo/of=rho1", *STAGE_1],
    "random": ["algo=random", *STAGE_1],
    "dft": ["algo=dft"],
    "focal": ["algo=focal", "algo.gamma=100"],  # with 2, the first weights differ by little more than rounding errors
    "entropy": ["algo=entropy"],
    "history": ["algo=history", "algo.temperature=0.3"],
    "reward": ["algo=reward"],
    "prior": ["algo=prior", "algo.reference=null", "pretrain=rho1", *STAGE_1],
    "cleaning": ["algo=cleaning", *STAGE_1],
    "surprisal": ["algo=surprisal", *STAGE_1],
    "implicit_reward": ["algo=implicit_reward", *STAGE_1],
    "contrast": ["algo=contrast", "algo.beta=0.15", "pretrain.optimizer.lr=0.01", *STAGE_1],  # with 1, see focal
}
"""Overrides by algorithm."""
SAMPLE = [
    ("baseline", "ddp", 7), ("baseline", "fsdp", 20), ("critic", "ddp", 7), ("critic", "fsdp", 7), ("rho1", "ddp", 7),
    ("rho1", "fsdp", 7), ("history", "ddp", 20),
    ("rho1_token_skip", "ddp", 7), ("shuffled", "ddp", 7), ("random", "ddp", 7),
]  # fmt: skip
"""Algorithm, strategy and number of updates. The last three algorithms weight the outputs of the same models."""
REST = [(name, strategy, 20) for name in ALGORITHMS for strategy in STRATEGIES if (name, strategy, 20) not in SAMPLE]
UNEVEN = "data.num_train=43"
"""An override: five updates of four micro-batches, then one of three samples in micro-batches of two and one."""


def differences(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, float]:
    """Return the largest relative difference of each metric between two runs."""
    assert len(one) == len(other)
    found: dict[str, float] = {}
    for metrics, other_metrics in zip(one, other, strict=True):
        assert metrics.keys() == other_metrics.keys()
        for name, value in metrics.items():
            difference = abs(value - other_metrics[name]) / max(abs(value), 1e-3)
            found[name] = max(found.get(name, 0.0), difference)
    return found


def worst_loss(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """Return the largest relative difference between the losses of two runs."""
    return max(value for name, value in differences(one, other).items() if name.endswith("loss"))


@functools.cache
def train_alone(*overrides: str) -> "tempfile.TemporaryDirectory[str]":
    """Train in this process and return the run's folder. Runs with equal overrides are trained once."""
    folder = tempfile.TemporaryDirectory()
    train_run(Path(folder.name), *overrides)
    return folder


def train_twice(
    ranks: Ranks, folder: Path, overrides: Sequence[str], *options: str, strategies: Sequence[str] = tuple(STRATEGIES)
) -> list[float]:
    """Return the largest loss difference between one process and two, for each strategy.

    `options` are overrides for two processes only.
    """
    alone, found = metrics_of(shutil.copytree(train_alone(*overrides).name, folder / "alone")), []
    for strategy in strategies:
        first, second = ranks(train_run, folder / strategy, *overrides, *STRATEGIES[strategy], *options, timeout=60)
        assert first == second, "both ranks read the same file, which only rank 0 writes"
        found.append(worst_loss(alone, first))
    return found


def check_other_metrics(alone: Path, together: Path) -> None:
    """Check that the metrics other than losses agree, and the tokens and weights in summary.json."""
    rest = differences(metrics_of(alone), metrics_of(together))
    assert max(rest.values()) <= 1e-3, rest
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (alone, together))
    assert one["total_tokens"] == other["total_tokens"] > 0
    assert one["weights"].keys() == other["weights"].keys()
    for name, area in one["weights"].items():
        assert other["weights"][name] == pytest.approx(area, abs=0.01)


@pytest.mark.parametrize(
    ("algorithm", "strategy", "updates"), [*SAMPLE, *(pytest.param(*one, marks=pytest.mark.deep) for one in REST)]
)
def test_losses_equal_those_of_one_process(
    ranks: Ranks, tmp_path: Path, cache: Path, algorithm: str, strategy: str, updates: int
) -> None:
    overrides = [f"cache_dir={cache}", UNEVEN, f"max_steps={updates}", *ALGORITHMS[algorithm]]
    if algorithm == "implicit_reward":
        overrides.append(f"pretrain.start={train_alone(f'cache_dir={cache}', 'max_steps=3').name}")
    assert max(train_twice(ranks, tmp_path, overrides, strategies=[strategy])) <= 1e-6
    check_other_metrics(tmp_path / "alone", tmp_path / strategy)


@pytest.mark.parametrize(
    ("samples", "strategies"),
    [(40, ["ddp"]), pytest.param(40, ["fsdp"], marks=pytest.mark.deep), (41, ["ddp", "fsdp"])],
)
def test_a_full_or_an_empty_last_micro_batch_does_not_change_the_losses(
    ranks: Ranks, tmp_path: Path, cache: Path, samples: int, strategies: Sequence[str]
) -> None:
    overrides = [f"cache_dir={cache}", f"data.num_train={samples}", "max_steps=7"]
    assert max(train_twice(ranks, tmp_path, overrides, strategies=strategies)) <= 1e-6


def train_with_mean_of_means(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train with a loss that each rank divides by its own number of targets."""

    def own_denominators(parts: Sequence[Mapping[str, torch.Tensor]], processes: Processes) -> dict[str, torch.Tensor]:
        own = total_denominators(parts, Processes.single_process())
        return {name: total.clamp(min=1) * processes.size for name, total in own.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("wmtp.objectives.mtp.total_denominators", own_denominators)
        return train_run(folder, *overrides)


def test_control_a_division_on_each_rank_gives_other_losses(ranks: Ranks, tmp_path: Path, cache: Path) -> None:
    overrides = [f"cache_dir={cache}", UNEVEN, "max_steps=7"]
    alone = metrics_of(Path(train_alone(*overrides).name))
    for strategy, hardware in STRATEGIES.items():
        naive, _ = ranks(train_with_mean_of_means, tmp_path / strategy, *overrides, *hardware, timeout=60)
        assert worst_loss(alone, naive) > 1e-4


@pytest.mark.parametrize(
    "options",
    [
        ["reduce_each_micro_batch", "activation_checkpointing"],
        pytest.param(["reduce_each_micro_batch"], marks=pytest.mark.deep),
        pytest.param(["activation_checkpointing"], marks=pytest.mark.deep),
    ],
)
def test_options_that_save_memory_do_not_change_the_training(
    ranks: Ranks, tmp_path: Path, cache: Path, options: list[str]
) -> None:
    overrides = [f"cache_dir={cache}", UNEVEN, "max_steps=7"]
    assert max(train_twice(ranks, tmp_path, overrides, *(f"hardware.{name}=true" for name in options))) <= 1e-6


def test_activations_are_recomputed_with_the_same_dropout(tmp_path: Path, cache: Path) -> None:
    metrics, runs = {}, {}
    for again in ("false", "true"):
        options = ["model.dropout=0.3", f"hardware.activation_checkpointing={again}"]
        trainer = make_trainer(tmp_path, f"cache_dir={cache}", *options)
        calls: list[object] = []
        trainer.model.heads[0].attention.register_forward_hook(lambda *call, calls=calls: calls.append(1))
        metrics[again] = [trainer.train_update() for _ in range(2)]
        runs[again] = len(calls)
    assert runs["true"] == 2 * runs["false"], "each block runs a second time during the backward pass"
    assert metrics["true"] == metrics["false"]


def test_rank_0_generates_the_samples_of_all_ranks(ranks: Ranks, tmp_path: Path, cache: Path) -> None:
    overrides = [f"cache_dir={cache}", "max_steps=3", "eval_interval=2", "num_validation_samples=2", "num_samples=3"]
    train_twice(ranks, tmp_path, overrides)
    alone, *together = [(tmp_path / name / "samples.jsonl").read_text() for name in ("alone", *STRATEGIES)]
    assert len(alone.splitlines()) == 2 + 2 + 3
    assert together == [alone] * 2


# Number of reductions


def count_reductions(folder: Path, overrides: Sequence[str]) -> dict[str, int]:
    """Return the number of reductions in an update of four micro-batches.

    "default": without options; "option": with `hardware.reduce_each_micro_batch`; "torch": as torch does by default.
    """
    counts = {}
    for name, options in {"default": [], "option": ["hardware.reduce_each_micro_batch=true"], "torch": []}.items():
        trainer = make_trainer(folder, "batch_size=16", "model.num_heads=1", *overrides, *options)
        batches = trainer._next_micro_batches()
        assert len(batches) == 4
        trainer._accumulate_gradients(batches[:1])
        trainer.optimizer.zero_grad()
        with pytest.MonkeyPatch.context() as patch, profile(activities=[ProfilerActivity.CPU]) as profiled:
            if name == "torch":
                patch.setattr(trainer_module, "synchronize_gradients", lambda model, now: None)
                synchronize_gradients(trainer.model, True)
            trainer._accumulate_gradients(batches)
        kinds = ("c10d::allreduce_", "c10d::_reduce_scatter_base_", "c10d::reduce_scatter_")
        counts[name] = sum(event.count for event in profiled.key_averages() if event.key in kinds)
    return counts


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_are_reduced_once_per_update(ranks: Ranks, tmp_path: Path, cache: Path, strategy: str) -> None:
    first, second = ranks(count_reductions, tmp_path, [f"cache_dir={cache}", *STRATEGIES[strategy]], timeout=30)
    assert first == second
    num_counts = 1  # the reduction of the number of targets, by which the loss is divided
    gradients = first["default"] - num_counts
    assert gradients >= 1
    assert first["torch"] - num_counts == 4 * gradients, "control: by default, torch reduces in each micro-batch"
    assert first["option"] == first["torch"]


# Precision and compiler


def test_bf16_trains_under_fsdp(ranks: Ranks, tmp_path: Path, cache: Path) -> None:
    overrides = [f"cache_dir={cache}", "max_steps=10"]
    (worst,) = train_twice(ranks, tmp_path, overrides, "hardware.precision=bf16", strategies=["fsdp"])
    assert 1e-6 < worst < 0.02, "the precision differs, but the training is the same"


def one_update(folder: Path, overrides: Sequence[str]) -> tuple[dict[str, float], int]:
    """Return the metrics of one update of a model with one block, and the number of compiled graphs."""
    torch._dynamo.utils.counters.clear()
    trainer = make_trainer(folder, "model.num_layers=1", "model.num_heads=1", "batch_size=4", *overrides)
    metrics = trainer.train_update()
    return metrics, torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler for the CPU")
def test_compiled_blocks_do_not_change_the_training(ranks: Ranks, tmp_path: Path, cache: Path) -> None:
    overrides = [f"cache_dir={cache}"]
    alone, graphs = one_update(tmp_path, overrides)
    assert graphs == 0
    compiled = [*overrides, *STRATEGIES["fsdp"], "hardware.compile=true"]
    for metrics, graphs in ranks(one_update, tmp_path, compiled, timeout=60):
        assert graphs > 0
        assert worst_loss([alone], [metrics]) <= 1e-5
        assert metrics["train/grad_norm"] == pytest.approx(alone["train/grad_norm"], rel=1e-4)


def checkpoints_of_dry_run(folder: Path, *overrides: str) -> list[Path]:
    """Return the checkpoints that a dry run leaves in its folder."""
    dry_run(compose_config(*COMMON, *overrides, f"cache_dir={folder}"), folder)
    return list(folder.glob("**/step_*"))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_dry_run_runs_both_stages_on_all_ranks(ranks: Ranks, tmp_path: Path, strategy: str) -> None:
    """A model can be parallelized only once, so stage 2 needs a new one."""
    assert ranks(checkpoints_of_dry_run, tmp_path, "algo=critic", *STRATEGIES[strategy], timeout=60) == [[], []]
