import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common import utils
from stable_baselines3.common.buffers import RolloutBuffer
from torch import Tensor, nn

from wmtp.ops.returns import (
    advantages,
    explained_variance,
    lambda_returns,
    last_of_response,
    ranking_loss,
    td_errors,
    token_rewards,
    value_positions,
    value_targets,
)

Compute = Callable[..., Tensor]


@dataclass
class Document:
    """A prompt, one response and the tokens after it, with a value for each token."""

    num_prompt: int
    num_response: int
    values: list[float]
    reward: float

    @property
    def response(self) -> list[bool]:
        after = len(self.values) - self.num_prompt - self.num_response
        return [False] * self.num_prompt + [True] * self.num_response + [False] * after


@dataclass
class Rows:
    """Arguments of the functions under test."""

    values: Tensor
    rewards: Tensor
    response: Tensor
    documents: Tensor | None = None

    def __call__(self, compute: Compute, **factors: float) -> Tensor:
        return compute(self.values, self.rewards, self.response, self.documents, **factors)


def packed(documents: list[Document]) -> Rows:
    """Return one row with all documents."""
    response = [is_response for document in documents for is_response in document.response]
    rewards = [document.reward * is_response for document in documents for is_response in document.response]
    values = [value for document in documents for value in document.values]
    numbers = [number for number, document in enumerate(documents) for _ in document.values]
    return Rows(torch.tensor([values]), torch.tensor([rewards]), torch.tensor([response]), torch.tensor([numbers]))


def separate_rows(documents: list[Document], padding: int = 0, filler: float = 7.0) -> Rows:
    """Return one padded row for each document."""
    length = max(len(document.values) for document in documents) + padding
    values = torch.full((len(documents), length), filler)
    response = torch.zeros(len(documents), length, dtype=torch.bool)
    for row, document in enumerate(documents):
        values[row, : len(document.values)] = torch.tensor(document.values)
        response[row, : len(document.values)] = torch.tensor(document.response)
    return Rows(values, token_rewards(torch.tensor([document.reward for document in documents]), response), response)


@st.composite
def document(draw: st.DrawFn, min_prompt: int = 0) -> Document:
    num_prompt, num_response = draw(st.integers(min_prompt, 3)), draw(st.integers(1, 5))
    length = num_prompt + num_response + draw(st.integers(0, 2))
    numbers = st.floats(-2, 2, width=16)
    return Document(num_prompt, num_response, draw(st.lists(numbers, min_size=length, max_size=length)), draw(numbers))


examples = settings(deadline=None)  # the first example takes longer, because torch imports modules lazily
several = st.lists(document(), min_size=1, max_size=4)
ratio = st.floats(0, 1, width=16)

TWO = [Document(2, 3, [9.0, 0.5, 1.0, 0.5, 7.0, 9.0], 1.0), Document(0, 2, [0.25, -3.0, 0.0], -1.0)]
"""Two documents whose irrelevant values are far from zero, so that naive versions are detected."""
FACTORS = {"discount": 0.5, "trace_decay": 0.5}


def bootstrapping(compute: Compute) -> Compute:
    """Return a naive version that adds the value after the last token, as if the response continued."""

    def naive(
        values: Tensor, rewards: Tensor, response: Tensor, documents: Tensor | None = None, **rest: float
    ) -> Tensor:
        rewards = rewards + rest["discount"] * values
        return compute(values, rewards, response, documents, **rest)

    return naive


def leaking(compute: Compute) -> Compute:
    """Return a naive version that treats a row as one document."""

    def naive(
        values: Tensor, rewards: Tensor, response: Tensor, documents: Tensor | None = None, **rest: float
    ) -> Tensor:
        return compute(values, rewards, response, None, **rest)

    return naive


def unmasked(compute: Compute) -> Compute:
    """Return a naive version that treats padding as part of the response."""

    def naive(
        values: Tensor, rewards: Tensor, response: Tensor, documents: Tensor | None = None, **rest: float
    ) -> Tensor:
        to_the_end = response.cumsum(dim=1) > 0
        return compute(values, token_rewards(rewards.sum(dim=1), to_the_end), to_the_end, documents, **rest)

    return naive


