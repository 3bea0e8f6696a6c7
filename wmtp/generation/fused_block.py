"""Blocks of our own transformer, made ready for reading with as few products as possible."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from wmtp.generation.kv_cache import Memory, Reading
from wmtp.models.lora import effective_weight
from wmtp.models.transformer import Block, Rotation


class StackedBlock:
    """Blocks that read the same stream, evaluated side by side; `Block` is the same for one at a time.

    Their heads of attention stand beside each other as if they were one block's, and the weights of the
    norms are folded into the matrices behind them.
    """

    def __init__(self, blocks: Sequence[Block], dtype: torch.dtype) -> None:
        attentions = [b.attention for b in blocks]
        self.eps, self.head_dim = blocks[0].attention_norm.eps, attentions[0].head_dim
        self.num_kv_heads = len(blocks) * attentions[0].num_kv_heads
        self.num_heads = self.num_kv_heads * attentions[0].groups
        projections = [
            effective_weight(getattr(b.attention, part)) * b.attention_norm.weight
            for part in ("query", "key", "value") for b in blocks
        ]  # fmt: skip
        gates_and_ups = [
            torch.cat([effective_weight(b.feed_forward.gate), effective_weight(b.feed_forward.up)])
            * b.feed_forward_norm.weight
            for b in blocks
        ]
        self.projections = torch.cat(projections).to(dtype)
        self.attention_outputs = torch.stack([effective_weight(a.output).T for a in attentions]).to(dtype)
        self.gates_and_ups = torch.stack([weight.T for weight in gates_and_ups]).to(dtype)
        self.feed_forward_outputs = torch.stack([effective_weight(b.feed_forward.output).T for b in blocks]).to(dtype)

    def new_memory(self, num_rows: int, num_slots: int) -> Memory:
        """Of the heads of all blocks, one after the other."""
        return self.projections.new_zeros(num_rows, 2 * self.num_kv_heads, num_slots, self.head_dim)

    def __call__(
        self,
        x: Float[Tensor, "row position dim"],
        reading: Reading,
        memory: Memory,
        at: Int[Tensor, " row"] | None = None,
    ) -> Float[Tensor, "block row position_or_1 dim"]:
        """Each block's stream behind every position, or behind the one that `at` names in each row."""
        projected = F.linear(self._normed(x), self.projections).view(*x.shape[:2], -1, self.head_dim)
        turn(projected[..., : self.num_heads + self.num_kv_heads, :], reading.context)
        keys, values = reading.remember(projected[:, :, self.num_heads :], memory)
        queries, mask = projected[:, :, : self.num_heads], self._mask(reading, reading.positions)
        if at is not None:
            x, queries = x[reading.rows, at, None], queries[reading.rows, at, None]
            mask = hidden_behind(reading.positions[reading.rows, at, None], reading.length, x.dtype)
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2), keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        attended = attended.transpose(1, 2).reshape(len(x) * x.shape[1], len(self.attention_outputs), -1)
        stream = torch.baddbmm(x.reshape(1, -1, x.shape[-1]), attended.transpose(0, 1), self.attention_outputs)
        gates, ups = torch.bmm(self._normed(stream), self.gates_and_ups).chunk(2, dim=-1)
        stream = torch.baddbmm(stream, F.silu(gates).mul_(ups), self.feed_forward_outputs)
        return stream.view(-1, *x.shape)

    def _mask(self, reading: Reading, positions: Int[Tensor, "row query"]) -> Tensor | None:
        if reading.is_causal:
            return None
        mask: Tensor = reading.shared("mask", lambda: hidden_behind(positions, reading.length, self.projections.dtype))
        return mask

    def _normed(self, x: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


def hidden_behind(
    positions: Int[Tensor, "row query"], length: int, dtype: torch.dtype
) -> Float[Tensor, "row 1 query slot"]:
    """−∞ in the slots that lie behind each query, else 0."""
    hidden = torch.arange(length, device=positions.device) > positions[:, None, :, None]
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


def turn(x: Float[Tensor, "row position head head_dim"], turns: tuple[Tensor, Tensor]) -> None:
    """Turn queries and keys in place, as `transformer.rotate` does."""
    cos, sin = turns
    pairs = x.view(*x.shape[:-1], -1, 2)
    swapped = pairs.flip(-1)
    pairs.mul_(cos).addcmul_(swapped, sin)


def table_of_turns(rotation: Rotation, dtype: torch.dtype) -> Float[Tensor, "2 slot pair 2"]:
    """Cosines, and sines with the signs of both halves of a pair, for every slot."""
    cos, sin = (part[0] for part in rotation)
    return torch.stack([torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)]).to(dtype)
