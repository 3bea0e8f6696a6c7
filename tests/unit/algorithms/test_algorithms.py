"""Tests of all weightings; each property has a naive weighting that violates it."""

import copy
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations, clip_weights, mean_one_scales
from wmtp.algorithms.controls import Control, Random, Shuffled
from wmtp.algorithms.critic import Critic
from wmtp.algorithms.dft import Dft
from wmtp.algorithms.entropy import Entropy
from wmtp.algorithms.excess_loss import ExcessLoss, TokenSkip
from wmtp.algorithms.focal import Focal
from wmtp.algorithms.history import History
from wmtp.algorithms.uniform import Uniform
from wmtp.data.collate import IGNORED
from wmtp.distributed.process_group import Processes
from wmtp.ops.returns import advantages, token_rewards
from wmtp.ops.targets import target_shares, targets

NUM_HEADS = 3
ALONE = Processes()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_shares(seed: int) -> Tensor:
    valid = torch.rand(NUM_HEADS, 2, 7, generator=generator(seed)) < 0.6
    valid[0, 0, 0] = True
    return target_shares(valid)


def scaled(raw: Tensor, shares: Tensor, low: float, high: float) -> Tensor:
    """Return raw weights after clipping and scaling."""
    weights = clip_weights(raw, shares > 0, low, high)
    return weights * mean_one_scale(weights, shares)


def mean_one_scale(weights: Tensor, shares: Tensor) -> Tensor:
    """Return the common factor of all heads."""
    sums = (shares * weights).sum(dim=(1, 2)), shares.sum(dim=(1, 2))
    return mean_one_scales(*sums, per_head=False)[0]


def random_observations(
    seed: int = 0, batch: int = 3, length: int = 9, num_heads: int = NUM_HEADS, number: int = 0
) -> Observations:
    """Return all observations of a micro-batch whose solutions have different lengths."""
    source = generator(seed)
    first = torch.randint(0, 3, (batch, 1), generator=source)
    last = torch.randint(4, length, (batch, 1), generator=source)
    position = torch.arange(length)[None]
    response = (position >= first) & (position <= last)
    valid = targets(torch.where(response, 7, IGNORED), num_heads) != IGNORED
    return Observations(
        valid,
        response,
        losses=4 * torch.rand(valid.shape, generator=source),
        reference_losses=4 * torch.rand(1, *valid.shape, generator=source),
        previous_losses=4 * torch.rand(valid.shape, generator=generator(seed + 1)),
        entropies=math.log(20) * torch.rand(valid.shape, generator=generator(seed)),
        values=torch.randn(response.shape, generator=source),
        rewards=torch.rand(batch, generator=source),
        number=number,
        samples=samples_of(batch, number),
    )


def samples_of(batch: int, number: int) -> tuple[str, ...]:
    return tuple(f"{number} {row}" for row in range(batch))


def with_number(observed: Observations, number: int) -> Observations:
    """Return the same observations in another update."""
    return replace(observed, number=number, samples=samples_of(len(observed.response), number))


def saved_and_resumed(algorithm: Algorithm, fresh: Algorithm) -> Algorithm:
    """Return `fresh` after loading the state of `algorithm` through JSON."""
    fresh.load_state_dict(json.loads(json.dumps(algorithm.state_dict(), allow_nan=False)))
    return fresh


# Raw weights to weights


def check_mean_and_ratios(weights: Tensor, shares: Tensor, low: float, high: float) -> None:
    valid = shares > 0
    assert float((shares * weights).sum() / shares.sum()) == pytest.approx(1.0, abs=1e-5)
    assert float(weights[valid].max() / weights[valid].min()) <= high / low * (1 + 1e-4)
    assert not weights[~valid].any()


def raw_weights(shares: Tensor, seed: int) -> Tensor:
    return torch.exp(3 * torch.randn(shares.shape, generator=generator(seed)))


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 1.0), st.floats(1.0, 20.0))
def test_weights_have_mean_one_and_keep_their_range_of_ratios(seed: int, low: float, high: float) -> None:
    shares = random_shares(seed)
    check_mean_and_ratios(scaled(raw_weights(shares, seed), shares, low, high), shares, low, high)


@pytest.mark.parametrize("naive", ["not clipped", "mean over targets", "not masked", "scaled, then clipped"])
def test_control_other_scalings_violate_the_mean_or_the_range(naive: str) -> None:
    shares = random_shares(1)
    raw, valid = raw_weights(shares, 1), shares > 0
    clamped = raw.clamp(0.1, 5.0)
    scalings = {
        "not clipped": raw.where(valid, 0.0) * mean_one_scale(raw, shares),
        "mean over targets": clamped.where(valid, 0.0) / clamped[valid].mean(),
        "not masked": clamped * mean_one_scale(clamped, shares),
        "scaled, then clipped": (raw * mean_one_scale(raw, shares)).clamp(0.1, 5.0).where(valid, 0.0),
    }
    with pytest.raises(AssertionError):
        check_mean_and_ratios(scalings[naive], shares, 0.1, 5.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1.0])
