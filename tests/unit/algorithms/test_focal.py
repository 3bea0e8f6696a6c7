"""Tests of focal against the published formula, computed from all logits."""

import torch
from torch import Tensor

from tests.support.weights import plain_logits, sharp_model, trained_weights, with_probable_labels
from tests.unit.objectives.test_objectives import ragged
from wmtp.algorithms.base import Observations
from wmtp.algorithms.focal import Focal
from wmtp.data.collate import IGNORED
from wmtp.ops.targets import targets


def agrees(weights: Tensor, expected: Tensor) -> bool:
    return torch.allclose(weights.double(), expected, atol=1e-6, rtol=0)


def test_unscaled_weights_are_the_published_ones() -> None:
    """The published weight is (1 − p)^γ."""
    model = sharp_model()
    batch = with_probable_labels(model, ragged())
    target = targets(batch.labels, model.num_heads)
    valid = target != IGNORED
    probabilities = plain_logits(model, batch)[valid].softmax(dim=-1)
    p = probabilities.gather(-1, target[valid].unsqueeze(-1)).squeeze(-1)
    assert p.min() < 1e-4 and p.max() > 0.5
    for gamma in (2.0, 0.5):
        for weights in trained_weights(Focal(gamma=gamma, rescale=False), model, batch):
            assert agrees(weights[valid], (1 - p) ** gamma)
            assert not agrees(weights[valid], 1 - p**gamma), "the control: the power of p"
            assert not agrees(weights[valid], p**gamma)
            assert not weights[~valid].any()


def test_the_weight_of_a_probable_target_is_precise() -> None:
    losses = torch.tensor([1e-9])
    observed = Observations(losses > 0, torch.ones(1, 1) > 0, losses=losses)
    assert torch.allclose(Focal(gamma=1.0).weights(observed), losses)
    assert 1 - torch.exp(-losses) == 0, "the control: the difference of rounded numbers"
