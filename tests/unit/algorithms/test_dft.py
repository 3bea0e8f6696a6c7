"""Tests of dft against the published formula, computed from all logits."""

import torch
from torch import Tensor

from tests.support.weights import plain_logits, sharp_model, trained_weights, with_probable_labels
from tests.unit.objectives.test_objectives import ragged
from wmtp.algorithms.dft import Dft
from wmtp.data.collate import IGNORED
from wmtp.ops.targets import targets


def agrees(weights: Tensor, expected: Tensor) -> bool:
    return torch.allclose(weights.double(), expected, atol=1e-6, rtol=0)


def test_unscaled_weights_are_the_published_ones() -> None:
    """The published loss of a target is −sg(p)·log p; sg stops the gradient. So its gradient is sg(p) times that of CE.

    The expected weights are the ratios of these gradients with respect to the logit of the target.
    """
    model = sharp_model()
    batch = with_probable_labels(model, ragged())
    target = targets(batch.labels, model.num_heads)
    valid = target != IGNORED
    logits = plain_logits(model, batch)[valid].requires_grad_()
    chosen = target[valid].unsqueeze(-1)
    log_p = logits.log_softmax(dim=-1).gather(-1, chosen)

    def gradient(losses: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
        return found.gather(-1, chosen).squeeze(-1)

    expected = gradient(-log_p.exp().detach() * log_p) / gradient(-log_p)
    assert expected.min() < 1e-4 and expected.max() > 0.5
    for weights in trained_weights(Dft(rescale=False), model, batch):
        assert agrees(weights[valid], expected)
        assert not weights[~valid].any()
    for weights in trained_weights(Dft(power=2.0, rescale=False), model, batch):
        assert agrees(weights[valid], expected**2)

    # the controls: without the stop, and the likelihood of the other tokens
    assert not agrees(expected, gradient(-log_p.exp() * log_p) / gradient(-log_p))
    assert not agrees(expected, (1 - log_p.exp()).squeeze(-1).detach())