def test_a_weight_that_is_not_finite_or_negative_makes_the_loss_nan(bad: float) -> None:
    shares = random_shares(0)
    raw = torch.ones_like(shares)
    raw[0, 0, 0] = bad
    weights = clip_weights(raw, shares > 0, 0.1, 5.0)
    assert torch.isnan(weights).nonzero().tolist() == [[0, 0, 0]]
    losses = torch.ones_like(shares)
    assert torch.isnan((shares * scaled(raw, shares, 0.1, 5.0) * losses).sum())
    if not math.isnan(bad):
        clipped_only = raw.clamp(0.1, 5.0)  # the control: clipping alone makes the weight finite
        assert torch.isfinite((shares * clipped_only * mean_one_scale(clipped_only, shares) * losses).sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_raw_weights_of_invalid_targets_are_ignored(bad: float) -> None:
    shares = random_shares(0)
    raw = torch.where(shares > 0, 1.0, bad)
    assert torch.equal(scaled(raw, shares, 0.1, 5.0), (shares > 0).float())


def test_zero_weights_or_missing_targets_make_the_loss_zero() -> None:
    shares = random_shares(0)
    assert not scaled(torch.zeros_like(shares), shares, 0.0, 1.0).any()
    assert not scaled(torch.ones_like(shares), torch.zeros_like(shares), 0.1, 5.0).any()
    assert torch.isnan(torch.zeros(1) * (shares.sum() / 0.0)).all(), "the control: the quotient of the sums"


def test_weights_have_no_gradient() -> None:
    observed = random_observations()
    assert observed.values is not None
    raw = Critic().weights(Observations(**vars(observed) | {"values": observed.values.requires_grad_()}))
    assert raw.requires_grad  # the control: raw weights have a gradient, and `clip_weights` detaches them
    assert not clip_weights(raw, observed.valid, 0.1, 5.0).requires_grad


def test_uniform_weights_are_exactly_one() -> None:
    observed, algorithm = random_observations(3), Uniform()
    shares = target_shares(observed.valid)
    weights = scaled(algorithm.weights(observed), shares, algorithm.weight_min, algorithm.weight_max)
    assert torch.equal(weights, observed.valid.float())


# Critic


def tiny_solution() -> Observations:
    """Return a prompt token and three solution tokens; γ = λ = 0.5 gives the advantages 0.1, 0 and 0.4."""
    response = torch.tensor([[False, True, True, True]])
    valid = targets(torch.where(response, 7, IGNORED), NUM_HEADS) != IGNORED
    # δ = 0.5·0.4 − 0.1, 0.5·0.6 − 0.4, 1 − 0.6 = 0.1, −0.1, 0.4; A = δ + 0.25·(the next A); the last value is unused
    return Observations(valid, response, values=torch.tensor([[0.1, 0.4, 0.6, 9.0]]), rewards=torch.ones(1))


TINY_ADVANTAGES = (0.1, 0.0, 0.4)


def test_a_tokens_weight_grows_exponentially_with_its_whitened_advantage() -> None:
    critic, observed = Critic(beta=2.0, discount=0.5, trace_decay=0.5), tiny_solution()
    deviation = math.sqrt((0.1**2 + 0.4**2) / 3 - (0.5 / 3) ** 2)
    expected = [math.exp((advantage - 0.5 / 3) / deviation / 2.0) for advantage in TINY_ADVANTAGES]
    weights = critic.weights(observed)
    assert weights[0, 0, :3].tolist() == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 0.1 and max(expected) < 5.0  # nothing is clipped

    for other in (Critic(beta=1.0, discount=0.5, trace_decay=0.5), Critic(beta=2.0, trace_decay=0.5)):
        assert other.weights(observed)[0, 0, :3].tolist() != pytest.approx(expected, rel=1e-2)
    without_trace = Critic(beta=2.0, discount=0.5, trace_decay=0.0).weights(observed)[0, 0, :3]
    assert without_trace[1] < without_trace[0] < without_trace[2]  # the order of δ


def test_the_last_td_error_ends_with_the_reward_or_with_the_value_after_the_last_token() -> None:
    observed = tiny_solution()
    for option, end in (("reward", 1.0), ("value", 9.0)):
        critic = Critic(beta=20.0, discount=0.5, trace_decay=0.0, last_token=option)  # type: ignore[arg-type]
        errors = torch.tensor([0.5 * 0.4 - 0.1, 0.5 * 0.6 - 0.4, end - 0.6]).double()
        expected = ((errors - errors.mean()) / errors.std(correction=0) / 20.0).exp()
        torch.testing.assert_close(critic.weights(observed)[0, 0, :3].double(), expected, rtol=1e-5, atol=0)
        if option == "value":
            others = replace(observed, rewards=torch.zeros(1))
            assert torch.equal(critic.weights(others), critic.weights(observed)), "the weights depend on the reward"


def test_a_tokens_weight_reaches_every_head_that_predicts_it() -> None:
    observed = random_observations(5)
    assert observed.values is not None and observed.rewards is not None
    weights = Critic().weights(observed)
    rewards = token_rewards(observed.rewards, observed.response)
    advantage = advantages(observed.values, rewards, observed.response, discount=1.0, trace_decay=0.95)
    chosen = advantage[observed.response].double()
    of_token = ((advantage - chosen.mean()) / chosen.std(correction=0) / 0.9).exp()

    def reaches_all_heads(weight_of: Callable[[int, int, int], Tensor]) -> bool:
        return all(
            float(weights[k - 1, row, t]) == pytest.approx(float(weight_of(row, t, k)), rel=1e-4)
            for k, row, t in ((k + 1, row, t) for k, row, t in observed.valid.nonzero().tolist())
        )

    assert reaches_all_heads(lambda row, t, k: of_token[row, t + k])
    assert not reaches_all_heads(lambda row, t, k: of_token[row, t])
    assert not reaches_all_heads(lambda row, t, k: of_token[row, t + 1])


def naive_advantages(observed: Observations) -> Tensor:
    assert observed.values is not None and observed.rewards is not None
    rewards = token_rewards(observed.rewards, observed.response)
    all_advantages = advantages(observed.values, rewards, observed.response, discount=1.0, trace_decay=0.95)
    return all_advantages[observed.response].double()


def whitened_weights(observed: Observations, mean: float, variance: float) -> Tensor:
    """Return the weights of the solution's tokens for a given mean and variance of the advantages."""
    return ((naive_advantages(observed) - mean) / math.sqrt(variance) / 0.9).exp().float()


def token_weights(weights: Tensor, response: Tensor) -> Tensor:
    """Return head 1's weight of each token of `response`, which excludes the first token of a row."""
    return torch.nn.functional.pad(weights[0, :, :-1], (1, 0))[response]


def test_advantages_are_whitened_by_moments_of_the_update_ten_times_and_then_by_running_moments() -> None:
    critic, mean, variance = Critic(), 0.0, 0.0
    for update in range(14):
        batches = [random_observations(100 + 2 * update), random_observations(101 + 2 * update, batch=5)]
        pooled = torch.cat([naive_advantages(observed) for observed in batches])
        own_mean, own_variance = pooled.mean().item(), pooled.var(correction=0).item()
        for observed, weights in zip(batches, critic.update_weights(batches, ALONE), strict=True):
            alone = naive_advantages(observed)
            expected = {
                "update": whitened_weights(observed, own_mean, own_variance),
                "micro-batch": whitened_weights(observed, alone.mean().item(), alone.var(correction=0).item()),
                "running": whitened_weights(observed, mean, variance) if update else None,
            }
            has_head_1_weight = observed.response.clone()
            has_head_1_weight[:, 0] = False  # no head predicts it
            got = token_weights(weights, has_head_1_weight)
            used = "update" if update < 10 else "running"
            inside = has_head_1_weight[observed.response]
            for name, candidate in expected.items():
                if candidate is not None:
                    is_close = torch.allclose(got, candidate[inside], rtol=1e-4, atol=1e-5)
                    assert is_close is (name == used), name
        share = 0.1 if update else 1.0
        mean += share * (own_mean - mean)
        variance += share * (own_variance - variance)
        critic.finish_update()
    state = critic.state_dict()
    assert (state["updates"], state["mean"], state["variance"]) == (14, pytest.approx(mean), pytest.approx(variance))


def test_an_update_without_values_does_not_change_the_running_moments() -> None:
    critic, empty = Critic(), random_observations(1)
    critic.weights(random_observations(0))
    critic.finish_update()
    state = critic.state_dict()
    nothing = torch.zeros_like(empty.response)
    critic.weights(replace(empty, response=nothing, valid=torch.zeros_like(empty.valid)))
    critic.finish_update()
    assert critic.state_dict() == state
    critic.weights(random_observations(1))
    critic.finish_update()
    assert critic.state_dict() != state


@pytest.mark.parametrize("make", [Critic, lambda: Shuffled(of=Critic())])
def test_critic_does_not_count_skipped_updates(make: Callable[[], Algorithm]) -> None:
    one, other, naive = make(), make(), make()
    for algorithm in (one, other, naive):
        algorithm.weights(random_observations(1))
        algorithm.finish_update()
    batch_to_skip = random_observations(2)
    assert batch_to_skip.values is not None
    for algorithm in (one, naive):
        algorithm.weights(batch_to_skip)
    naive.finish_update()
    for algorithm in (one, other, naive):
        algorithm.weights(random_observations(3))
        algorithm.finish_update()
    assert one.state_dict() == other.state_dict()
    assert naive.state_dict() != other.state_dict(), "the control: the skipped update is counted"


def test_a_value_that_is_not_finite_makes_only_the_weights_of_its_own_solution_nan() -> None:
    good, bad = random_observations(1), random_observations(2)
    assert bad.values is not None
    broken = replace(bad, values=bad.values.clone().index_fill_(0, torch.tensor([1]), torch.nan))
    weights, broken_weights = Critic().update_weights([good, broken], ALONE)
    assert torch.isfinite(weights).all() and torch.isnan(broken_weights[:, 1]).any()
    assert torch.isfinite(broken_weights[:, [0, 2]]).all()
    values = torch.cat([observed.values[observed.response] for observed in (good, broken)])  # type: ignore[index]
    assert math.isnan(values.mean()), "the control: the moments of all values"


@pytest.mark.parametrize("updates", [0, 4, 12])
def test_resumed_critic_has_bitwise_equal_weights(updates: int) -> None:
    critic = Critic()
    for update in range(updates):
        critic.weights(random_observations(update))
        critic.finish_update()
    resumed, without_state = saved_and_resumed(critic, Critic()), Critic()
    for update in range(50, 50 + 12 - updates):
        for one in (critic, resumed, without_state):
            one.weights(random_observations(update))
            one.finish_update()
    expected = critic.weights(random_observations(99))
    assert torch.equal(resumed.weights(random_observations(99)), expected)
    assert torch.equal(without_state.weights(random_observations(99)), expected) is (updates == 0)


def test_largest_advantage_does_not_overflow() -> None:
    critic, observed = Critic(), random_observations()
    critic.load_state_dict({"updates": 10, "mean": 0.0, "variance": 1e-12})
    weights = clip_weights(critic.weights(observed), observed.valid, 0.1, 5.0)
    assert torch.isfinite(weights).all()
    exponent = naive_advantages(observed).float() / 1e-6 / 0.9
    control = clip_weights(exponent.exp(), torch.ones_like(exponent, dtype=torch.bool), 0.1, 5.0)
    assert torch.isnan(control).any()

    constant = Observations(**vars(observed) | {"values": torch.zeros(3, 9), "rewards": torch.zeros(3)})
    assert (Critic().weights(constant)[constant.valid] == 1).all()


# Excess loss


def observations_of_losses(losses: list[float], reference: list[float]) -> Observations:
    one = torch.tensor(losses)
    return Observations(one > -1, torch.ones(1, len(losses)) > 0, one, torch.tensor(reference)[None])


def test_weights_grow_with_the_signed_excess_over_the_reference() -> None:
    hard, even, noise = 0, 1, 2
    observed = observations_of_losses([2.0, 1.0, 0.5], [1.0, 1.0, 2.0])
    weights = ExcessLoss(temperature=2.0).weights(observed)
    assert weights.tolist() == pytest.approx([math.exp(0.5), 1.0, math.exp(-0.75)])
    assert weights[hard] > weights[even] > weights[noise]
    unsigned = (weights.log().abs()).exp()
    assert not unsigned[even] > unsigned[noise]
    assert ExcessLoss(temperature=0.25).weights(observed).clamp(0.1, 5.0).tolist() == pytest.approx([5.0, 1.0, 0.1])


def test_largest_excess_does_not_overflow() -> None:
    observed = observations_of_losses([1e30, 0.0], [0.0, 1e30])
    weights = ExcessLoss(temperature=1e-3).weights(observed)
    assert weights.isfinite().all() and weights.clamp(0.1, 5.0).tolist() == pytest.approx([5.0, 0.1])


@pytest.mark.parametrize(
    "algorithm", [ExcessLoss(), Dft(), Focal(), Entropy(), History()], ids=lambda algorithm: algorithm.name
)
@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 20))
def test_weights_of_a_subset_of_targets_are_the_same(algorithm: Algorithm, seed: int, count: int) -> None:
    observed = random_observations(seed)
    assert observed.losses is not None and observed.reference_losses is not None
    assert observed.entropies is not None and observed.previous_losses is not None
    all_weights = algorithm.weights(observed)
    subset = torch.randperm(observed.valid.numel(), generator=generator(seed))[:count]
    selected = Observations(
        observed.valid.flatten()[subset],
        observed.response,
        observed.losses.flatten()[subset],
        observed.reference_losses.flatten(1)[:, subset],
        observed.previous_losses.flatten()[subset],
        observed.entropies.flatten()[subset],
    )
    assert torch.allclose(algorithm.weights(selected), all_weights.flatten()[subset], rtol=1e-6)
    assert algorithm.uses_losses == "own"
    assert TokenSkip.uses_losses == "all"  # a ranking of targets does not have this property


