"""Blocks of `wmtp.models.transformer` that are fused for decoding, so that few matrix products are needed."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from wmtp.generation.kv_cache import CachedForward, KVBlock
from wmtp.models.lora import effective_weight
from wmtp.models.transformer import Block, RotaryTable


class FusedBlock:
    """One or several `Block`s that have the same input and are computed together.

    The attention heads of all blocks are concatenated as if they were the heads of one block. The weights of each norm
    are multiplied into the matrices that follow the norm.
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

    def new_kv_block(self, num_rows: int, num_slots: int) -> KVBlock:
        """Return an empty cache for the key and value heads of all blocks."""
        return self.projections.new_zeros(num_rows, 2 * self.num_kv_heads, num_slots, self.head_dim)

    def __call__(
        self,
        x: Float[Tensor, "row position dim"],
        forward: CachedForward,
        kv_block: KVBlock,
        at: Int[Tensor, " row"] | None = None,
    ) -> Float[Tensor, "block row position_or_1 dim"]:
        """Return the output of each block at every token of the forward pass.

        If `at` is given, return the output only at the token with the index `at[row]` in each row.
        """
        projected = F.linear(self._normalize(x), self.projections).view(*x.shape[:2], -1, self.head_dim)
        rotate_in_place(projected[..., : self.num_heads + self.num_kv_heads, :], forward.context)
        keys, values = forward.update(projected[:, :, self.num_heads :], kv_block)
        queries, mask = projected[:, :, : self.num_heads], self._mask(forward, forward.positions)
        if at is not None:
            x, queries = x[forward.rows, at, None], queries[forward.rows, at, None]
            mask = causal_mask(forward.positions[forward.rows, at, None], forward.length, x.dtype)
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2), keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        attended = attended.transpose(1, 2).reshape(len(x) * x.shape[1], len(self.attention_outputs), -1)
        stream = torch.baddbmm(x.reshape(1, -1, x.shape[-1]), attended.transpose(0, 1), self.attention_outputs)
        gates, ups = torch.bmm(self._normalize(stream), self.gates_and_ups).chunk(2, dim=-1)
        stream = torch.baddbmm(stream, F.silu(gates).mul_(ups), self.feed_forward_outputs)
        return stream.view(-1, *x.shape)

    def _mask(self, forward: CachedForward, positions: Int[Tensor, "row query"]) -> Tensor | None:
        if forward.is_causal:
            return None
        mask: Tensor = forward.shared_tensor(
            "mask", lambda: causal_mask(positions, forward.length, self.projections.dtype)
        )
        return mask

    def _normalize(self, x: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


def causal_mask(
    positions: Int[Tensor, "row query"], length: int, dtype: torch.dtype
) -> Float[Tensor, "row 1 query slot"]:
    """Return an additive attention mask, which is −∞ for the slots after the position of a query, and 0 elsewhere."""
    hidden = torch.arange(length, device=positions.device) > positions[:, None, :, None]
    return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, -torch.inf)


def rotate_in_place(x: Float[Tensor, "row position head head_dim"], table: tuple[Tensor, Tensor]) -> None:
    """Rotate queries and keys in place by their rotary positions.

    `table` comes from `signed_rotary_table`. The result equals that of `transformer.rotate`.
    """
    cos, sin = table
    pairs = x.view(*x.shape[:-1], -1, 2)
    swapped = pairs.flip(-1)
    pairs.mul_(cos).addcmul_(swapped, sin)


def signed_rotary_table(table: RotaryTable, dtype: torch.dtype) -> Float[Tensor, "2 slot pair 2"]:
    """Return the table of rotary positions in the form that `rotate_in_place` needs.

    For each pair of dimensions, the table contains the cosine twice, and the sine with a negative and a positive sign.
    """
    cos, sin = (part[0] for part in table)
    return torch.stack([torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)]).to(dtype)
