"""Test every weighting by hand; for each property a naive weighting violates it."""

import copy
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

from wmtp.algorithms.base import Algorithm, Observations, clip_weights, mean_one_scale
from wmtp.algorithms.controls import Control, Random, Shuffled
from wmtp.algorithms.critic import Critic
from wmtp.algorithms.excess_loss import ExcessLoss, TokenSkip
from wmtp.algorithms.uniform import Uniform
from wmtp.data.collate import IGNORED
from wmtp.distributed.process_group import Processes
from wmtp.ops.returns import advantages, token_rewards
from wmtp.ops.targets import position_weights, targets

NUM_HEADS = 3
ALONE = Processes()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shares_of(seed: int) -> Tensor:
    valid = torch.rand(NUM_HEADS, 2, 7, generator=generator(seed)) < 0.6
    valid[0, 0, 0] = True
    return position_weights(valid)


def scaled(raw: Tensor, shares: Tensor, low: float, high: float) -> Tensor:
    """Raw weights after clipping and scaling."""
    weights = clip_weights(raw, shares > 0, low, high)
    return weights * mean_one_scale(weights, shares)


def seen(seed: int = 0, batch: int = 3, length: int = 9, num_heads: int = NUM_HEADS, number: int = 0) -> Observations:
    """A micro-batch of ragged solutions with all observations."""
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
        reference_losses=4 * torch.rand(valid.shape, generator=source),
        values=torch.randn(response.shape, generator=source),
        rewards=torch.rand(batch, generator=source),
        number=number,
    )


def numbered(observed: Observations, number: int) -> Observations:
    """The same as another micro-batch of the run."""
    return replace(observed, number=number)


def through_json(algorithm: Algorithm, fresh: Algorithm) -> Algorithm:
    """The algorithm of a run that was saved and resumed."""
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
    shares = shares_of(seed)
    check_mean_and_ratios(scaled(raw_weights(shares, seed), shares, low, high), shares, low, high)


@pytest.mark.parametrize("naive", ["not clipped", "mean over targets", "not masked", "scaled, then clipped"])
def test_other_ways_to_scale_break_the_mean_or_the_range(naive: str) -> None:
    shares = shares_of(1)
    raw, valid = raw_weights(shares, 1), shares > 0
    inside = raw.clamp(0.1, 5.0)
    ways = {
        "not clipped": raw.where(valid, 0.0) * mean_one_scale(raw, shares),
        "mean over targets": inside.where(valid, 0.0) / inside[valid].mean(),
        "not masked": inside * mean_one_scale(inside, shares),
        "scaled, then clipped": (raw * mean_one_scale(raw, shares)).clamp(0.1, 5.0).where(valid, 0.0),
    }
    with pytest.raises(AssertionError):
        check_mean_and_ratios(ways[naive], shares, 0.1, 5.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1.0])
def test_a_weight_that_is_not_finite_or_negative_makes_the_loss_nan(bad: float) -> None:
    shares = shares_of(0)
    raw = torch.ones_like(shares)
    raw[0, 0, 0] = bad
    weights = clip_weights(raw, shares > 0, 0.1, 5.0)
    assert torch.isnan(weights).nonzero().tolist() == [[0, 0, 0]]
    losses = torch.ones_like(shares)
    assert torch.isnan((shares * scaled(raw, shares, 0.1, 5.0) * losses).sum())
    if not math.isnan(bad):
        hidden = raw.clamp(0.1, 5.0)  # the control: a range alone makes a weight like any other of it
        assert torch.isfinite((shares * hidden * mean_one_scale(hidden, shares) * losses).sum())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_raw_weights_of_invalid_targets_are_ignored(bad: float) -> None:
    shares = shares_of(0)
    raw = torch.where(shares > 0, 1.0, bad)
    assert torch.equal(scaled(raw, shares, 0.1, 5.0), (shares > 0).float())


def test_weights_that_are_all_zero_make_the_loss_nan_but_no_targets_do_not() -> None:
    shares = shares_of(0)
    assert torch.isinf(mean_one_scale(torch.zeros_like(shares), shares))
    assert torch.isnan((shares * scaled(torch.zeros_like(shares), shares, 0.0, 1.0)).sum())
    assert not scaled(torch.ones_like(shares), torch.zeros_like(shares), 0.1, 5.0).any()


