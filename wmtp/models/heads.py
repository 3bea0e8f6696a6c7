"""Two kinds of heads. A value head predicts the reward of a solution. Residual (Medusa) heads predict tokens."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from wmtp.field_types import Positive


class ValueHead(nn.Module):
    """A head of one or two linear layers that computes one value per position from the trunk's hidden states."""

    def __init__(self, dim: int, *, hidden_dim: Positive | None = None) -> None:
        """Create a head that returns only zeros until it is trained.

        `hidden_dim` is the width between the two linear layers. If it is None, the head has one linear layer.
        """
        super().__init__()
        self.norm = nn.RMSNorm(dim)  # the residual stream grows with depth and training
        self.hidden = None if hidden_dim is None else nn.Linear(dim, hidden_dim)
        self.output = nn.Linear(hidden_dim or dim, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, hidden_states: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any"]:
        """Return the values in fp32.

        bf16 is not used, because its resolution is 0.004 for values between 0.5 and 1, and TD errors are often smaller.
        """
        with torch.autocast(hidden_states.device.type, enabled=False):
            x = self.norm(hidden_states.float())
            if self.hidden is not None:
                x = F.silu(self.hidden(x))
            values: Tensor = self.output(x).squeeze(-1).clone()  # FSDP2 hooks outputs, which must not be views
        return values


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
