"""A model that reads sequences piece by piece, remembering keys and values."""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from wmtp.generation.fused_block import StackedBlock, table_of_turns
from wmtp.generation.kv_cache import Cache, Memory, Reader, Reading, evaluating
from wmtp.models.huggingface.adapters import DecoderBlock, within_window
from wmtp.models.mtp import MtpModel
from wmtp.models.transformer import Block


class CachedModel:
    """A model made ready for reading: the trunk, head 1, and the drafting heads.

    A forward begins with `read` and goes on with `next_logits` and `draft_logits`. There is no dropout, so it
    does not matter whether the model is training. `num_slots` is the number of positions that are ever read.
    """

    def __init__(self, model: MtpModel, num_heads: int, num_slots: int, dtype: torch.dtype) -> None:
        self.num_heads, self.num_slots, self.dtype = num_heads, num_slots, dtype
        self._embedding, self._unembedding = model.embedding.weight.to(dtype), model.unembedding_weight.to(dtype)
        self._positions, self._norm = model.positions, model.norm
        drafting = [*model.heads[1:num_heads]]
        is_medusa = model.architecture.head_kind == "medusa"
        *self._trunk, self._first = _readers([*model.trunk, model.heads[0]], dtype)
        self._drafting = [] if is_medusa else _side_by_side(drafting, dtype)
        self._on_first = drafting if is_medusa else []
        self.readers: list[Reader] = [*self._trunk, self._first, *self._drafting]
        self._turns: Tensor | None = None
        if isinstance(self._first, StackedBlock):
            slots = torch.arange(num_slots, device=self.device)[None]
            self._turns = table_of_turns(model.positions(slots, self._embedding[None, :1]), dtype)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._unembedding.device

    def new_cache(self, num_rows: int, num_slots: int) -> Cache:
        """An empty cache."""
        return Cache(self.readers, num_rows, num_slots)

    def read(
        self, tokens: Int[Tensor, "row position"], starts: Int[Tensor, " row"], length: int, cache: Cache
    ) -> tuple[Float[Tensor, "row position dim"], Reading]:
        """Let the trunk read tokens that continue the first rows of a cache: its states, and where they are."""
        reading = Reading(starts, tokens.shape[1], length, cache.num_slots)
        x = F.embedding(tokens, self._embedding)
        if self._turns is not None:
            reading.context = tuple(self._turns[:, reading.positions, None])
        else:
            x = self._embedded(x, reading.positions)
            reading.context = self._positions(reading.positions, x)
        for reader, memory in zip(self._trunk, cache.blocks, strict=False):
            x = reader(x, reading, memory)[0]
        return x, reading

    def next_logits(
        self, x: Float[Tensor, "row position dim"], reading: Reading, cache: Cache, at: Int[Tensor, " row"] | None
    ) -> Float[Tensor, "row position_or_1 token"]:
        """Head 1's logits behind every position read, or behind one of each row."""
        reading.first = self._normed(self._first(x, reading, cache.blocks[len(self._trunk)], at)[0])
        return self._logits(reading.first)

    def draft_logits(
        self, x: Float[Tensor, "row position dim"], reading: Reading, cache: Cache, at: Int[Tensor, " row"]
    ) -> Float[Tensor, "row draft token"]:
        """The logits of heads 2 … H behind one position of each row; `next_logits` comes before."""
        if self._on_first:
            first = reading.first
            first = first[:, 0] if first.shape[1] == 1 else first[reading.rows, at]
            return self._logits(torch.stack([head(first.to(self._norm_dtype)) for head in self._on_first], dim=1))
        memories = cache.blocks[len(self._trunk) + 1 :]
        states = [reader(x, reading, memory, at) for reader, memory in zip(self._drafting, memories, strict=True)]
        if not states:
            return x.new_empty(len(x), 0, len(self._unembedding))
        return self._logits(self._normed(torch.cat(states)[:, :, 0].transpose(0, 1)))

    @property
    def _norm_dtype(self) -> torch.dtype:
        return next(self._norm.parameters()).dtype

    def _embedded(self, x: Tensor, positions: Tensor) -> Tensor:
        with evaluating(self._positions):
            return self._positions.embed(x, positions).to(self.dtype)

    def _normed(self, states: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
        normed: Tensor = self._norm(states.to(self._norm_dtype))
        return normed

    def _logits(self, normed: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any token"]:
        return F.linear(normed.to(self.dtype), self._unembedding)


def _readers(blocks: Sequence[nn.Module], dtype: torch.dtype) -> list[Reader]:
    """Each block by itself."""
    if isinstance(blocks[0], Block):
        return [StackedBlock([block], dtype) for block in blocks]  # type: ignore[list-item]
    return [Layer(block, dtype) for block in blocks]  # type: ignore[arg-type]


def _side_by_side(blocks: Sequence[nn.Module], dtype: torch.dtype) -> list[Reader]:
    """Blocks that read the same stream, together where they can be."""
    if not blocks:
        return []
    return [StackedBlock(blocks, dtype)] if isinstance(blocks[0], Block) else _readers(blocks, dtype)  # type: ignore[arg-type]


class Layer:
    """One block of a model of transformers."""

    def __init__(self, block: DecoderBlock, dtype: torch.dtype) -> None:
        self.weight = next(block.parameters())
        self.block = block if self.weight.dtype == dtype else copy.deepcopy(block).to(dtype)
        self.dtype = dtype

    def new_memory(self, num_rows: int, num_slots: int) -> Memory:
        """Of the block's heads."""
        shape = num_rows, 2 * self.block.num_kv_heads, num_slots, self.block.head_dim
        return self.weight.new_zeros(shape, dtype=self.dtype)

    def __call__(
        self,
        x: Float[Tensor, "row position dim"],
        reading: Reading,
        memory: Memory,
        at: Int[Tensor, " row"] | None = None,
    ) -> Float[Tensor, "block row position_or_1 dim"]:
        """The block's stream behind every position, or behind the one that `at` names in each row."""
        window = self.block.window
        mask = None
        if not reading.is_causal or (window is not None and window < reading.length):
            mask = reading.shared(window, lambda: within_window(reading.positions, reading.length, window))
        with evaluating(self.block):
            stream = self.block.read(x, reading.context, mask, _Slots(reading, memory))
        return stream[None] if at is None else stream[reading.rows, at, None][None]


class _Slots:
    """Memory as an attention of transformers expects it."""

    def __init__(self, reading: Reading, memory: Memory) -> None:
        self._reading, self._memory = reading, memory

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Add keys and values of the tokens that are read; those of all that is known."""
        return self._reading.remember(torch.cat([keys, values], dim=1).transpose(1, 2), self._memory)