def test_weights_carry_no_gradient() -> None:
    observed = seen()
    assert observed.values is not None
    raw = Critic().weights(Observations(**vars(observed) | {"values": observed.values.requires_grad_()}))
    assert raw.requires_grad  # the control: nothing but `clip_weights` stops it
    assert not clip_weights(raw, observed.valid, 0.1, 5.0).requires_grad


def test_uniform_weights_are_exactly_one() -> None:
    observed, algorithm = seen(3), Uniform()
    shares = position_weights(observed.valid)
    weights = scaled(algorithm.weights(observed), shares, algorithm.weight_min, algorithm.weight_max)
    assert torch.equal(weights, observed.valid.float())


# Critic


def tiny_solution() -> Observations:
    """A prompt token and three solution tokens; γ = λ = 0.5 gives the advantages 0.1, 0 and 0.4."""
    response = torch.tensor([[False, True, True, True]])
    valid = targets(torch.where(response, 7, IGNORED), NUM_HEADS) != IGNORED
    # δ = 0.5·0.4 − 0.1, 0.5·0.6 − 0.4, 1 − 0.6 = 0.1, −0.1, 0.4; A = δ + 0.25·(the next A); the last value is nobody's
    return Observations(valid, response, values=torch.tensor([[0.1, 0.4, 0.6, 9.0]]), rewards=torch.ones(1))


TINY_ADVANTAGES = (0.1, 0.0, 0.4)


def test_a_tokens_weight_grows_exponentially_with_its_whitened_advantage() -> None:
    critic, observed = Critic(beta=2.0, discount=0.5, trace_decay=0.5), tiny_solution()
    deviation = math.sqrt((0.1**2 + 0.4**2) / 3 - (0.5 / 3) ** 2)
    expected = [math.exp((advantage - 0.5 / 3) / deviation / 2.0) for advantage in TINY_ADVANTAGES]
    weights = critic.weights(observed)
    assert weights[0, 0, :3].tolist() == pytest.approx(expected, rel=1e-5)
    assert min(expected) > 0.1 and max(expected) < 5.0  # none of it is clipped

    for other in (Critic(beta=1.0, discount=0.5, trace_decay=0.5), Critic(beta=2.0, trace_decay=0.5)):
        assert other.weights(observed)[0, 0, :3].tolist() != pytest.approx(expected, rel=1e-2)
    without_trace = Critic(beta=2.0, discount=0.5, trace_decay=0.0).weights(observed)[0, 0, :3]
    assert without_trace[1] < without_trace[0] < without_trace[2]  # the order of δ


def test_a_tokens_weight_reaches_every_head_that_predicts_it() -> None:
    observed = seen(5)
    assert observed.values is not None and observed.rewards is not None
    weights = Critic().weights(observed)
    rewards = token_rewards(observed.rewards, observed.response)
    advantage = advantages(observed.values, rewards, observed.response, discount=1.0, trace_decay=0.95)
    chosen = advantage[observed.response].double()
    of_token = ((advantage - chosen.mean()) / chosen.std(correction=0) / 0.9).exp().clamp(0.1, 5.0)

    def travels(weight_of: Callable[[int, int, int], Tensor]) -> bool:
        return all(
            float(weights[k - 1, row, t]) == pytest.approx(float(weight_of(row, t, k)), rel=1e-4)
            for k, row, t in ((k + 1, row, t) for k, row, t in observed.valid.nonzero().tolist())
        )

    assert travels(lambda row, t, k: of_token[row, t + k])
    assert not travels(lambda row, t, k: of_token[row, t])
    assert not travels(lambda row, t, k: of_token[row, t + 1])


def plain_advantages(observed: Observations) -> Tensor:
    assert observed.values is not None and observed.rewards is not None
    rewards = token_rewards(observed.rewards, observed.response)
    every = advantages(observed.values, rewards, observed.response, discount=1.0, trace_decay=0.95)
    return every[observed.response].double()


def whitened_by(observed: Observations, mean: float, variance: float) -> Tensor:
    """The weights of the solution's tokens."""
    return ((plain_advantages(observed) - mean) / math.sqrt(variance) / 0.9).exp().clamp(0.1, 5.0).float()


def token_weights(weights: Tensor, response: Tensor) -> Tensor:
    """Head 1's weights as those of tokens; a token at the start of its row has none."""
    return torch.nn.functional.pad(weights[0, :, :-1], (1, 0))[response]


