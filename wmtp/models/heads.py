"""The value head, which predicts the reward of a solution after each token, and residual (Medusa) heads."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wmtp.field_types import Positive


class ValueHead(nn.Module):
    """A linear layer, or two layers, from the trunk's hidden states to one value per position."""

    def __init__(self, dim: int, *, hidden_dim: Positive | None = None) -> None:
        """Create a head whose values are all 0 at first.

        `hidden_dim` is the width between the two layers; with None the head has one layer.
        """
        super().__init__()
        self.norm = nn.RMSNorm(dim)  # the residual stream grows with depth and training
        self.hidden = None if hidden_dim is None else nn.Linear(dim, hidden_dim)
        self.output = nn.Linear(hidden_dim or dim, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden_states: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any"]:
        """Return values in fp32: TD errors are often smaller than the resolution of bf16 (0.004 below 1)."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            x = self.norm(hidden_states.float())
            if self.hidden is not None:
                x = F.silu(self.hidden(x))
            values: Tensor = self.output(x).squeeze(-1).clone()  # FSDP2 hooks outputs, which must not be views
        return values


class ResidualHead(nn.Module):
    """A residual layer h + SiLU(W·h); W is initialized to 0, so the layer starts as the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, state: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
        """Return the state that predicts a later token, given the state of head 1."""
        out: Tensor = state + F.silu(self.linear(state))
        return out
