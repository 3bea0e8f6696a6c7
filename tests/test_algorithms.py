import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wmtp.algorithms.base import normalised
from wmtp.algorithms.uniform import Uniform
from wmtp.errors import TrainingError
from wmtp.targets import head_shares


def shares_of(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(3, 2, 7, generator=generator) < 0.6
    valid[0, 0, 0] = True
    return head_shares(valid)


@given(st.integers(0, 1000), st.floats(0.01, 1.0), st.floats(1.0, 20.0))
def test_weights_have_mean_one_and_keep_their_range_of_ratios(seed: int, low: float, high: float) -> None:
    shares = shares_of(seed)
    raw = torch.exp(3 * torch.randn(shares.shape, generator=torch.Generator().manual_seed(seed)))
    weights = normalised(raw, shares, low, high)
    valid = shares > 0
    assert (shares * weights).sum() / shares.sum() == pytest.approx(1.0, abs=1e-5)
    assert (weights[valid].max() / weights[valid].min()).item() <= high / low * (1 + 1e-4)
    assert not weights[~valid].any()
    naive = raw / raw[valid].mean()  # neither clipped nor averaged by shares
    assert not torch.allclose(naive[valid], weights[valid])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_weight_that_is_not_finite_or_negative_is_an_error(bad: float) -> None:
    shares = shares_of(0)
    raw = torch.ones_like(shares)
    raw[0, 0, 0] = bad
    with pytest.raises(TrainingError, match="1 of"):
        normalised(raw, shares, 0.1, 5.0)


def test_an_ignored_target_may_have_any_weight() -> None:
    shares = shares_of(0)
    raw = torch.where(shares > 0, 1.0, float("nan"))
    assert torch.equal(normalised(raw, shares, 0.1, 5.0), (shares > 0).float())


def test_uniform_weights_are_exactly_one() -> None:
    shares, algorithm = shares_of(3), Uniform()
    weights = normalised(
        algorithm.weights(torch.randn(shares.shape), shares > 0), shares, algorithm.weight_min, algorithm.weight_max
    )
    assert torch.equal(weights, (shares > 0).float())
