"""Tests of history by hand-computed weights. The losses that it gets in a run are tested with `LossHistory`."""

import math

import pytest
import torch

from wmtp.algorithms.base import Observations, clip_weights
from wmtp.algorithms.history import History


def weights(algorithm: History, previous: list[float], now: list[float]) -> list[float]:
    losses = torch.tensor(now)
    observed = Observations(losses >= 0, torch.ones(1, 1) > 0, losses=losses, previous_losses=torch.tensor(previous))
    found: list[float] = clip_weights(
        algorithm.weights(observed), observed.valid, algorithm.weight_min, algorithm.weight_max
    ).tolist()
    return found


def test_a_target_that_was_learned_since_the_previous_epoch_has_a_large_weight() -> None:
    expected = [math.exp(0.5), 1.0, math.exp(-0.5)]
    assert weights(History(), [1.5, 1.0, 0.5], [1.0, 1.0, 1.0]) == pytest.approx(expected)
    assert weights(History(temperature=0.5), [1.5, 1.0, 0.5], [1.0, 1.0, 1.0]) == pytest.approx(
        [x**2 for x in expected]
    )
    assert weights(History(), [1.0, 1.0, 1.0], [1.5, 1.0, 0.5]) != pytest.approx(expected), "the control: the sign"


def test_weights_are_clipped_and_one_without_a_previous_loss() -> None:
    found = weights(History(weight_min=0.2, weight_max=4.0), [50.0, 0.0, math.nan], [0.0, 50.0, 50.0])
    assert found == pytest.approx([4.0, 0.2, 1.0])
