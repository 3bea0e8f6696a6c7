"""Tests of reward: its weights against the published formula, its constant, and the controls that may wrap it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import Invoke, tiny_model
from tests.support.weights import trained_weights
from tests.unit.objectives.test_objectives import ragged
from wmtp.algorithms.base import Observations, clip_weights
from wmtp.algorithms.controls import Random, Shuffled
from wmtp.algorithms.critic import Critic
from wmtp.algorithms.reward import Reward
from wmtp.data.collate import IGNORED
from wmtp.data.dataset import Dataset
from wmtp.errors import InputError
from wmtp.ops.targets import targets


def test_unscaled_weights_are_the_published_ones_for_all_heads(tiny_data: Dataset) -> None:
    """The published weight is exp((R − V) / β); here V is the mean reward of the training data."""
    model, batch = tiny_model(), ragged()
    rewards = np.linspace(0, 0.6, len(tiny_data.train), dtype=np.float32)
    algorithm = Reward(beta=0.7, rescale=False)
    algorithm.prepare(tiny_data.train.with_columns(rewards=rewards))
    valid = targets(batch.labels, model.num_heads) != IGNORED

    def agrees(weights: Tensor, baseline: float, sign: int = 1) -> bool:
        return all(
            math.isclose(
                weights[k, row, t].item(),
                math.exp(sign * (batch.rewards[row].item() - baseline) / 0.7),
                abs_tol=1e-6,
            )
            for k, row, t in valid.nonzero().tolist()
        )

    for weights in trained_weights(algorithm, model, batch):
        assert agrees(weights, 0.3)
        assert not weights[~valid].any()
        assert not agrees(weights, batch.rewards.mean().item()), "the control: the mean of the batch"
        assert not agrees(weights, 0.0)
        assert not agrees(weights, 0.3, sign=-1)


def test_weights_are_clipped() -> None:
    algorithm = Reward(beta=0.01)
    algorithm.mean_reward = 0.5
    observed = Observations(torch.ones(1, 3, 1) > 0, torch.ones(3, 1) > 0, rewards=torch.tensor([0.0, 0.5, 1e6]))
    clipped = clip_weights(algorithm.weights(observed), observed.valid, algorithm.weight_min, algorithm.weight_max)
    assert clipped.flatten().tolist() == pytest.approx([0.1, 1.0, 5.0])


def test_a_permutation_within_each_solution_is_refused(invoke: Invoke) -> None:
    with pytest.raises(InputError, match="choose algo=random instead"):
        Shuffled(of=Reward())
    Shuffled(of=Critic())
    Random(of=Reward())
    outcome = invoke("algo=shuffled", "algo.of=reward")
    assert outcome.code == 2 and "Reward gives all targets of a solution the same weight" in outcome.err


def train_metrics(folder: Path) -> dict[str, float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {name: value for line in found for name, value in line.items() if name.startswith("train/")}


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["algo=reward"], ["algo=random", "algo.of=reward"]])
def test_a_run_trains_with_the_mean_reward_of_its_data(invoke: Invoke, tmp_path: Path, arguments: list[str]) -> None:
    """Half of the solutions are incorrect, so the unscaled weights are exp(±0.5)."""
    run = ["max_steps=1", "num_samples=0", *arguments]
    wrapped = "algo.of." if len(arguments) > 1 else "algo."
    outcome = invoke(*run, f"{wrapped}rescale=false", "hydra.run.dir=run")
    assert outcome.code == 0, outcome.err
    metrics = train_metrics(tmp_path / "run")
    if len(arguments) == 1:
        assert metrics["train/weight_min"] == pytest.approx(math.exp(-0.5), rel=1e-6)
        assert metrics["train/weight_max"] == pytest.approx(math.exp(0.5), rel=1e-6)
    else:
        assert metrics["train/weight_mean"] != pytest.approx(1.0, abs=1e-4)
    dry = invoke(*run, "dry_run=true")
    assert dry.code == 0, dry.err


def test_data_without_incorrect_solutions_are_refused(invoke: Invoke) -> None:
    outcome = invoke("algo=reward", "data.correct_ratio=1")
    assert outcome.code == 2 and "gives every solution the same reward" in outcome.err
    outcome = invoke("algo=reward", "data.correct_ratio=null", "data.curated=true")
    assert outcome.code == 2 and "every training sample has the reward 1" in outcome.err