def test_advantages_are_whitened_by_their_own_moments_for_ten_updates_and_then_by_running_ones() -> None:
    critic, mean, variance = Critic(), 0.0, 0.0
    for update in range(14):
        batches = [seen(100 + 2 * update), seen(101 + 2 * update, batch=5)]
        for observed in batches:
            own = plain_advantages(observed)
            expected = {
                "own": whitened_by(observed, own.mean().item(), own.var(correction=0).item()),
                "running": whitened_by(observed, mean, variance) if update else None,
            }
            known = observed.response.clone()
            known[:, 0] = False  # nothing predicts it
            got = token_weights(critic.weights(observed), known)
            used, unused = ("own", "running") if update < 10 else ("running", "own")
            inside = known[observed.response]
            torch.testing.assert_close(got, expected[used][inside], rtol=1e-4, atol=1e-5)
            if expected[unused] is not None:
                assert not torch.allclose(got, expected[unused][inside], rtol=1e-3)
        pooled = torch.cat([plain_advantages(observed) for observed in batches])
        share = 0.1 if update else 1.0
        mean += share * (pooled.mean().item() - mean)
        variance += share * (pooled.var(correction=0).item() - variance)
        critic.finish_update(ALONE)
    state = critic.state_dict()
    assert (state["updates"], state["mean"], state["variance"]) == (14, pytest.approx(mean), pytest.approx(variance))
    critic.finish_update(ALONE)
    assert critic.state_dict() == state, "an update in which nothing was whitened does not count"


@pytest.mark.parametrize("make", [Critic, lambda: Shuffled(of=Critic())])
def test_critic_discards_skipped_updates(make: Callable[[], Algorithm]) -> None:
    one, other, naive = make(), make(), make()
    for algorithm in (one, other, naive):
        algorithm.weights(seen(1))
        algorithm.finish_update(ALONE)
    nothing = seen(2)
    assert nothing.values is not None
    broken = replace(nothing, values=nothing.values * torch.nan)
    for algorithm in (one, naive):
        algorithm.weights(broken)
    one.discard_update()
    for algorithm in (one, other, naive):
        algorithm.weights(seen(3))
        algorithm.finish_update(ALONE)
    assert one.state_dict() == other.state_dict()
    assert "nan" in str(naive.state_dict()), "the control: without it the averages are NaN for good"


@pytest.mark.parametrize("updates", [0, 4, 12])
def test_resumed_critic_has_bitwise_equal_weights(updates: int) -> None:
    critic = Critic()
    for update in range(updates):
        critic.weights(seen(update))
        critic.finish_update(ALONE)
    resumed, forgetful = through_json(critic, Critic()), Critic()
    for update in range(50, 50 + 12 - updates):
        for one in (critic, resumed, forgetful):
            one.weights(seen(update))
            one.finish_update(ALONE)
    expected = critic.weights(seen(99))
    assert torch.equal(resumed.weights(seen(99)), expected)
    assert torch.equal(forgetful.weights(seen(99)), expected) is (updates == 0)


def test_largest_advantage_does_not_overflow() -> None:
    critic, observed = Critic(), seen()
    critic.load_state_dict({"updates": 10, "mean": 0.0, "variance": 1e-12})
    weights = clip_weights(critic.weights(observed), observed.valid, 0.1, 5.0)
    assert torch.isfinite(weights).all()
    exponent = plain_advantages(observed).float() / 1e-6 / 0.9
    control = clip_weights(exponent.exp(), torch.ones_like(exponent, dtype=torch.bool), 0.1, 5.0)
    assert torch.isnan(control).any()

    constant = Observations(**vars(observed) | {"values": torch.zeros(3, 9), "rewards": torch.zeros(3)})
    assert (Critic().weights(constant)[constant.valid] == 1).all()


# Excess loss


def of_losses(losses: list[float], reference: list[float]) -> Observations:
    one = torch.tensor(losses)
    return Observations(one > -1, torch.ones(1, len(losses)) > 0, one, torch.tensor(reference))


def test_a_target_counts_by_its_signed_excess_over_the_reference() -> None:
    hard, even, noise = 0, 1, 2
    observed = of_losses([2.0, 1.0, 0.5], [1.0, 1.0, 2.0])
    weights = ExcessLoss(temperature=2.0).weights(observed)
    assert weights.tolist() == pytest.approx([math.exp(0.5), 1.0, math.exp(-0.75)])
    assert weights[hard] > weights[even] > weights[noise]
    unsigned = (weights.log().abs()).exp()
    assert not unsigned[even] > unsigned[noise]
    assert ExcessLoss(temperature=0.25).weights(observed).tolist() == pytest.approx([5.0, 1.0, 0.1])