def by_definition(document: Document, discount: float, trace_decay: float) -> tuple[list[float], list[float]]:
    """Return A as a sum over TD errors and G as the forward view of n-step returns, for a document with a prompt."""
    a, b = document.num_prompt, document.num_prompt + document.num_response - 1
    value = document.values

    def n_step(i: int, n: int) -> float:
        """Return the discounted rewards of tokens i … i+n−1, plus the value after them if the response continues."""
        if i + n - 1 >= b:
            return discount ** (b - i) * document.reward
        return discount**n * value[i + n - 1]

    errors = {
        i: (document.reward if i == b else discount * value[i]) - value[i - 1] for i in range(a, b + 1)
    }  # fmt: skip
    sums = [sum((discount * trace_decay) ** (j - i) * errors[j] for j in range(i, b + 1)) for i in range(a, b + 1)]
    returns = [
        (1 - trace_decay) * sum(trace_decay ** (n - 1) * n_step(i, n) for n in range(1, b - i + 1))
        + trace_decay ** (b - i) * n_step(i, b - i + 1)
        for i in range(a, b + 1)
    ]
    return sums, returns


def test_results_for_three_tokens_equal_those_computed_by_hand() -> None:
    rows = separate_rows(TWO[:1])  # a = 2, b = 4, R = 1; V_1 … V_4 = 0.5, 1, 0.5, 7
    assert rows.rewards.tolist() == [[0, 0, 1, 1, 1, 0]]
    # δ_2 = 0.5·1 − 0.5, δ_3 = 0.5·0.5 − 1, δ_4 = 1 − 0.5
    assert rows(td_errors, discount=0.5).tolist() == [[0, 0, 0.0, -0.75, 0.5, 0]]
    # A_4 = 0.5, A_3 = −0.75 + 0.25·0.5, A_2 = 0 + 0.25·−0.625
    assert rows(advantages, **FACTORS).tolist() == [[0, 0, -0.15625, -0.625, 0.5, 0]]
    # G of state 1 = A_2 + 0.5, of 2 = A_3 + 1, of 3 = A_4 + 0.5, of 4 = R
    assert rows(lambda_returns, **FACTORS).tolist() == [[0, 0.34375, 0.375, 1.0, 1.0, 0]]
    assert rows(bootstrapping(td_errors), discount=0.5).tolist() != [[0, 0, 0.0, -0.75, 0.5, 0]]


def test_last_tokens_and_value_positions_of_responses() -> None:
    rows = packed(TWO)
    assert rows.response.int().tolist() == [[0, 0, 1, 1, 1, 0, 1, 1, 0]]
    assert last_of_response(rows.response, rows.documents).int().tolist() == [[0, 0, 0, 0, 1, 0, 0, 1, 0]]
    assert value_positions(rows.response, rows.documents).int().tolist() == [[0, 1, 1, 1, 1, 0, 1, 1, 0]]
    assert value_positions(rows.response).int().tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 1, 0]
    ]  # includes the last token of the previous document


def test_adjacent_responses_have_separate_last_tokens() -> None:
    response, documents = torch.tensor([[True, True, True]]), torch.tensor([[3, 3, 4]])
    assert last_of_response(response, documents).int().tolist() == [[0, 1, 1]]
    assert last_of_response(response).int().tolist() == [[0, 0, 1]]


