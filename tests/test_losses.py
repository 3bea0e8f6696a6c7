import torch
import torch.nn.functional as F

from wmtp.data.collate import IGNORED
from wmtp.losses import cross_entropy


def test_equals_the_dense_cross_entropy_with_its_gradients() -> None:
    torch.manual_seed(0)
    states = torch.randn(3, 2, 5, 8, requires_grad=True)
    unembedding = torch.randn(11, 8, requires_grad=True)
    target = torch.randint(0, 11, (3, 2, 5))
    target[torch.rand(target.shape) < 0.4] = IGNORED
    factors = torch.randn(target.shape)

    dense = F.cross_entropy((states @ unembedding.T).movedim(-1, 1), target, reduction="none", ignore_index=IGNORED)
    expected = torch.autograd.grad((dense * factors).sum(), (states, unembedding))
    got_losses = cross_entropy(states, unembedding, target)
    got = torch.autograd.grad((got_losses * factors).sum(), (states, unembedding))

    torch.testing.assert_close(got_losses, dense)
    for gradient, wanted in zip(got, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_nothing_to_predict_is_zero() -> None:
    losses = cross_entropy(torch.randn(2, 1, 3, 4), torch.randn(5, 4), torch.full((2, 1, 3), IGNORED))
    assert losses.tolist() == [[[0.0] * 3]] * 2