def check_kept(kept: Tensor, observed: Observations, tenths: int) -> None:
    """Check that head 1 keeps all targets, and every other head ⌈tenths/10⌉ of its own, those of largest excess."""
    assert observed.losses is not None and observed.reference_losses is not None
    excess = observed.losses - observed.reference_losses[0]
    for head, (chosen, valid) in enumerate(zip(kept.bool(), observed.valid, strict=True)):
        count = int(valid.sum()) if head == 0 else math.ceil(Fraction(tenths, 10) * int(valid.sum()))
        assert int((chosen & valid).sum()) == count
        scaled_deviation, skipped = excess[head][chosen & valid], excess[head][~chosen & valid]
        if len(scaled_deviation) and len(skipped):
            assert scaled_deviation.min() >= skipped.max()


def round_losses(observed: Observations) -> Observations:
    """Return the observations with losses rounded to whole numbers, so that some are equal."""
    assert observed.losses is not None and observed.reference_losses is not None
    rounded = {"losses": observed.losses.round(), "reference_losses": observed.reference_losses.round()}
    return Observations(**vars(observed) | rounded)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 10), st.booleans())
def test_each_head_skips_the_targets_with_the_least_excess(seed: int, tenths: int, ties: bool) -> None:
    observed = round_losses(random_observations(seed)) if ties else random_observations(seed)
    kept = TokenSkip(keep_fraction=tenths / 10).weights(observed)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    check_kept(kept, observed, tenths)
    if tenths == 10:
        assert kept[observed.valid].all()