def stable_baselines3_results(
    documents: list[Document], discount: float, trace_decay: float, *, ends: bool = True, separate: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return A and G of all response tokens from stable-baselines3: each response is an episode, each token a step."""
    num_steps = sum(document.num_response for document in documents)
    box = spaces.Box(0, 1, (1,))
    buffer = RolloutBuffer(num_steps, box, box, "cpu", gae_lambda=trace_decay, gamma=discount)
    step = 0
    for document in documents:
        a, b = document.num_prompt, document.num_prompt + document.num_response - 1
        buffer.episode_starts[step] = separate
        for i in range(a, b + 1):
            buffer.values[step] = document.values[i - 1] if i else 0.0
            buffer.rewards[step] = document.reward if i == b else 0.0
            step += 1
    buffer.compute_returns_and_advantage(torch.tensor(documents[-1].values[b]), np.array([ends]))
    return buffer.advantages[:, 0], buffer.returns[:, 0]


@examples
@given(several, ratio, ratio)
def test_advantages_and_returns_equal_those_of_stable_baselines3(
    documents: list[Document], discount: float, trace_decay: float
) -> None:
    rows = packed(documents)
    advantage, expected_returns = stable_baselines3_results(documents, discount, trace_decay)
    factors = {"discount": discount, "trace_decay": trace_decay}
    got = rows(advantages, **factors)
    torch.testing.assert_close(got[rows.response], torch.tensor(advantage), atol=1e-5, rtol=1e-5)
    assert not got[~rows.response].any()

    states = rows(lambda_returns, **factors).roll(1, dims=1)  # the state before a token is one position earlier
    for number, document in enumerate(documents):
        of_document = rows.response & (rows.documents == number)
        first = 0 if document.num_prompt else 1  # without a prompt, there is no state before the first token
        expected = torch.tensor(expected_returns[: document.num_response][first:])
        torch.testing.assert_close(states[of_document][first:], expected, atol=1e-5, rtol=1e-5)
        expected_returns = expected_returns[document.num_response :]


@pytest.mark.parametrize(
    "wrong", [{"ends": False}, {"separate": False}], ids=["no end of the last episode", "one episode"]
)
def test_control_the_comparison_with_stable_baselines3_detects_a_wrong_end(wrong: dict[str, bool]) -> None:
    rows = packed(TWO)
    got = rows(advantages, **FACTORS)[rows.response]
    assert torch.allclose(got, torch.tensor(stable_baselines3_results(TWO, 0.5, 0.5)[0]))
    assert not torch.allclose(got, torch.tensor(stable_baselines3_results(TWO, 0.5, 0.5, **wrong)[0]))


@examples
@given(document(min_prompt=1), ratio, ratio)
def test_advantages_and_returns_equal_the_definition(document: Document, discount: float, trace_decay: float) -> None:
    rows, factors = separate_rows([document]), {"discount": discount, "trace_decay": trace_decay}
    advantage, expected_returns = by_definition(document, discount, trace_decay)
    torch.testing.assert_close(
        rows(advantages, **factors)[rows.response], torch.tensor(advantage), atol=1e-5, rtol=1e-5
    )
    got_returns = rows(lambda_returns, **factors)[value_positions(rows.response)]
    expected = torch.tensor([*expected_returns, document.reward])
    torch.testing.assert_close(got_returns, expected, atol=1e-5, rtol=1e-5)


COMPUTES = [advantages, lambda_returns]


def ignores_padding(compute: Compute, documents: list[Document], padding: int, **factors: float) -> bool:
    without_padding = separate_rows(documents)
    length = without_padding.values.shape[1]
    return all(
        torch.equal(padded(compute, **factors)[:, :length], without_padding(compute, **factors))
        and not padded(compute, **factors)[:, length:].any()
        for padded in (separate_rows(documents, padding), separate_rows(documents, padding, filler=math.nan))
    )


@pytest.mark.parametrize("compute", COMPUTES)
@examples
@given(documents=several, padding=st.integers(1, 4), discount=ratio, trace_decay=ratio)
def test_padding_changes_nothing(
    compute: Compute, documents: list[Document], padding: int, discount: float, trace_decay: float
) -> None:
    assert ignores_padding(compute, documents, padding, discount=discount, trace_decay=trace_decay)


def packing_changes_nothing(compute: Compute, documents: list[Document], **factors: float) -> bool:
    together, unpacked = packed(documents)(compute, **factors)[0], separate_rows(documents)(compute, **factors)
    pieces = together.split([len(document.values) for document in documents])
    return all(torch.equal(piece, row[: len(piece)]) for piece, row in zip(pieces, unpacked, strict=True))


@pytest.mark.parametrize("compute", COMPUTES)
@examples
@given(documents=several, discount=ratio, trace_decay=ratio)
def test_documents_in_one_row_are_independent(
    compute: Compute, documents: list[Document], discount: float, trace_decay: float
) -> None:
    assert packing_changes_nothing(compute, documents, discount=discount, trace_decay=trace_decay)


def depends_only_on_states_before_tokens(compute: Compute, documents: list[Document], **factors: float) -> bool:
    """Return whether values at b, after b and in the prompt before a−1 affect neither the result nor its gradients."""
    rows = packed(documents)
    before_a_token = value_positions(rows.response, rows.documents) & ~last_of_response(rows.response, rows.documents)
    before = rows(compute, **factors)
    rows.values = rows.values.where(before_a_token, 100.0).requires_grad_()
    after = rows(compute, **factors)
    (gradient,) = torch.autograd.grad(after.square().sum() + after.sum(), rows.values)
    return torch.equal(before, after) and not gradient[~before_a_token].any()


@pytest.mark.parametrize("compute", COMPUTES)
@examples
@given(documents=several, discount=ratio, trace_decay=ratio)
def test_values_without_a_following_token_do_not_matter(
    compute: Compute, documents: list[Document], discount: float, trace_decay: float
) -> None:
    assert depends_only_on_states_before_tokens(compute, documents, discount=discount, trace_decay=trace_decay)


@pytest.mark.parametrize("compute", COMPUTES)
def test_control_the_three_properties_detect_naive_versions(compute: Compute) -> None:
    assert not ignores_padding(unmasked(compute), TWO[:1], 2, **FACTORS)
    assert not packing_changes_nothing(leaking(compute), TWO, **FACTORS)
    assert not depends_only_on_states_before_tokens(bootstrapping(compute), TWO, **FACTORS)


@examples
@given(several, ratio)
def test_without_a_trace_advantages_are_td_errors(documents: list[Document], discount: float) -> None:
    rows = packed(documents)
    assert torch.equal(rows(advantages, discount=discount, trace_decay=0.0), rows(td_errors, discount=discount))


def is_reward_minus_value(compute: Compute, documents: list[Document], **factors: float) -> bool:
    rows = separate_rows(documents)
    difference = rows.rewards - nn.functional.pad(rows.values, (1, -1))
    return torch.allclose(rows(compute, **factors), difference.where(rows.response, 0.0), atol=1e-5)


@examples
@given(several)
def test_full_trace_without_discount_gives_reward_minus_value(documents: list[Document]) -> None:
    assert is_reward_minus_value(advantages, documents, discount=1.0, trace_decay=1.0)


@examples
@given(document(min_prompt=1))
def test_td_errors_are_zero_if_values_equal_the_reward(document: Document) -> None:
    document.values = [document.reward] * len(document.values)
    rows = separate_rows([document])
    assert not rows(td_errors, discount=1.0).any()
    if document.reward:
        assert rows(bootstrapping(td_errors), discount=1.0).any()
        assert rows(td_errors, discount=0.5)[rows.response][:-1].all()


def test_control_the_special_cases_detect_other_settings() -> None:
    rows = packed(TWO)
    assert not torch.equal(rows(advantages, **FACTORS), rows(td_errors, discount=0.5))
    assert not is_reward_minus_value(advantages, TWO, discount=1.0, trace_decay=0.9)
    assert not is_reward_minus_value(bootstrapping(advantages), TWO, discount=1.0, trace_decay=1.0)


@examples
@given(several, ratio, ratio)
def test_value_targets_are_at_value_positions(documents: list[Document], discount: float, trace_decay: float) -> None:
    rows, factors = packed(documents), {"discount": discount, "trace_decay": trace_decay}
    rows.values.requires_grad_()
    has_target = value_positions(rows.response, rows.documents)
    rewards = torch.tensor([document.reward for document in documents])

    plain = rows(value_targets, kind="reward", **factors)
    assert torch.equal(plain, rewards[rows.documents].where(has_target, 0.0))
    returns = rows(value_targets, kind="lambda_return", **factors)
    assert torch.equal(returns, rows(lambda_returns, **factors))
    assert not returns[~has_target].any()
    assert not plain.requires_grad and not returns.requires_grad and rows(lambda_returns, **factors).requires_grad


def moments(numbers: Tensor) -> tuple[float, float]:
    return float(numbers.mean()), float(numbers.square().mean())


def test_explained_variance_equals_that_of_stable_baselines3() -> None:
    torch.manual_seed(0)
    target = torch.rand(500).round() * 3 + 1
    for value in (target + 0.3, target + torch.randn(500), torch.randn(500) - 2, torch.zeros(500)):
        error = target - value
        got = explained_variance(*moments(target), *moments(error))
        assert got == pytest.approx(utils.explained_variance(value.numpy(), target.numpy()), abs=1e-4)
    shifted = target + 0.3
    determination = 1 - (target - shifted).square().mean() / target.var(correction=0)
    assert explained_variance(*moments(target), *moments(target - shifted)) == pytest.approx(1.0, abs=1e-4)
    assert determination < 0.99  # the coefficient of determination also counts a constant error


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 0.7])
def test_explained_variance_of_constant_targets_is_zero(reward: float) -> None:
    target, value = torch.full((1000,), reward), torch.linspace(0, 1, 1000)
    assert explained_variance(*moments(target), *moments(target - value)) == 0.0


def test_control_rounding_alone_gives_a_nonzero_variance() -> None:
    mean, mean_of_squares = moments(torch.full((1000,), 0.7))
    assert mean_of_squares != mean * mean


Solution = tuple[list[int], list[float], int, bool]
"""The tokens of a solution, the values after them, the task, and whether the solution is correct."""


def naive_ranking(solutions: list[Solution]) -> tuple[float, int]:
    """Return the ranking loss and the number of pairs, with loops over pairs and positions."""
    losses = []
    for right_tokens, right_values, task, is_correct in solutions:
        for wrong_tokens, wrong_values, other_task, other_is_correct in solutions:
            if task != other_task or not is_correct or other_is_correct or right_tokens == wrong_tokens:
                continue
            first = 0
            while right_tokens[first : first + 1] == wrong_tokens[first : first + 1]:
                first += 1
            scores = []
            for values in (right_values, wrong_values):
                after = values[first:] or values[-1:]
                scores.append(sum(after) / len(after))
            losses.append(math.log1p(math.exp(scores[1] - scores[0])))
    return sum(losses), len(losses)


def ranking_of(solutions: list[Solution], prompt: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the number of pairs and the values of solutions that follow a prompt, in a padded batch."""
    length = prompt + max(len(tokens) for tokens, *_ in solutions) + 1
    tokens = torch.full((len(solutions), length), -1)
    response, values = torch.zeros(tokens.shape, dtype=torch.bool), torch.full(tokens.shape, 9.0)
    for row, (own_tokens, own_values, _, _) in enumerate(solutions):
        end = prompt + len(own_tokens)
        tokens[row, :prompt], tokens[row, prompt:end] = 7, torch.tensor(own_tokens)
        response[row, prompt:end], values[row, prompt:end] = True, torch.tensor(own_values)
    values.requires_grad_()
    tasks, is_correct = (torch.tensor([solution[i] for solution in solutions]) for i in (2, 3))
    return *ranking_loss(values, tokens, response, tasks, is_correct), values


SOLUTIONS = st.integers(1, 4).flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 1), min_size=n, max_size=n),
        st.lists(st.floats(-5, 5, width=16), min_size=n, max_size=n),
        st.integers(0, 1),
        st.booleans(),
    )
)


