"""Tests of implicit_reward against the formula in double precision."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Invoke, tiny_model
from tests.support.weights import trained_weights
from wmtp.algorithms.base import Observations
from wmtp.algorithms.implicit_reward import ImplicitReward
from wmtp.data.collate import IGNORED, collate
from wmtp.data.dataset import Dataset
from wmtp.data.split import TokenizedSplit
from wmtp.ops.targets import targets


@pytest.fixture(scope="module")
def split(tiny_data: Dataset) -> TokenizedSplit:
    """Return a training split with random losses of a reward model and of its start."""
    losses = np.random.default_rng(0).exponential(size=(len(tiny_data.train.samples.tokens), 2))
    return tiny_data.train.with_columns(reference_losses=losses.astype(np.float32))


def test_weights_are_exponentials_of_the_log_ratio_normalized_over_the_training_data(split: TokenizedSplit) -> None:
    samples, ratios = split.samples, {}
    assert split.reference_losses is not None
    for index, (start, stop) in enumerate(zip(samples.offsets, samples.offsets[1:], strict=False)):
        for i in range(int(samples.prompt_lengths[index]), stop - start):
            model_loss, start_loss = split.reference_losses[start + i].tolist()
            ratios[index, i] = start_loss - model_loss  # log p − log p_start
    mean, deviation = np.mean(list(ratios.values())), np.std(list(ratios.values()))

    algorithm = ImplicitReward(beta=1.7, weight_min=1e-6, weight_max=1e6, rescale=False)
    algorithm.prepare(split)
    model, indices = tiny_model(), [7, 0, 3, 12]
    batch = collate(split, indices, padding=0)
    target = targets(batch.labels, model.num_heads)
    for weights in trained_weights(algorithm, model, batch):
        for head, row, t in (target != IGNORED).nonzero().tolist():
            ratio = ratios[indices[row], t + head + 1]
            expected = np.exp((ratio - mean) / deviation / 1.7)
            assert weights[head, row, t].item() == pytest.approx(expected, rel=1e-5)
            assert expected != pytest.approx(np.exp(ratio / 1.7), rel=1e-3), "the control: not normalized"


def test_tokens_that_the_reward_model_prefers_have_larger_weights() -> None:
    algorithm = ImplicitReward()
    better_and_worse = torch.tensor([[[[1.0, 3.0]]], [[[2.0, 2.0]]]])
    valid = torch.ones(1, 1, 2, dtype=torch.bool)
    weights = algorithm.weights(Observations(valid, valid[0], reference_losses=better_and_worse))
    assert weights[0, 0, 0] > 1 > weights[0, 0, 1]


@pytest.mark.slow
def test_stage_1_begins_with_the_model_of_another_run(invoke: Invoke) -> None:
    new = invoke("algo=implicit_reward", "max_steps=1")
    assert new.code == 2 and "pretrain.start=PATH" in new.err
    assert invoke("algo=baseline", "max_steps=3", "hydra.run.dir=language").code == 0
    other = invoke("algo=implicit_reward", "pretrain.start=language", "model.hidden_dim=40", "max_steps=1")
    assert other.code == 2 and "its model is not that of stage 1" in other.err
    Path("folder").mkdir()
    Path("folder/config.json").write_text("{}")
    wrong = invoke("algo=implicit_reward", "pretrain.start=folder", "max_steps=1")
    assert wrong.code == 2 and "pretrain.start=/" in wrong.err and "algo.reference" not in wrong.err
    done = invoke(
        "algo=implicit_reward", "pretrain.start=language", "pretrain.max_steps=2", "max_steps=1", "hydra.run.dir=reward"
    )
    assert done.code == 0, done.err
    assert (Path("reward") / "pretrain" / "result.json").exists()
    assert "val/reward_accuracy" in (Path("reward") / "pretrain" / "metrics.jsonl").read_text()
