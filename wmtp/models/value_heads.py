"""Value heads, which predict the reward of a solution after each of its tokens."""

import copy
from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from wmtp.field_types import Positive
from wmtp.models.architecture import Context

ValueKind = Literal["state", "action", "block"]
"""The kind of a value head.

"state" reads the trunk's hidden state at the token. "action" reads the hidden state before the token, and has its own
vector for each token of the vocabulary. "block" is a transformer block, followed by a "state" head.
"""


class ValueHead(nn.Module):
    """A head that computes one output per position from the trunk's hidden states.

    The output is the value, or its logit if the value is a probability. A new head returns the same output at every
    position, which is 0 unless it is set (`set_output`).
    """

    bias: nn.Parameter

    @abstractmethod
    def forward(
        self,
        hidden_states: Float[Tensor, "batch position dim"],
        tokens: Int[Tensor, "batch position"] | None = None,
        context: Context = None,
    ) -> Float[Tensor, "batch position"]:
        """Return the outputs in fp32.

        bf16 is not used, because its resolution is 0.004 for values between 0.5 and 1, and TD errors are often smaller.

        Args:
            hidden_states: the hidden states of the trunk.
            tokens: the token ids, which only the kind "action" needs.
            context: the position-dependent input of a block, which only the kind "block" needs.
        """

    @torch.no_grad()
    def set_output(self, output: float) -> None:
        """Set the output of a new head."""
        self.bias.fill_(output)


class StateValueHead(ValueHead):
    """A value head of one or two linear layers."""

    def __init__(self, dim: int, *, hidden_dim: Positive | None = None) -> None:
        """Create a head. `hidden_dim` is the width between two linear layers, or None for one linear layer."""
        super().__init__()
        self.norm = nn.RMSNorm(dim)  # the residual stream grows with depth and training
        self.hidden = None if hidden_dim is None else nn.Linear(dim, hidden_dim)
        self.output = nn.Linear(hidden_dim or dim, 1)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @property
    def bias(self) -> nn.Parameter:  # type: ignore[override]
        """The output of a new head."""
        return self.output.bias

    def forward(
        self,
        hidden_states: Float[Tensor, "*any dim"],
        tokens: Tensor | None = None,
        context: Context = None,
    ) -> Float[Tensor, "*any"]:
        """Return the outputs in fp32."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            x = self.norm(hidden_states.float())
            if self.hidden is not None:
                x = F.silu(self.hidden(x))
            values: Tensor = self.output(x).squeeze(-1).clone()  # FSDP2 hooks outputs, which must not be views
        return values


class ActionValueHead(ValueHead):
    """A value head that compares a token with what the trunk expects after the tokens before it.

    The output after token y_t is q_{y_t} · h_{t−1} + b. h_{t−1} is the normalized hidden state at the previous token,
    and q has a vector for each token of the vocabulary, so it is an action value in the state before the token. At the
    first position of a row, the output is b. Source: Snell et al. 2022, Offline RL for Natural Language Generation with
    Implicit Language Q Learning (arXiv 2206.11871).
    """

    def __init__(self, dim: int, vocab_size: int) -> None:
        """Create a head for a vocabulary of `vocab_size` tokens."""
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.actions = nn.Embedding(vocab_size, dim)
        self.bias = nn.Parameter(torch.zeros(1))
        nn.init.zeros_(self.actions.weight)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch position dim"],
        tokens: Int[Tensor, "batch position"] | None = None,
        context: Context = None,
    ) -> Float[Tensor, "batch position"]:
        """Return the outputs in fp32."""
        assert tokens is not None
        with torch.autocast(hidden_states.device.type, enabled=False):
            before = F.pad(self.norm(hidden_states[:, :-1].float()), (0, 0, 1, 0))
            values: Tensor = (before * self.actions(tokens)).sum(dim=-1) + self.bias
        return values


class BlockValueHead(ValueHead):
    """A value head with a transformer block of its own."""

    def __init__(self, block: nn.Module, dim: int, *, hidden_dim: Positive | None = None) -> None:
        """Create a head. Its block is a copy of `block`. `hidden_dim` is that of `StateValueHead`."""
        super().__init__()
        self.block = copy.deepcopy(block).float().requires_grad_(True)  # value heads are in fp32
        self.state = StateValueHead(dim, hidden_dim=hidden_dim)

    @property
    def bias(self) -> nn.Parameter:  # type: ignore[override]
        """The output of a new head."""
        return self.state.bias

    def forward(
        self,
        hidden_states: Float[Tensor, "batch position dim"],
        tokens: Tensor | None = None,
        context: Context = None,
    ) -> Float[Tensor, "batch position"]:
        """Return the outputs in fp32."""
        values: Tensor = self.state(self.block(hidden_states.float(), context))
        return values