def test_targets_of_all_micro_batches_are_ranked_together() -> None:
    observed = round_losses(random_observations(4, batch=5))

    def rows(*chosen: int) -> Observations:
        part = {
            name: x[..., list(chosen), :] for name, x in vars(observed).items() if isinstance(x, Tensor) and x.ndim > 1
        }
        return replace(observed, **part, rewards=None, number=chosen[0])

    expected = TokenSkip().weights(observed)
    parts = TokenSkip().update_weights([rows(0, 1), rows(2, 3, 4)], ALONE)
    assert torch.equal(torch.cat([*parts], dim=1), expected)
    apart = [TokenSkip().weights(part) for part in (rows(0, 1), rows(2, 3, 4))]
    assert not torch.equal(torch.cat(apart, dim=1), expected), "the control: each micro-batch by itself"


@pytest.mark.parametrize("naive", ["all heads together", "head 1 too", "losses alone", "rounded down", "of positions"])
def test_control_other_selections_are_detected(naive: str) -> None:
    observed = random_observations(4, batch=5)
    assert observed.losses is not None and observed.reference_losses is not None
    excess = (observed.losses - observed.reference_losses[0]).where(observed.valid, -torch.inf)
    valid_counts = observed.valid.flatten(1).sum(dim=1).tolist()

    def top(scores: Tensor, counts: list[int]) -> Tensor:
        kept = torch.ones_like(scores)
        for head, count in enumerate(counts):
            kept[head] = 0.0
            kept[head].view(-1)[scores[head].flatten().topk(count).indices] = 1.0
        return kept

    counts = [valid_counts[0], *(math.ceil(0.6 * n) for n in valid_counts[1:])]
    check_kept(top(excess, counts), observed, 6)
    losses = observed.losses.where(observed.valid, -torch.inf)
    positions = observed.response.numel()
    scalings = {
        "all heads together": (excess >= excess[observed.valid].quantile(0.4)).float(),
        "head 1 too": top(excess, [math.ceil(0.6 * n) for n in valid_counts]),
        "losses alone": top(losses, counts),
        "rounded down": top(excess, [valid_counts[0], *(int(0.6 * n) for n in valid_counts[1:])]),
        "of positions": top(excess, [valid_counts[0], *[math.ceil(0.6 * positions)] * 2]),
    }
    with pytest.raises(AssertionError):
        check_kept(scalings[naive], observed, 6)


