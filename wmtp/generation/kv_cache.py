"""The key-value cache of a model, and the positions of one forward pass in it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from wmtp.models.architecture import Context

KVBlock = Float[Tensor, "any_row part_head slot head_dim"]
"""The cache of one block. Axis 1 contains the keys of all kv heads, then their values."""


@runtime_checkable
class CachedBlock(Protocol):
    """One block, or several blocks with the same input, that read and extend a key-value cache."""

    def new_kv_block(self, num_rows: int, num_slots: int) -> KVBlock:
        """Return an empty cache for the keys and values."""

    def __call__(
        self,
        x: Float[Tensor, "row position dim"],
        forward: "CachedForward",
        kv_block: KVBlock,
        at: Int[Tensor, " row"] | None = None,
    ) -> Float[Tensor, "block row position_or_1 dim"]:
        """Return each block's output at every position, or only at position `at[row]` of each row."""


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in evaluation mode inside the context."""
    was_training = module.training
    if was_training:
        module.eval()
    try:
        yield
    finally:
        if was_training:
            module.train()


class KVCache:
    """Keys and values of every block for every position computed so far; rows are reused.

    Position p is in slot p. The slots after a row's last position may contain padding or rejected drafts. They are
    overwritten before any query can attend to them.
    """

    def __init__(self, blocks: Sequence[CachedBlock], num_rows: int, num_slots: int) -> None:
        self.num_slots = num_slots
        self.kv_blocks = [block.new_kv_block(num_rows, num_slots) for block in blocks]

    def reserve(self, num_slots: int, maximum: int) -> None:
        """Make room for `num_slots` positions.

        Twice as many slots are allocated, up to `maximum`, so that reallocation is rare.
        """
        if num_slots > self.num_slots:
            num_added = min(2 * num_slots, maximum) - self.num_slots
            self.num_slots += num_added
            self.kv_blocks = [F.pad(kv_block, (0, 0, 0, num_added)) for kv_block in self.kv_blocks]

    def copy(self, source: "KVCache", source_rows: list[int], rows: list[int], num_slots: int) -> None:
        """Copy the first `num_slots` slots of some rows of another cache."""
        for target, kv_block in zip(self.kv_blocks, source.kv_blocks, strict=True):
            target[rows, :, :num_slots] = kv_block[source_rows, :, :num_slots]


class CachedForward:
    """The positions of one forward pass in a cache, and the tensors that its blocks share.

    Row i processes `width` tokens from position `starts[i]`. Afterwards the longest row has `length` cached positions.
    """

    context: Context = None
    """Position information for the blocks, such as the rotary table."""
    head_1_states: Tensor
    """Normalized states of head 1; set by `CachedModel.next_logits`."""

    def __init__(self, starts: Int[Tensor, " row"], width: int, length: int, num_slots: int) -> None:
        self.length, self.num_slots = length, num_slots
        self.rows = torch.arange(len(starts), device=starts.device)
        self.positions = starts[:, None] + torch.arange(width, device=starts.device)
        self._slots: dict[int, Tensor] = {}
        self._shared: dict[object, Tensor] = {}
        self.is_causal = length == width
        """True if every row begins at position 0, so that plain causal attention is enough."""

    def shared_tensor(self, name: object, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor of a name, which all blocks use; `make` computes it on the first call."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    def update(self, new: Float[Tensor, "row position part_head head_dim"], kv_block: KVBlock) -> tuple[Tensor, Tensor]:
        """Write new keys and values to the cache; return the keys and the values of all positions so far."""
        kv_block.flatten(0, 2).index_copy_(0, self._flat_indices(new.shape[2]), new.reshape(-1, new.shape[3]))
        keys, values = kv_block[: len(new), :, : self.length].chunk(2, dim=1)
        return keys, values

    def _flat_indices(self, num_heads: int) -> Int[Tensor, " row_position_head"]:
        """Return the indices of the new tokens' vectors in a flattened cache block with `num_heads` heads."""
        if num_heads not in self._slots:
            first_slots = self.rows[:, None, None] * num_heads + torch.arange(num_heads, device=self.rows.device)
            self._slots[num_heads] = (first_slots * self.num_slots + self.positions[..., None]).flatten()
        return self._slots[num_heads]