@examples
@given(st.lists(SOLUTIONS, min_size=1, max_size=6))
def test_the_ranking_loss_compares_correct_with_incorrect_solutions_of_a_task(solutions: list[Solution]) -> None:
    total, count, _ = ranking_of(solutions)
    expected_total, expected_count = naive_ranking(solutions)
    assert total.item() == pytest.approx(expected_total, rel=1e-5, abs=1e-6)
    assert count.item() == expected_count


def test_the_ranking_loss_equals_that_computed_by_hand() -> None:
    """The solutions differ from the second token on, so only these values are compared: 2 and (1 + 3) / 2."""
    total, count, values = ranking_of([([5, 6], [8.0, 2.0], 4, True), ([5, 7, 8], [0.0, 1.0, 3.0], 4, False)])
    assert (total.item(), count.item()) == (pytest.approx(math.log(2)), 1)
    (gradient,) = torch.autograd.grad(total, values)
    assert gradient[0].tolist() == [0, 0, 0, -0.5, 0, 0], "raises the values of the correct solution"
    assert gradient[1].tolist() == [0, 0, 0, 0.25, 0.25, 0], "lowers those of the incorrect one"


def test_the_ranking_loss_without_pairs_is_zero() -> None:
    for other in (([6], [-300.0], 1, False), ([5], [-300.0], 0, False)):  # another task, the same tokens
        total, count, values = ranking_of([([5], [300.0], 0, True), other])
        assert (total.item(), count.item()) == (0.0, 0)
        assert not torch.autograd.grad(total, values)[0].any()
