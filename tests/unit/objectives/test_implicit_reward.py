"""Tests of the objective of implicit_reward against autograd through all logits."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import tiny_model
from tests.unit.objectives.test_objectives import ALONE, RUNS, difference, gradient_of, ragged, rows
from wmtp.data.collate import IGNORED, Batch
from wmtp.errors import TrainingError
from wmtp.models.mtp import MtpModel
from wmtp.objectives.implicit_reward import ImplicitRewardObjective
from wmtp.ops.metric_sums import MetricSums

OBJECTIVE = ImplicitRewardObjective(beta=0.2)


def scores_by_hand(model: MtpModel, batch: Batch) -> Tensor:
    """Return 0.2 · Σ (log p − log p_start) of each solution, with a gradient."""
    log_p = (model(batch.tokens).states[0] @ model.unembedding_weight.T).log_softmax(dim=-1)
    assert batch.reference_losses is not None
    scores = []
    for row, (start, stop) in enumerate(RUNS):
        tokens = range(max(start, 1), stop)
        ratios = [
            log_p[row, i - 1, batch.tokens[row, i]] + batch.reference_losses[row, i, 0]  # −(−log p_start)
            for i in tokens
        ]
        scores.append(0.2 * torch.stack(ratios).sum())
    return torch.stack(scores)


def loss_by_hand(model: MtpModel, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(scores_by_hand(model, batch), batch.rewards)


def test_loss_and_gradient_equal_the_cross_entropy_of_the_reward_and_the_summed_log_ratio() -> None:
    model, batch = tiny_model(), ragged()
    loss, sums = OBJECTIVE.loss(model, *OBJECTIVE.prepare(model, [batch], ALONE))
    expected = loss_by_hand(model, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert OBJECTIVE.metrics(sums)["loss"] == pytest.approx(expected.item(), rel=1e-5)
    expected_gradient = gradient_of(expected, model)
    assert difference(expected_gradient, gradient_of(loss, model)) <= 1e-5
    other_rewards = replace(batch, rewards=1 - batch.rewards)
    assert difference(expected_gradient, gradient_of(loss_by_hand(model, other_rewards), model)) > 0.1, "the control"


@pytest.mark.parametrize("parts", [[(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)], [(2,), (0, 1, 3)]])
def test_splitting_an_update_changes_nothing(parts: list[tuple[int, ...]]) -> None:
    model, batch = tiny_model(), ragged()

    def gradients(batches: list[Batch], late: bool = True) -> Tensor:
        model.zero_grad()
        for prepared in OBJECTIVE.prepare(model, batches):
            own = prepared if late else OBJECTIVE.prepare(model, [prepared.batch])[0]
            (OBJECTIVE.loss(model, own)[0] / (1 if late else len(batches))).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    one_batch, batches = gradients([batch]), [rows(batch, *part) for part in parts]
    assert difference(one_batch, gradients(batches)) <= 1e-5
    if len({len(part) for part in parts}) > 1:
        assert difference(one_batch, gradients(batches, late=False)) > 1e-2, "the control: a mean of means"
    sums = MetricSums()
    for part in batches:
        sums.add(OBJECTIVE.evaluate(model, part))
    assert OBJECTIVE.metrics(sums)["loss"] == pytest.approx(loss_by_hand(model, batch).item(), rel=1e-5)


def test_accuracy_counts_solutions_whose_score_has_the_sign_of_the_reward() -> None:
    model, batch = tiny_model(), ragged()
    scores = scores_by_hand(model, batch)
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    expected = float(((scores > 0) == (rewards > 0.5)).float().mean())
    measured = OBJECTIVE.metrics(OBJECTIVE.evaluate(model, replace(batch, rewards=rewards)))
    assert measured["reward_accuracy"] == expected
    opposite = OBJECTIVE.metrics(OBJECTIVE.evaluate(model, replace(batch, rewards=1 - rewards)))
    assert opposite["reward_accuracy"] == 1 - expected


def test_samples_without_targets_do_not_count() -> None:
    model, batch = tiny_model(), ragged()
    empty = replace(rows(batch, 3), labels=torch.full_like(batch.labels[:1], IGNORED))
    with pytest.raises(TrainingError, match="every label is masked"):
        OBJECTIVE.prepare(model, [empty])
    first, second = OBJECTIVE.prepare(model, [batch, empty])
    total = OBJECTIVE.loss(model, first)[0] + OBJECTIVE.loss(model, second)[0]
    assert total.item() == pytest.approx(loss_by_hand(model, batch).item(), rel=1e-5)