def test_largest_excess_does_not_overflow() -> None:
    observed = of_losses([1e30, 0.0], [0.0, 1e30])
    assert ExcessLoss(temperature=1e-3).weights(observed).tolist() == pytest.approx([5.0, 0.1])


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 20))
def test_excess_weights_are_the_same_for_any_part_of_the_targets(seed: int, count: int) -> None:
    observed = seen(seed)
    assert observed.losses is not None and observed.reference_losses is not None
    whole = ExcessLoss().weights(observed)
    some = torch.randperm(observed.valid.numel(), generator=generator(seed))[:count]
    parts = Observations(
        observed.valid.flatten()[some],
        observed.response,
        observed.losses.flatten()[some],
        observed.reference_losses.flatten()[some],
    )
    assert torch.equal(ExcessLoss().weights(parts), whole.flatten()[some])
    assert ExcessLoss.uses_losses == "own"
    assert TokenSkip.uses_losses == "all"  # what ranks targets does not have this property


def check_kept(kept: Tensor, observed: Observations, tenths: int) -> None:
    """Head 1 trains on all, every other head on the ⌈share⌉ of its own targets with the largest excess."""
    assert observed.losses is not None and observed.reference_losses is not None
    excess = observed.losses - observed.reference_losses
    for head, (chosen, valid) in enumerate(zip(kept.bool(), observed.valid, strict=True)):
        count = int(valid.sum()) if head == 0 else math.ceil(Fraction(tenths, 10) * int(valid.sum()))
        assert int((chosen & valid).sum()) == count
        trained, skipped = excess[head][chosen & valid], excess[head][~chosen & valid]
        if len(trained) and len(skipped):
            assert trained.min() >= skipped.max()


def tied(observed: Observations) -> Observations:
    """Losses that are whole numbers."""
    assert observed.losses is not None and observed.reference_losses is not None
    rounded = {"losses": observed.losses.round(), "reference_losses": observed.reference_losses.round()}
    return Observations(**vars(observed) | rounded)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 10), st.booleans())
def test_each_head_skips_the_targets_with_the_least_excess(seed: int, tenths: int, ties: bool) -> None:
    observed = tied(seen(seed)) if ties else seen(seed)
    kept = TokenSkip(keep_fraction=tenths / 10).weights(observed)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    check_kept(kept, observed, tenths)
    if tenths == 10:
        assert kept[observed.valid].all()


@pytest.mark.parametrize("naive", ["all heads together", "head 1 too", "losses alone", "rounded down", "of positions"])
def test_other_ways_to_skip_are_detected(naive: str) -> None:
    observed = seen(4, batch=5)
    assert observed.losses is not None and observed.reference_losses is not None
    excess = (observed.losses - observed.reference_losses).where(observed.valid, -torch.inf)
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
    ways = {
        "all heads together": (excess >= excess[observed.valid].quantile(0.4)).float(),
        "head 1 too": top(excess, [math.ceil(0.6 * n) for n in valid_counts]),
        "losses alone": top(losses, counts),
        "rounded down": top(excess, [valid_counts[0], *(int(0.6 * n) for n in valid_counts[1:])]),
        "of positions": top(excess, [valid_counts[0], *[math.ceil(0.6 * positions)] * 2]),
    }
    with pytest.raises(AssertionError):
        check_kept(ways[naive], observed, 6)


@pytest.mark.parametrize(
    ("keep_fraction", "count", "kept"), [(0.55, 100, 55), (0.28, 25, 7), (0.6, 5, 3), (0.61, 5, 4)]
)
def test_keep_fraction_is_rounded_up_exactly(keep_fraction: float, count: int, kept: int) -> None:
    losses = torch.rand(2, 1, count, generator=generator(0))
    observed = Observations(losses > -1, torch.ones(1, count) > 0, losses, torch.zeros_like(losses))
    assert TokenSkip(keep_fraction=keep_fraction).weights(observed)[1].sum() == kept
    assert math.ceil(0.28 * 25) == 8  # the control: the product of the floats


def test_a_head_without_targets_skips_nothing() -> None:
    response = torch.tensor([[True, True, False, False]])  # head 2 has no target
    valid = targets(torch.where(response, 7, IGNORED), 2) != IGNORED
    assert valid.flatten(1).any(dim=1).tolist() == [True, False]
    observed = Observations(valid, response, torch.ones(2, 1, 4), torch.zeros(2, 1, 4))
    assert TokenSkip().weights(observed)[valid].tolist() == [1.0]


