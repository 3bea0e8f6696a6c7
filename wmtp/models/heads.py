"""Residual (Medusa) heads, which predict tokens."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class ResidualHead(nn.Module):
    """A residual layer that computes h + SiLU(W·h) from a hidden state h.

    W is initialized to 0, so the layer at first returns h unchanged.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, state: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
        """Return the hidden state from which a later token is predicted, given the hidden state of head 1."""
        out: Tensor = state + F.silu(self.linear(state))
        return out
