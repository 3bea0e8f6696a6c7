"""A model that reads sequences piece by piece, remembering keys and values."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from wmtp.models.mtp import MtpModel
from wmtp.models.transformer import Block, rotation


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
            getattr(b.attention, part).weight * b.attention_norm.weight
            for part in ("query", "key", "value") for b in blocks
        ]  # fmt: skip
        gates_and_ups = [
            torch.cat([b.feed_forward.gate.weight, b.feed_forward.up.weight]) * b.feed_forward_norm.weight
            for b in blocks
        ]
        self.projections = torch.cat(projections).to(dtype)
        self.attention_outputs = torch.stack([a.output.weight.T for a in attentions]).to(dtype)
        self.gates_and_ups = torch.stack([weight.T for weight in gates_and_ups]).to(dtype)
        self.feed_forward_outputs = torch.stack([b.feed_forward.output.weight.T for b in blocks]).to(dtype)

    def __call__(
        self,
        x: Float[Tensor, "row position dim"],
        reading: "Reading",
        memory: Float[Tensor, "any_row part_head slot head_dim"],
        at: Int[Tensor, " row"] | None = None,
    ) -> Float[Tensor, "block row position_or_1 dim"]:
        """Each block's stream behind every position, or behind the one that `at` names in each row."""
        projected = F.linear(self._normed(x), self.projections).view(*x.shape[:2], -1, self.head_dim)
        reading.rotate(projected[..., : self.num_heads + self.num_kv_heads, :])
        queries, new = projected[:, :, : self.num_heads], projected[:, :, self.num_heads :]
        memory.flatten(0, 2).index_copy_(0, reading.slots(2 * self.num_kv_heads), new.reshape(-1, self.head_dim))
        mask = reading.mask
        if at is not None:
            x, queries, mask = x[reading.rows, at, None], queries[reading.rows, at, None], reading.mask_at(at)
        keys, values = memory[: len(x), :, : reading.length].chunk(2, dim=1)
        attended = F.scaled_dot_product_attention(
            queries.transpose(1, 2), keys, values, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
        attended = attended.transpose(1, 2).reshape(len(x) * x.shape[1], len(self.attention_outputs), -1)
        stream = torch.baddbmm(x.reshape(1, -1, x.shape[-1]), attended.transpose(0, 1), self.attention_outputs)
        gates, ups = torch.bmm(self._normed(stream), self.gates_and_ups).chunk(2, dim=-1)
        stream = torch.baddbmm(stream, F.silu(gates).mul_(ups), self.feed_forward_outputs)
        return stream.view(-1, *x.shape)

    def _normed(self, x: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


class Cache:
    """Keys and values of every block for every position read so far; rows are used again.

    `blocks` holds one tensor each: [row, keys of the kv heads and then values, slot, head_dim]. A position's
    slot is its number. What lies behind a row's last position was padding or a rejected draft: it is
    overwritten before any query may see it.
    """

    def __init__(self, blocks: Sequence[StackedBlock], num_rows: int, num_slots: int) -> None:
        self.num_slots = num_slots
        self.blocks = [
            block.projections.new_zeros(num_rows, 2 * block.num_kv_heads, num_slots, block.head_dim) for block in blocks
        ]

    def reserve(self, num_slots: int, most: int) -> None:
        """Make room for so many positions; for twice as many, up to `most`, so that this is rarely done."""
        if num_slots > self.num_slots:
            more = min(2 * num_slots, most) - self.num_slots
            self.num_slots += more
            self.blocks = [F.pad(block, (0, 0, 0, more)) for block in self.blocks]

    def copy(self, source: "Cache", source_rows: list[int], rows: list[int], num_slots: int) -> None:
        """Copy the first slots of some rows."""
        for target, block in zip(self.blocks, source.blocks, strict=True):
            target[rows, :, :num_slots] = block[source_rows, :, :num_slots]


class Reading:
    """Where in a cache the tokens of one forward go, and what they may see.

    Row i reads `width` tokens from position `starts[i]` on; `length` positions are then known of the longest.
    """

    def __init__(
        self, starts: Int[Tensor, " row"], width: int, length: int, cache: Cache, turns: Float[Tensor, "2 slot pair 2"]
    ) -> None:
        self.length, self.num_slots = length, cache.num_slots
        self.rows = torch.arange(len(starts), device=starts.device)
        self.positions = starts[:, None] + torch.arange(width, device=starts.device)
        self._cos, self._sin = turns[:, self.positions, None]
        self._slots: dict[int, Tensor] = {}
        self.mask = None if length == width else self._mask(self.positions)
        """None: every row begins at 0, so that attention is plainly causal."""

    def _mask(self, positions: Int[Tensor, "row query"]) -> Float[Tensor, "row 1 query slot"]:
        hidden = torch.arange(self.length, device=positions.device) > positions[:, None, :, None]
        return torch.zeros_like(hidden, dtype=self._cos.dtype).masked_fill_(hidden, -torch.inf)

    def mask_at(self, at: Int[Tensor, " row"]) -> Float[Tensor, "row 1 1 slot"]:
        """What one of each row's tokens may see."""
        return self._mask(self.positions[self.rows, at, None])

    def slots(self, num_heads: int) -> Int[Tensor, " row_position_head"]:
        """Which vectors of a block's cache are those of the tokens read, with `num_heads` for each slot."""
        if num_heads not in self._slots:
            lines = self.rows[:, None, None] * num_heads + torch.arange(num_heads, device=self.rows.device)
            self._slots[num_heads] = (lines * self.num_slots + self.positions[..., None]).flatten()
        return self._slots[num_heads]

    def rotate(self, x: Float[Tensor, "row position head head_dim"]) -> None:
        """Turn queries and keys in place, as `transformer.rotate` does."""
        pairs = x.view(*x.shape[:-1], -1, 2)
        swapped = pairs.flip(-1)
        pairs.mul_(self._cos).addcmul_(swapped, self._sin)


class CachedModel:
    """The weights of a model, made ready for reading: the trunk, head 1, and the drafting heads as one.

    A forward begins with `read` and goes on with `next_logits` and `draft_logits`. There is no dropout, so it
    does not matter whether the model is training. `num_slots` is the number of positions that are ever read.
    """

    def __init__(self, model: MtpModel, num_heads: int, num_slots: int, dtype: torch.dtype) -> None:
        blocks = [StackedBlock([block], dtype) for block in [*model.trunk, model.heads[0]]]
        self._trunk, self._first = blocks[:-1], blocks[-1]
        self._drafting = StackedBlock([*model.heads[1:num_heads]], dtype) if num_heads > 1 else None
        self.num_heads, self.num_slots = num_heads, num_slots
        self.blocks = [*blocks, self._drafting] if self._drafting else blocks
        self._embedding, self._unembedding = model.embedding.weight.to(dtype), model.unembedding_weight.to(dtype)
        self._norm_weight, self._eps = model.norm.weight.to(dtype), model.norm.eps
        positions = torch.arange(num_slots, device=self.device)[None]
        cos, sin = (part[0] for part in rotation(positions, model.head_dim, model.rope_theta))
        self._turns = torch.stack([torch.stack([cos, cos], -1), torch.stack([-sin, sin], -1)]).to(dtype)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._unembedding.device

    def new_cache(self, num_rows: int, num_slots: int) -> Cache:
        """An empty cache."""
        return Cache(self.blocks, num_rows, num_slots)

    def read(
        self, tokens: Int[Tensor, "row position"], starts: Int[Tensor, " row"], length: int, cache: Cache
    ) -> tuple[Float[Tensor, "row position dim"], Reading]:
        """Let the trunk read tokens that continue the first rows of a cache: its states, and where they are."""
        reading = Reading(starts, tokens.shape[1], length, cache, self._turns)
        x = F.embedding(tokens, self._embedding)
        for block, memory in zip(self._trunk, cache.blocks, strict=False):
            x = block(x, reading, memory)[0]
        return x, reading

    def next_logits(
        self, x: Float[Tensor, "row position dim"], reading: Reading, cache: Cache, at: Int[Tensor, " row"] | None
    ) -> Float[Tensor, "row position_or_1 token"]:
        """Head 1's logits behind every position read, or behind one of each row."""
        return self._logits(self._first(x, reading, cache.blocks[len(self._trunk)], at)[0])

    def draft_logits(
        self, x: Float[Tensor, "row position dim"], reading: Reading, cache: Cache, at: Int[Tensor, " row"]
    ) -> Float[Tensor, "row draft token"]:
        """The logits of heads 2 … H behind one position of each row."""
        if self._drafting is None:
            return x.new_empty(len(x), 0, len(self._unembedding))
        return self._logits(self._drafting(x, reading, cache.blocks[-1], at)[:, :, 0].transpose(0, 1))

    def _logits(self, states: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any token"]:
        normed = F.rms_norm(states, states.shape[-1:], self._norm_weight, self._eps)
        return F.linear(normed, self._unembedding)