@pytest.mark.parametrize(
    ("keep_fraction", "count", "kept"), [(0.55, 100, 55), (0.28, 25, 7), (0.6, 5, 3), (0.61, 5, 4)]
)
def test_keep_fraction_is_rounded_up_exactly(keep_fraction: float, count: int, kept: int) -> None:
    losses = torch.rand(2, 1, count, generator=generator(0))
    observed = Observations(losses > -1, torch.ones(1, count) > 0, losses, torch.zeros_like(losses)[None])
    assert TokenSkip(keep_fraction=keep_fraction).weights(observed)[1].sum() == kept
    assert math.ceil(0.28 * 25) == 8  # the control: the product of the floats is above 7


def test_a_head_without_targets_skips_nothing() -> None:
    response = torch.tensor([[True, True, False, False]])  # head 2 has no target
    valid = targets(torch.where(response, 7, IGNORED), 2) != IGNORED
    assert valid.flatten(1).any(dim=1).tolist() == [True, False]
    observed = Observations(valid, response, torch.ones(2, 1, 4), torch.zeros(1, 2, 1, 4))
    assert TokenSkip().weights(observed)[valid].tolist() == [1.0]


# Controls


class FixedWeights(Algorithm):
    """An algorithm that returns given weights for any observations."""

    weight_min, weight_max = 0.01, 100.0

    def __init__(self, fixed: Tensor) -> None:
        self.fixed = fixed

    def weights(self, observed: Observations) -> Tensor:
        return self.fixed


