"""The value head: how good a solution will turn out, judged after each of its tokens."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wmtp.field_types import Positive


class ValueHead(nn.Module):
    """A linear map, or two layers, from the trunk's hidden states to one value per position."""

    def __init__(self, dim: int, *, hidden_dim: Positive | None = None) -> None:
        """Start from value 0 everywhere. `hidden_dim` is the width between two layers; None: one layer."""
        super().__init__()
        self.norm = nn.RMSNorm(dim)  # the residual stream grows with depth and training
        self.hidden = None if hidden_dim is None else nn.Linear(dim, hidden_dim)
        self.output = nn.Linear(hidden_dim or dim, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden_states: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any"]:
        """The values, computed in fp32: TD errors are often smaller than what bf16 resolves (0.004 below 1)."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            x = self.norm(hidden_states.float())
            if self.hidden is not None:
                x = F.silu(self.hidden(x))
            values: Tensor = self.output(x).squeeze(-1).clone()  # no view: what a forward returns is hooked under FSDP2
        return values


class ResidualHead(nn.Module):
    """h + SiLU(W·h); it starts as h."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.linear.weight)

    def forward(self, state: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
        """The state that predicts a later token than head 1's does."""
        out: Tensor = state + F.silu(self.linear(state))
        return out
