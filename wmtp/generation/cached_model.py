"""A model prepared for decoding with a key-value cache."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from wmtp.generation.fused_block import FusedBlock, signed_rotary_table
from wmtp.generation.kv_cache import CachedBlock, CachedForward, KVBlock, KVCache, eval_mode
from wmtp.models.huggingface.decoder_block import DecoderBlock, window_mask
from wmtp.models.mtp import MtpModel
from wmtp.models.transformer import Block


class CachedModel:
    """A model that is prepared for decoding. It consists of the trunk, head 1, and the heads that draft tokens.

    For a forward pass, `forward_trunk`, `next_logits` and `draft_logits` are each called once, in this order. Dropout
    is never applied, so that the training mode of the model has no effect. `num_heads` is the number of heads in use,
    including head 1. `num_slots` is the maximum length of a sequence.
    """

    def __init__(self, model: MtpModel, num_heads: int, num_slots: int, dtype: torch.dtype) -> None:
        self.num_heads, self.num_slots, self.dtype = num_heads, num_slots, dtype
        self._embedding, self._unembedding = model.embedding.weight.to(dtype), model.unembedding_weight.to(dtype)
        self._positions, self._norm = model.positions, model.norm
        draft_heads = [*model.heads[1:num_heads]]
        is_medusa = model.architecture.head_kind == "medusa"
        *self._trunk, self._head_1 = _cached_blocks([*model.trunk, model.heads[0]], dtype)
        self._draft_blocks = [] if is_medusa else _fused_blocks(draft_heads, dtype)
        self._medusa_heads = draft_heads if is_medusa else []
        self.blocks: list[CachedBlock] = [*self._trunk, self._head_1, *self._draft_blocks]
        self._rotary_table: Tensor | None = None
        if isinstance(self._head_1, FusedBlock):
            slots = torch.arange(num_slots, device=self.device)[None]
            self._rotary_table = signed_rotary_table(model.positions(slots, self._embedding[None, :1]), dtype)

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self._unembedding.device

    def new_cache(self, num_rows: int, num_slots: int) -> KVCache:
        """Return an empty key-value cache with `num_rows` rows of `num_slots` positions."""
        return KVCache(self.blocks, num_rows, num_slots)

    def forward_trunk(
        self, tokens: Int[Tensor, "row position"], starts: Int[Tensor, " row"], length: int, cache: KVCache
    ) -> tuple[Float[Tensor, "row position dim"], CachedForward]:
        """Run the trunk on tokens that continue the sequences in the first rows of a cache.

        The tokens of row i begin at position `starts[i]`. `length` is the number of cached positions of the longest row
        after this forward pass. The result is the output of the trunk, and the `CachedForward` of this forward pass.
        """
        forward = CachedForward(starts, tokens.shape[1], length, cache.num_slots)
        x = F.embedding(tokens, self._embedding)
        if self._rotary_table is not None:
            forward.context = tuple(self._rotary_table[:, forward.positions, None])
        else:
            x = self._embed(x, forward.positions)
            forward.context = self._positions(forward.positions, x)
        for block, kv_block in zip(self._trunk, cache.kv_blocks, strict=False):
            x = block(x, forward, kv_block)[0]
        return x, forward

    def next_logits(
        self,
        x: Float[Tensor, "row position dim"],
        forward: CachedForward,
        cache: KVCache,
        at: Int[Tensor, " row"] | None,
    ) -> Float[Tensor, "row position_or_1 token"]:
        """Return the logits of head 1 at every token of the forward pass.

        If `at` is given, return the logits only at the token with the index `at[row]` in each row.
        """
        states = self._head_1(x, forward, cache.kv_blocks[len(self._trunk)], at)[0]
        forward.head_1_states = self._normalize(states)
        return self._logits(forward.head_1_states)

    def draft_logits(
        self, x: Float[Tensor, "row position dim"], forward: CachedForward, cache: KVCache, at: Int[Tensor, " row"]
    ) -> Float[Tensor, "row draft token"]:
        """Return the logits of all heads except head 1, at the token with the index `at[row]` in each row.

        For the same forward pass, `next_logits` must be called first.
        """
        if self._medusa_heads:
            states = forward.head_1_states
            states = states[:, 0] if states.shape[1] == 1 else states[forward.rows, at]
            return self._logits(torch.stack([head(states.to(self._norm_dtype)) for head in self._medusa_heads], dim=1))
        kv_blocks = cache.kv_blocks[len(self._trunk) + 1 :]
        outputs = [
            block(x, forward, kv_block, at) for block, kv_block in zip(self._draft_blocks, kv_blocks, strict=True)
        ]
        if not outputs:
            return x.new_empty(len(x), 0, len(self._unembedding))
        return self._logits(self._normalize(torch.cat(outputs)[:, :, 0].transpose(0, 1)))

    @property
    def _norm_dtype(self) -> torch.dtype:
        return next(self._norm.parameters()).dtype

    def _embed(self, x: Tensor, positions: Tensor) -> Tensor:
        with eval_mode(self._positions):
            return self._positions.embed(x, positions).to(self.dtype)

    def _normalize(self, states: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
        normalized: Tensor = self._norm(states.to(self._norm_dtype))
        return normalized

    def _logits(self, normalized: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any token"]:
        return F.linear(normalized.to(self.dtype), self._unembedding)


def _cached_blocks(blocks: Sequence[nn.Module], dtype: torch.dtype) -> list[CachedBlock]:
    """Return one cached block for each of the given blocks."""
    if isinstance(blocks[0], Block):
        return [FusedBlock([block], dtype) for block in blocks]  # type: ignore[list-item]
    return [HuggingFaceBlock(block, dtype) for block in blocks]  # type: ignore[arg-type]


def _fused_blocks(blocks: Sequence[nn.Module], dtype: torch.dtype) -> list[CachedBlock]:
    """Return cached blocks for blocks that have the same input.

    Blocks of `wmtp.models.transformer` are fused into a single cached block.
    """
    if not blocks:
        return []
    return [FusedBlock(blocks, dtype)] if isinstance(blocks[0], Block) else _cached_blocks(blocks, dtype)  # type: ignore[arg-type]


class HuggingFaceBlock:
    """A cached block that contains one decoder block of the transformers library."""

    def __init__(self, block: DecoderBlock, dtype: torch.dtype) -> None:
        self.weight = next(block.parameters())
        self.block = block if self.weight.dtype == dtype else copy.deepcopy(block).to(dtype)
        self.dtype = dtype

    def new_kv_block(self, num_rows: int, num_slots: int) -> KVBlock:
        """Return an empty cache for the key and value heads of the block."""
        shape = num_rows, 2 * self.block.num_kv_heads, num_slots, self.block.head_dim
        return self.weight.new_zeros(shape, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Tensor, "row position dim"],
        forward: CachedForward,
        kv_block: KVBlock,
        at: Int[Tensor, " row"] | None = None,
    ) -> Float[Tensor, "block row position_or_1 dim"]:
        """Return the output of the block at every token of the forward pass.

        If `at` is given, return the output only at the token with the index `at[row]` in each row.
        """
        window = self.block.window
        mask = None
        if not forward.is_causal or (window is not None and window < forward.length):
            mask = forward.shared_tensor(window, lambda: window_mask(forward.positions, forward.length, window))
        with eval_mode(self.block):
            output = self.block.forward_cached(x, forward.context, mask, _HuggingFaceCache(forward, kv_block))
        return output[None] if at is None else output[forward.rows, at, None][None]


class _HuggingFaceCache:
    """An adapter from a `KVBlock` to the cache interface that the attention layers of transformers call."""

    def __init__(self, forward: CachedForward, kv_block: KVBlock) -> None:
        self._forward, self._kv_block = forward, kv_block

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write new keys and values to the cache. Return all keys and values in the cache, including the new ones."""
        return self._forward.update(torch.cat([keys, values], dim=1).transpose(1, 2), self._kv_block)
