"""Tests of entropy against the published formula, computed from all logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.weights import plain_logits, sharp_model, trained_weights
from tests.unit.objectives.test_objectives import ragged
from wmtp.algorithms.base import Algorithm
from wmtp.algorithms.dft import Dft
from wmtp.algorithms.entropy import Entropy
from wmtp.algorithms.excess_loss import ExcessLoss, TokenSkip
from wmtp.algorithms.uniform import Uniform
from wmtp.data.collate import IGNORED
from wmtp.errors import InputError
from wmtp.ops.cross_entropy import Chunk
from wmtp.ops.targets import targets


def published_weights(logits: Tensor, alpha: float = 1.0) -> Tensor:
    """Return (H / 3)^alpha, where H is the entropy of the softmax over the 20 largest logits."""
    largest = logits.sort(dim=-1, descending=True).values[..., :20]
    p = largest.softmax(dim=-1)
    return ((-p * p.log()).sum(dim=-1) / 3.0) ** alpha


def agrees(weights: Tensor, expected: Tensor) -> bool:
    return torch.allclose(weights.double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("power", [1.0, 0.5, 3.0])
def test_unscaled_weights_are_the_published_ones(power: float) -> None:
    model, batch = sharp_model(), ragged()
    valid = targets(batch.labels, model.num_heads) != IGNORED
    logits = plain_logits(model, batch)[valid]
    expected = published_weights(logits, power)
    assert expected.min() < 0.6 and expected.max() > 0.8
    p = logits.softmax(dim=-1)
    largest = p.sort(dim=-1, descending=True).values[:, :20]
    others = {
        "of all tokens": -(p * p.log()).sum(dim=-1) / 3.0,
        "without scaling to sum 1": -(largest * largest.log()).sum(dim=-1) / 3.0,
        "without the divisor": 3 * published_weights(logits),
        "divided by log(20)": published_weights(logits) * 3 / torch.tensor(20.0).log(),
    }
    for weights in trained_weights(Entropy(power=power, rescale=False), model, batch):
        assert agrees(weights[valid], expected)
        assert not weights[~valid].any()
        for name, other in others.items():
            assert not agrees(weights[valid], other.clamp(max=1.0) ** power), name


def test_the_number_of_tokens_and_the_divisor_are_settings() -> None:
    model, batch = sharp_model(), ragged()
    valid = targets(batch.labels, model.num_heads) != IGNORED
    largest = plain_logits(model, batch)[valid].sort(dim=-1, descending=True).values[..., :7]
    p = F.softmax(largest, dim=-1)
    expected = -(p * p.log()).sum(dim=-1) / 2.0
    for weights in trained_weights(Entropy(top_k=7, max_entropy=2.0, rescale=False), model, batch):
        assert agrees(weights[valid], expected)
    for weights in trained_weights(Entropy(max_entropy=3.0, rescale=False), model, batch):
        assert not agrees(weights[valid], expected)


def test_a_divisor_below_the_largest_entropy_is_refused() -> None:
    with pytest.raises(InputError, match="max_entropy=3 must be at least 3.689"):
        Entropy(top_k=40)
    Entropy(top_k=40, max_entropy=3.69)


def test_other_algorithms_compute_no_entropies(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(chunk: Chunk, count: int) -> Tensor:
        raise AssertionError("entropies were computed")

    monkeypatch.setattr(Chunk, "top_entropies", fail)
    model, batch = sharp_model(), ragged()
    algorithms: list[Algorithm] = [Uniform(), Dft(), ExcessLoss(), TokenSkip()]
    for algorithm in algorithms:
        trained_weights(algorithm, model, batch)
    with pytest.raises(AssertionError, match="entropies were computed"):
        trained_weights(Entropy(), model, batch)