def distinct_weights(observed: Observations) -> FixedWeights:
    return FixedWeights(torch.arange(1.0, observed.valid.numel() + 1).view(observed.valid.shape) / 10)


def check_sequences_keep_their_weights(shuffled: Tensor, original: Tensor, valid: Tensor) -> None:
    for head, row in itertools.product(range(valid.shape[0]), range(valid.shape[1])):
        mask = valid[head, row]
        assert sorted(shuffled[head, row][mask].tolist()) == sorted(original[head, row][mask].tolist())


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000))
def test_shuffling_keeps_each_sequences_weights_and_moves_them(seed: int) -> None:
    observed = random_observations(seed)
    of = distinct_weights(observed)
    shuffled = Shuffled(of=of, seed=seed).weights(observed)
    check_sequences_keep_their_weights(shuffled, of.fixed, observed.valid)
    assert not torch.equal(shuffled[observed.valid], of.fixed[observed.valid])

    for parts in (observed.valid[None], [observed.valid & (torch.arange(3) == row)[:, None] for row in range(3)]):
        mixed = of.fixed.clone()
        for part in parts:
            chosen = of.fixed[part]
            mixed[part] = chosen[torch.randperm(len(chosen), generator=generator(seed))]
        with pytest.raises(AssertionError):  # the control: shuffled across sequences or heads
            check_sequences_keep_their_weights(mixed, of.fixed, observed.valid)


@pytest.mark.slow
def test_shuffling_moves_a_weight_to_every_target_of_its_head_and_sequence_equally_often() -> None:
    observed = random_observations(2, batch=2, length=7, num_heads=2)
    weights = torch.full(observed.valid.shape, 1.0)
    head, position = observed.valid[:, 1].nonzero()[0].tolist()
    weights[head, 1, position] = 9.0
    algorithm, draws, destinations = Shuffled(of=FixedWeights(weights)), 3000, torch.zeros(observed.valid.shape)
    for number in range(draws):
        destinations += algorithm.weights(with_number(observed, number)) == 9.0
    valid_targets = observed.valid[head, 1]
    share = 1 / int(valid_targets.sum())
    assert destinations.sum() == destinations[head, 1][valid_targets].sum() == draws
    assert (destinations[head, 1][valid_targets] / draws - share).abs().max() < 5 * math.sqrt(
        share * (1 - share) / draws
    )


UPDATES = [epoch << 28 | update for epoch in (0, 1, 5) for update in (0, 1, 300)]
"""Numbers of updates of several epochs, in the format of the names of samples."""


def check_each_update_has_its_own_draws(weights: Callable[[Observations, int], Tensor]) -> None:
    observed = random_observations(6)
    draws = [weights(with_number(observed, number), 3)[observed.valid] for number in UPDATES]
    again = [weights(with_number(observed, number), 3)[observed.valid] for number in reversed(UPDATES)]
    assert all(torch.equal(one, same) for one, same in zip(draws, reversed(again), strict=True)), (
        "weights depend on the order of the updates"
    )
    assert len({tuple(draw.tolist()) for draw in draws}) == len(UPDATES)
    others = [weights(with_number(observed, number), 4)[observed.valid] for number in UPDATES]
    assert not any(torch.equal(one, other) for one, other in zip(draws, others, strict=True))


