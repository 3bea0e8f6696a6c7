"""Blocks of other architectures, made ready for reading as they are."""

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wmtp.generation.reading import Memory, Reading, evaluating
from wmtp.models.huggingface.families import DecoderBlock, within_window


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