# Controls


class Given(Algorithm):
    """Fixed weights."""

    weight_min, weight_max = 0.01, 100.0

    def __init__(self, weights: Tensor) -> None:
        self.given = weights

    def weights(self, observed: Observations) -> Tensor:
        return self.given


def distinct(observed: Observations) -> Given:
    return Given(torch.arange(1.0, observed.valid.numel() + 1).view(observed.valid.shape) / 10)


def check_sequences_keep_their_weights(shuffled: Tensor, original: Tensor, valid: Tensor) -> None:
    for row in range(valid.shape[1]):
        mask = valid[:, row]
        assert sorted(shuffled[:, row][mask].tolist()) == sorted(original[:, row][mask].tolist())


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000))
def test_shuffling_keeps_each_sequences_weights_and_moves_them(seed: int) -> None:
    observed = seen(seed)
    of = distinct(observed)
    shuffled = Shuffled(of=of, seed=seed).weights(observed)
    check_sequences_keep_their_weights(shuffled, of.given, observed.valid)
    assert not torch.equal(shuffled[observed.valid], of.given[observed.valid])

    across, chosen = of.given.clone(), of.given[observed.valid]
    across[observed.valid] = chosen[torch.randperm(len(chosen), generator=generator(seed))]
    with pytest.raises(AssertionError):  # the control
        check_sequences_keep_their_weights(across, of.given, observed.valid)


def test_a_weight_is_shuffled_to_every_target_of_its_sequence_equally_often() -> None:
    observed = seen(2, batch=2, length=7, num_heads=2)
    weights = torch.full(observed.valid.shape, 1.0)
    head, position = observed.valid[:, 1].nonzero()[0].tolist()
    weights[head, 1, position] = 9.0
    algorithm, draws, landed = Shuffled(of=Given(weights)), 3000, torch.zeros(observed.valid.shape)
    for number in range(draws):
        landed += algorithm.weights(numbered(observed, number)) == 9.0
    there = observed.valid[:, 1]
    share = 1 / int(there.sum())
    assert landed.sum() == landed[:, 1][there].sum() == draws
    assert (landed[:, 1][there] / draws - share).abs().max() < 5 * math.sqrt(share * (1 - share) / draws)


NUMBERS = [epoch << 40 | update << 12 | piece for epoch in (0, 1, 5) for update in (0, 1, 300) for piece in (0, 1)]
"""Micro-batches of several epochs and updates, as a data set numbers them."""


def check_each_micro_batch_has_its_own_draws(weights: Callable[[Observations, int], Tensor]) -> None:
    observed = seen(6)
    draws = [weights(numbered(observed, number), 3)[observed.valid] for number in NUMBERS]
    again = [weights(numbered(observed, number), 3)[observed.valid] for number in reversed(NUMBERS)]
    assert all(torch.equal(one, same) for one, same in zip(draws, reversed(again), strict=True)), "in any order"
    assert len({tuple(draw.tolist()) for draw in draws}) == len(NUMBERS)
    others = [weights(numbered(observed, number), 4)[observed.valid] for number in NUMBERS]
    assert not any(torch.equal(one, other) for one, other in zip(draws, others, strict=True))


@pytest.mark.parametrize("control", [Shuffled, Random])
def test_control_depends_only_on_seed_and_micro_batch(control: type[Control]) -> None:
    of = distinct(seen(6))
    check_each_micro_batch_has_its_own_draws(lambda observed, seed: control(of=of, seed=seed).weights(observed))

    class OneStream(control):  # type: ignore[misc, valid-type]
        """Draws from one generator, whose state depends on how many micro-batches this process has seen."""

        generator = torch.Generator()

        def uninformative(self, weights: Tensor, observed: Observations, generator: torch.Generator) -> Tensor:
            return super().uninformative(weights, observed, self.generator)

    class SeedsAsTheyAre(control):  # type: ignore[misc, valid-type]
        """Hands torch the number itself, of which it takes no more than 32 bits: every epoch is like the first."""

        def uninformative(self, weights: Tensor, observed: Observations, generator: torch.Generator) -> Tensor:
            return super().uninformative(weights, observed, generator.manual_seed(self.seed << 56 | observed.number))

    for naive in (OneStream, SeedsAsTheyAre):
        with pytest.raises(AssertionError):
            check_each_micro_batch_has_its_own_draws(
                lambda observed, seed, naive=naive: naive(of=of, seed=seed).weights(observed)
            )