def draws_from(name: Callable[[int, Observations, int], int | None]) -> Callable[..., Tensor]:
    """Return a version of `Control.draws` with other seeds. If a seed is None, one stream is continued."""
    stream = generator(0)

    def draws(self: Control, observed: Observations, distribution: Callable[..., Tensor]) -> Tensor:
        found = torch.zeros(observed.valid.shape)
        for row in range(len(observed.samples)):
            seed = name(self.seed, observed, row)
            source = stream if seed is None else generator(seed)
            mask = observed.valid[:, row]
            found[:, row][mask] = distribution(int(mask.sum()), generator=source)
        return found

    return draws


@pytest.mark.parametrize("control", [Shuffled, Random])
def test_control_depends_only_on_seed_and_sample(control: type[Control], monkeypatch: pytest.MonkeyPatch) -> None:
    of = distinct_weights(random_observations(6))

    def weights(observed: Observations, seed: int) -> Tensor:
        return control(of=of, seed=seed).weights(observed)

    check_each_update_has_its_own_draws(weights)
    naive = {
        "one stream": lambda seed, observed, row: None,
        # torch uses 32 bits of a seed, so every epoch equals the first
        "truncated": lambda seed, observed, row: seed << 56 | observed.number << 12 | row,
    }
    for seeds in naive.values():
        monkeypatch.setattr(control, "draws", draws_from(seeds))
        with pytest.raises(AssertionError):
            check_each_update_has_its_own_draws(weights)


