"""Modules of a Llama-style transformer with RMSNorm, rotary positions, grouped-query attention and SwiGLU."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

RotaryTable = tuple[Float[Tensor, "#batch position pair"], Float[Tensor, "#batch position pair"]]
"""The cosines and the sines of the rotation angles. There is one angle for each position and pair of dimensions."""


def rotary_table(positions: Int[Tensor, "#batch position"], head_dim: int, theta: float) -> RotaryTable:
    """Return the cosines and sines of the rotation angles at the given positions.

    The angle of the pair of dimensions 2i and 2i + 1 is position · theta^(−2·i/head_dim) in radians.

    Source: Su et al. 2021, RoFormer (arXiv 2104.09864), section 3.2.
    """
    pairs = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * theta ** (-pairs / head_dim)
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch position head head_dim"], table: RotaryTable
) -> Float[Tensor, "batch position head head_dim"]:
    """Rotate the pairs of dimensions (0, 1), (2, 3), … of every attention head by the angles in `table`.

    Meta's Llama code rotates the same pairs.
    """
    cos, sin = (part[:, :, None].to(x.dtype) for part in table)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Attention(nn.Module):
    """Causal grouped-query self-attention with rotary positions."""

    def __init__(self, dim: int, num_attention_heads: int, num_kv_heads: int, dropout: float) -> None:
        super().__init__()
        self.head_dim = dim // num_attention_heads
        self.num_kv_heads = num_kv_heads
        self.groups = num_attention_heads // num_kv_heads
        self.dropout = dropout
        self.query = nn.Linear(dim, num_attention_heads * self.head_dim, bias=False)
        self.key = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(num_attention_heads * self.head_dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch position dim"],
        table: RotaryTable,
    ) -> Float[Tensor, "batch position dim"]:
        """Return the attention output. Each position attends to itself and to earlier positions."""
        queries, keys, values = (
            projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.query, self.key, self.value)
        )
        queries, keys = rotate(queries, table), rotate(keys, table)
        keys, values = (part.transpose(1, 2).repeat_interleave(self.groups, dim=1) for part in (keys, values))
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2), keys, values,
            is_causal=True, dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
        result: Tensor = self.output(attended.transpose(1, 2).flatten(-2))
        return result


class FeedForward(nn.Module):
    """A SwiGLU layer, which computes output(silu(gate(x)) · up(x)). Source: Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden_dim, bias=False)
        self.up = nn.Linear(dim, hidden_dim, bias=False)
        self.output = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
        """Apply the layer to every position independently."""
        result: Tensor = self.output(F.silu(self.gate(x)) * self.up(x))
        return result


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(
        self, dim: int, num_attention_heads: int, num_kv_heads: int, hidden_dim: int, norm_eps: float, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.attention = Attention(dim, num_attention_heads, num_kv_heads, dropout)
        self.feed_forward_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.feed_forward = FeedForward(dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch position dim"],
        table: RotaryTable,
    ) -> Float[Tensor, "batch position dim"]:
        """Return the residual stream after adding the outputs of the attention layer and of the feed-forward layer."""
        x = x + self.dropout(self.attention(self.attention_norm(x), table))
        result: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return result
