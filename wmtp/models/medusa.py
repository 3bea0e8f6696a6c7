"""The heads that several inference servers can use: one residual layer on the state of head 1.

Source: Cai et al. 2024, Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads
(arXiv 2401.10774), section 2.1.1. The paper gives every head an unembedding of its own; here all share the model's.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


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