@pytest.mark.parametrize("control", [Shuffled, Random])
def test_control_does_not_depend_on_the_split_into_micro_batches(
    control: type[Control], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = random_observations(6, batch=4)

    def rows(first: int, last: int) -> Observations:
        length = int(whole.response[first:last].nonzero()[:, 1].max()) + 1
        part = {
            name: x[..., first:last, :length] if x.ndim > 1 else x[first:last]
            for name, x in vars(whole).items()
            if isinstance(x, Tensor)
        }
        return replace(whole, **part, samples=whole.samples[first:last], number=first)

    def agrees() -> bool:
        together = control(of=ExcessLoss()).weights(whole)
        parts = [rows(0, 1), rows(1, 4)]
        found = control(of=ExcessLoss()).update_weights(parts, ALONE)
        return all(
            torch.allclose(part[observed.valid], together[:, rows_of][whole.valid[:, rows_of]])
            for part, observed, rows_of in zip(found, parts, (slice(0, 1), slice(1, 4)), strict=True)
        )

    assert agrees()
    monkeypatch.setattr(control, "draws", draws_from(lambda seed, observed, row: observed.number << 8 | row))
    assert not agrees(), "the control: seeds from the number of the micro-batch"


@pytest.mark.parametrize("control", [Shuffled, Random])
def test_control_keeps_the_state_of_the_wrapped_algorithm(control: type[Control]) -> None:
    one = control(of=Critic(), seed=1)
    for update in range(12):
        one.weights(random_observations(update))
        one.finish_update()
    assert one.of.state_dict()["updates"] == 12
    resumed = saved_and_resumed(one, control(of=Critic(), seed=1))
    assert torch.equal(resumed.weights(random_observations(99)), one.weights(random_observations(99)))


def test_every_requirement_of_an_algorithm_is_annotated() -> None:
    """Controls copy the annotated attributes."""
    attributes = {name for name, value in vars(Algorithm).items() if not (name.startswith("_") or callable(value))}
    properties = {name for name in attributes if isinstance(vars(Algorithm)[name], property)}
    assert attributes - properties <= Algorithm.__annotations__.keys()


@pytest.mark.parametrize("control", [Shuffled, Random])
def test_control_has_the_requirements_of_the_wrapped_algorithm(control: type[Control]) -> None:
    for of in (
        Uniform(),
        Critic(value_coef=0.3),
        ExcessLoss(weight_max=3.0),
        TokenSkip(),
        Entropy(rescale=False),
        History(),
    ):
        wrapped = control(of=of)
        own = {"uses_losses", *(("weight_min", "weight_max") if control is Random else ())}
        for name in Algorithm.__annotations__.keys() - own:
            assert getattr(wrapped, name) == getattr(of, name), name
        assert (wrapped.uses_losses == "none") is (of.uses_losses == "none")
        assert wrapped.weights(random_observations()).shape == random_observations().valid.shape


@pytest.mark.parametrize("of", [Critic(), TokenSkip(), ExcessLoss(), Dft(), Focal(), Entropy(), History()])
def test_shuffled_weights_are_those_of_the_wrapped_algorithm(of: Algorithm) -> None:
    observed = random_observations(8)
    original = clip_weights(copy.deepcopy(of).weights(observed), observed.valid, of.weight_min, of.weight_max)
    check_sequences_keep_their_weights(Shuffled(of=of).weights(observed), original, observed.valid)


def test_random_weights_have_the_mean_and_deviation_of_the_wrapped_algorithm() -> None:
    observed = random_observations(1, batch=8, length=16)
    of = FixedWeights(torch.exp(0.6 * torch.randn(observed.valid.shape, generator=generator(1))))
    algorithm, expected = Random(of=of), of.fixed[observed.valid]
    draws = torch.stack([algorithm.weights(with_number(observed, n)) for n in range(500)])[:, observed.valid]

    def agrees(weights: Tensor) -> bool:
        mean, deviation = float(weights.mean()), float(weights.std())
        return mean == pytest.approx(float(expected.mean()), rel=0.01) and deviation == pytest.approx(
            float(expected.std(correction=0)), rel=0.03
        )

    assert agrees(draws)
    normal = torch.randn(draws.shape, generator=generator(2))
    assert not agrees((expected.mean() + expected.std() * normal).exp())
    assert not agrees((expected.mean().log() + expected.log().std() * normal).exp())
    by_target = draws.mean(dim=0)
    assert abs(float(torch.corrcoef(torch.stack([by_target, expected]))[0, 1])) < 0.3, (
        "random weights are correlated with the weights of their targets"
    )


@pytest.mark.slow
@pytest.mark.parametrize("of", [Critic(beta=0.4), ExcessLoss(), TokenSkip(), Dft()], ids=lambda of: of.name)
def test_random_weights_keep_their_deviation_after_clipping_and_scaling(of: Algorithm) -> None:
    observed = random_observations(1, batch=64, length=32)
    shares = target_shares(observed.valid)

    def scaled_deviation(algorithm: Algorithm, low: float, high: float) -> float:
        draws = [
            clip_weights(algorithm.weights(with_number(observed, n)), observed.valid, low, high) for n in range(30)
        ]
        return sum(float((weights * mean_one_scale(weights, shares))[observed.valid].std()) for weights in draws) / 30

    expected, control = scaled_deviation(of, of.weight_min, of.weight_max), Random(of=of)
    assert scaled_deviation(control, control.weight_min, control.weight_max) == pytest.approx(expected, rel=0.1)
    assert scaled_deviation(Random(of=of), of.weight_min, of.weight_max) < 0.9 * expected, (
        "the range of the wrapped algorithm is not too narrow"
    )


def test_random_weights_have_the_relative_deviation_of_each_head_if_weights_come_from_losses() -> None:
    observed = random_observations(1, batch=64, length=32)
    handicap = torch.tensor([0.1, 1.0, 3.0])[:, None, None]
    raw = handicap * torch.exp(0.4 * torch.randn(observed.valid.shape, generator=generator(1)))

    def deviations(weights: Tensor) -> Tensor:
        return torch.stack([w[v].std() / w[v].mean() for w, v in zip(weights, observed.valid, strict=True)])

    of = FixedWeights(raw)
    of.uses_losses = "own"
    drawn = deviations(Random(of=of).weights(observed))
    torch.testing.assert_close(drawn, deviations(raw), rtol=0.15, atol=0)
    pooled = deviations(Random(of=FixedWeights(raw)).weights(observed))
    assert (pooled > 1.5 * drawn).all(), "the control: the variance between the heads is in each head"


def test_random_weights_for_constant_weights_are_constant() -> None:
    observed = random_observations(1)
    drawn = Random(of=FixedWeights(torch.full(observed.valid.shape, 2.5))).weights(observed)
    torch.testing.assert_close(drawn, torch.full_like(drawn, 2.5))
    assert not Random(of=distinct_weights(observed)).weights(observed).std() < 0.1


@pytest.mark.parametrize("control", [Shuffled, Random])
def test_a_control_accepts_a_micro_batch_without_targets(control: type[Control]) -> None:
    no_targets = Observations(
        torch.zeros(2, 3, 5) > 0, torch.zeros(3, 5) > 0, values=torch.zeros(3, 5), rewards=torch.zeros(3),
        samples=samples_of(3, 0),
    )  # fmt: skip
    assert not clip_weights(control(of=Critic()).weights(no_targets), no_targets.valid, 0.1, 5.0).any()