@pytest.mark.parametrize("control", [Shuffled, Random])
def test_control_keeps_the_state_of_the_wrapped_algorithm(control: type[Control]) -> None:
    one = control(of=Critic(), seed=1)
    for update in range(12):
        one.weights(seen(update))
        one.finish_update(ALONE)
    assert one.of.state_dict()["updates"] == 12
    resumed = through_json(one, control(of=Critic(), seed=1))
    assert torch.equal(resumed.weights(seen(99)), one.weights(seen(99)))


@pytest.mark.parametrize("control", [Shuffled, Random])
def test_control_has_the_requirements_of_the_wrapped_algorithm(control: type[Control]) -> None:
    for of in (Uniform(), Critic(value_coef=0.3), ExcessLoss(weight_max=3.0), TokenSkip()):
        wrapped = control(of=of)
        for name in ("needs_values", "needs_reference", "value_coef", "reference"):
            assert getattr(wrapped, name) == getattr(of, name)
        assert (wrapped.uses_losses == "none") is (of.uses_losses == "none")
        assert wrapped.weights(seen()).shape == seen().valid.shape


@pytest.mark.parametrize("of", [Critic(), TokenSkip(), ExcessLoss()])
def test_shuffled_weights_are_those_of_the_wrapped_algorithm(of: Algorithm) -> None:
    observed = seen(8)
    original = clip_weights(copy.deepcopy(of).weights(observed), observed.valid, of.weight_min, of.weight_max)
    check_sequences_keep_their_weights(Shuffled(of=of).weights(observed), original, observed.valid)


def test_random_weights_have_the_mean_and_the_deviation_of_the_wrapped_ones() -> None:
    observed = seen(1, batch=8, length=16)
    of = Given(torch.exp(0.6 * torch.randn(observed.valid.shape, generator=generator(1))))
    algorithm, wanted = Random(of=of), of.given[observed.valid]
    draws = torch.stack([algorithm.weights(numbered(observed, n)) for n in range(500)])[:, observed.valid]

    def agrees(weights: Tensor) -> bool:
        mean, deviation = float(weights.mean()), float(weights.std())
        return mean == pytest.approx(float(wanted.mean()), rel=0.01) and deviation == pytest.approx(
            float(wanted.std(correction=0)), rel=0.03
        )

    assert agrees(draws)
    normal = torch.randn(draws.shape, generator=generator(2))
    assert not agrees((wanted.mean() + wanted.std() * normal).exp())
    assert not agrees((wanted.mean().log() + wanted.log().std() * normal).exp())
    by_target = draws.mean(dim=0)
    assert abs(float(torch.corrcoef(torch.stack([by_target, wanted]))[0, 1])) < 0.3, "they say nothing of their targets"


@pytest.mark.parametrize("of", [Critic(beta=0.4), ExcessLoss(), TokenSkip()], ids=lambda of: of.name)
def test_random_weights_keep_their_deviation_after_clipping_and_scaling(of: Algorithm) -> None:
    observed = seen(1, batch=64, length=32)
    shares = position_weights(observed.valid)

    def trained(algorithm: Algorithm, low: float, high: float) -> float:
        draws = [clip_weights(algorithm.weights(numbered(observed, n)), observed.valid, low, high) for n in range(30)]
        return sum(float((weights * mean_one_scale(weights, shares))[observed.valid].std()) for weights in draws) / 30

    wanted, control = trained(of, of.weight_min, of.weight_max), Random(of=of)
    assert trained(control, control.weight_min, control.weight_max) == pytest.approx(wanted, rel=0.1)
    assert trained(Random(of=of), of.weight_min, of.weight_max) < 0.9 * wanted, "the wrapped range is too narrow"


def test_random_weights_for_constant_weights_are_constant() -> None:
    observed = seen(1)
    drawn = Random(of=Given(torch.full(observed.valid.shape, 2.5))).weights(observed)
    torch.testing.assert_close(drawn, torch.full_like(drawn, 2.5))
    assert not Random(of=distinct(observed)).weights(observed).std() < 0.1


@pytest.mark.parametrize("control", [Shuffled, Random])
def test_a_control_takes_a_micro_batch_without_targets(control: type[Control]) -> None:
    nothing = Observations(
        torch.zeros(2, 3, 5) > 0, torch.zeros(3, 5) > 0, values=torch.zeros(3, 5), rewards=torch.zeros(3)
    )
    assert not clip_weights(control(of=Critic()).weights(nothing), nothing.valid, 0.1, 5.0).any()
