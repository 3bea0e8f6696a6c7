"""TD errors, advantages, λ-returns and losses of a value head.

V_t is the value at position t, after token t. A response consists of the consecutive tokens a … b of one document.
`rewards` contains the reward R of a response at all tokens of the response, but R is used only once, at b. If a row
contains several documents, `documents` contains the index of the document of each position, and the results of a
document do not depend on the other documents. δ is the TD error, A is the advantage, and G is the λ-return.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from wmtp.ops.metric_sums import standard_deviation


def last_of_response(
    response: Bool[Tensor, "batch position"], documents: Int[Tensor, "batch position"] | None = None
) -> Bool[Tensor, "batch position"]:
    """Return a mask that is True at b, the last token of each response."""
    return response & ~_neighbor(response, +1, documents)


def value_positions(
    response: Bool[Tensor, "batch position"], documents: Int[Tensor, "batch position"] | None = None
) -> Bool[Tensor, "batch position"]:
    """Return a mask of the positions a−1 … b, whose values are trained.

    These are the last token of the prompt and all tokens of the response.

    >>> value_positions(torch.tensor([[False, False, True, True, False]])).int().tolist()
    [[0, 1, 1, 1, 0]]
    """
    return response | _neighbor(response, +1, documents)


def token_rewards(
    rewards: Float[Tensor, " batch"], response: Bool[Tensor, "batch position"]
) -> Float[Tensor, "batch position"]:
    """Return the reward of each sample at all tokens of its response, and 0 at other tokens."""
    return rewards[:, None].expand(response.shape).where(response, 0.0)


def td_errors(
    values: Float[Tensor, "batch position"],
    rewards: Float[Tensor, "batch position"],
    response: Bool[Tensor, "batch position"],
    documents: Int[Tensor, "batch position"] | None = None,
    *,
    discount: float,
) -> Float[Tensor, "batch position"]:
    """Return δ_i = r_i + γ·V_i·[i<b] − V_{i−1} at the tokens of responses, and 0 elsewhere.

    r_b = R, and r_i = 0 for i < b. V_{i−1} is 0 if i is the first token of the document. `discount` is γ.
    """
    last = last_of_response(response, documents)
    td_targets = rewards.where(last, discount * values)
    return (td_targets - _neighbor(values, -1, documents)).where(response, 0.0)


def advantages(
    values: Float[Tensor, "batch position"],
    rewards: Float[Tensor, "batch position"],
    response: Bool[Tensor, "batch position"],
    documents: Int[Tensor, "batch position"] | None = None,
    *,
    discount: float,
    trace_decay: float,
) -> Float[Tensor, "batch position"]:
    """Return A_i = Σ_l (γλ)^l·δ_{i+l} over the rest of the response, and 0 outside responses.

    `discount` is γ and `trace_decay` is λ. If λ is 0, A_i is the TD error.
    Source: Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized Advantage Estimation
    (arXiv 1506.02438), eq. 16.
    """
    errors = td_errors(values, rewards, response, documents, discount=discount)
    continues = response & ~last_of_response(response, documents)
    decays = (discount * trace_decay) * continues.to(errors.dtype)
    advantage, reversed_advantages = torch.zeros_like(errors[:, 0]), []
    for error, decay in zip(reversed(errors.unbind(1)), reversed(decays.unbind(1)), strict=True):
        advantage = torch.addcmul(error, decay, advantage)
        reversed_advantages.append(advantage)
    return torch.stack(reversed_advantages[::-1], dim=1)


def lambda_returns(
    values: Float[Tensor, "batch position"],
    rewards: Float[Tensor, "batch position"],
    response: Bool[Tensor, "batch position"],
    documents: Int[Tensor, "batch position"] | None = None,
    *,
    discount: float,
    trace_decay: float,
) -> Float[Tensor, "batch position"]:
    """Return the λ-return G_t = A_{t+1} + V_t at positions a−1 … b−1, R at b, and 0 elsewhere.

    `discount` is γ and `trace_decay` is λ. No token follows b, so the result at b is R.
    Source: Sutton & Barto 2018, Reinforcement Learning: An Introduction, eq. 12.2 and 12.3.
    """
    estimates = advantages(values, rewards, response, documents, discount=discount, trace_decay=trace_decay)
    token_follows = _neighbor(response, +1, documents)
    returns = _neighbor(estimates, +1, documents) + values
    return returns.where(token_follows, rewards)


def value_targets(
    values: Float[Tensor, "batch position"],
    rewards: Float[Tensor, "batch position"],
    response: Bool[Tensor, "batch position"],
    documents: Int[Tensor, "batch position"] | None = None,
    *,
    kind: Literal["reward", "lambda_return"],
    discount: float,
    trace_decay: float,
) -> Float[Tensor, "batch position"]:
    """Return the training target of V at the positions a−1 … b, and 0 elsewhere. The result has no gradient.

    The target is R if `kind` is "reward", and the λ-return if `kind` is "lambda_return".
    """
    values, rewards = values.detach(), rewards.detach()
    if kind == "lambda_return":
        return lambda_returns(values, rewards, response, documents, discount=discount, trace_decay=trace_decay)
    return rewards.where(response, _neighbor(rewards, +1, documents))


def explained_variance(target_mean: float, target_square: float, error_mean: float, error_square: float) -> float:
    """Return 1 − Var(error) / Var(target). The error is the target minus the value.

    The result is 0.0 if the standard deviation of the targets is at most a thousandth of their root mean square. Such a
    small variance can be a rounding error of sums in fp32.

    Args:
        target_mean: the mean of the targets.
        target_square: the mean of the squared targets.
        error_mean: the mean of the errors.
        error_square: the mean of the squared errors.
    """
    target_deviation = standard_deviation(target_mean, target_square)
    if target_deviation**2 <= 1e-6 * target_square:
        return 0.0
    return 1.0 - (standard_deviation(error_mean, error_square) / target_deviation) ** 2


def ranking_loss(
    values: Float[Tensor, "batch position"],
    tokens: Int[Tensor, "batch position"],
    response: Bool[Tensor, "batch position"],
    tasks: Int[Tensor, " batch"],
    is_correct: Bool[Tensor, " batch"],
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """Return the ranking loss Σ −log σ(s⁺ − s⁻) over all pairs, and the number of pairs.

    A pair consists of a correct and an incorrect sample of the same task, whose prompts are equal. s⁺ and s⁻ are the
    means of their values from the first position on at which their tokens differ; before it, nothing tells the two
    apart. Samples that do not differ are not a pair. If there are no pairs, both results are 0.
    Source: Bradley & Terry 1952, Rank Analysis of Incomplete Block Designs: I.
    """
    correct, incorrect = ((tasks[:, None] == tasks) & is_correct[:, None] & ~is_correct).nonzero(as_tuple=True)
    differs = (tokens[correct] != tokens[incorrect]) | (response[correct] != response[incorrect])
    has_begun = differs.cumsum(dim=1) > 0
    is_pair, scores = has_begun[:, -1], []
    for samples in (correct, incorrect):
        mask = has_begun & response[samples]
        # a solution that ends where the other one goes on keeps its last value
        mask |= last_of_response(response)[samples] & ~mask.any(dim=1, keepdim=True)
        scores.append((values[samples] * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1))
    losses = F.softplus(scores[1] - scores[0])
    return losses[is_pair].sum(), is_pair.sum()


def _neighbor(
    x: Shaped[Tensor, "batch position"], offset: Literal[-1, 1], documents: Int[Tensor, "batch position"] | None
) -> Shaped[Tensor, "batch position"]:
    """Return x[t + offset] at position t, or 0 if t + offset is outside the row or in another document."""
    is_valid = torch.ones_like(x, dtype=torch.bool) if documents is None else documents.roll(-offset, 1) == documents
    is_valid[:, -1 if offset > 0 else 0] = False
    return x.roll(-offset, 1).masked_fill(~is_valid, 0)
