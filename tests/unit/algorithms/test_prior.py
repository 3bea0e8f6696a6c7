"""Tests of prior and surprisal against the published formula, computed from all logits of the reference."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.conftest import Invoke, tiny_model
from tests.support.weights import plain_losses, sharp_model, trained_weights, with_probable_labels
from tests.unit.objectives.test_objectives import ragged
from wmtp.algorithms.base import Algorithm
from wmtp.algorithms.prior import Prior
from wmtp.algorithms.surprisal import Surprisal
from wmtp.data.collate import IGNORED
from wmtp.ops.targets import targets


def prior(power: float = 1.0) -> Prior:
    return Prior(power=power, reference=None, rescale=False)


def surprisal(power: float = 1.0) -> Surprisal:
    return Surprisal(power=power, rescale=False)


@pytest.mark.parametrize("algorithm", [prior, surprisal])
def test_unscaled_weights_are_the_published_ones_for_all_heads(algorithm: Callable[..., Algorithm]) -> None:
    """The published weight of a token is the probability with which the frozen reference predicts it."""
    policy, reference = tiny_model(seed=1), sharp_model()
    batch = with_probable_labels(reference, ragged())
    cached = torch.zeros(*batch.tokens.shape, 1)
    cached[:, 1:, 0] = plain_losses(reference, batch)[0, :, :-1].float()
    batch = replace(batch, reference_losses=cached)
    target = targets(batch.labels, policy.num_heads)
    valid = target != IGNORED
    log_p = (reference(batch.tokens).states[0].double() @ reference.unembedding_weight.double().T).log_softmax(dim=-1)
    of_policy = plain_losses(policy, batch)

    def agrees(weights: Tensor, power: float = 1.0, offset: int = 0) -> bool:
        """Compare with p of the token at t + k, which the reference predicts at t + k − 1."""
        expected = [
            log_p[row, t + k - offset, batch.labels[row, t + k + 1]].exp() ** power
            for k, row, t in valid.nonzero().tolist()
        ]
        return torch.allclose(weights[valid].double(), torch.stack(expected), atol=1e-6, rtol=0)

    for weights in trained_weights(algorithm(), policy, batch):
        assert weights[valid].max() > 0.5
        assert agrees(weights)
        assert not weights[~valid].any()
        assert not agrees(torch.exp(-of_policy)), "the control: the probability under the policy"
        own_head = (-plain_losses(reference, batch)).exp()
        assert not agrees(own_head), "the control: the head of the reference that predicts from the same position"
    for weights in trained_weights(algorithm(power=0.5), policy, batch):
        assert agrees(weights, power=0.5)
        assert not agrees(weights)


@pytest.mark.slow
def test_weights_are_those_of_the_reference_in_a_run(invoke: Invoke) -> None:
    run = ["max_steps=2", "num_samples=0"]
    assert invoke(*run, "hydra.run.dir=first").code == 0
    for arguments in (
        ["algo=prior", "algo.reference=first"],
        ["algo=shuffled", "algo.of=prior", "algo.of.reference=first"],
    ):
        outcome = invoke(*run, *arguments)
        assert outcome.code == 0, outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "key"), [(["algo=prior"], "algo.reference"), (["algo=random", "algo.of=prior"], "algo.of.reference")]
)
def test_a_new_model_needs_another_reference(invoke: Invoke, arguments: list[str], key: str) -> None:
    outcome = invoke(*arguments)
    assert outcome.code == 2 and f"{key}=initial: is for pretrained models" in outcome.err
    assert f"name a run with {key}=PATH" in outcome.err
    trained = invoke(*arguments, f"{key}=null", "pretrain=rho1", "max_steps=1", "num_samples=0")
    assert trained.code == 0, trained.err
