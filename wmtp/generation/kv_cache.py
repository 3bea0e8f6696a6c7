"""The key-value cache of a model, and the positions that one forward pass adds to it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from wmtp.models.architecture import Context

KVBlock = Float[Tensor, "any_row part_head slot head_dim"]
"""The cache of one `CachedBlock`. Axis 1 contains the keys of all heads, followed by the values of all heads."""


@runtime_checkable
class CachedBlock(Protocol):
    """One block, or several blocks with the same input, whose keys and values are stored in a cache."""

    def new_kv_block(self, num_rows: int, num_slots: int) -> KVBlock:
        """Return an empty cache with `num_rows` rows and `num_slots` slots per row."""

    def __call__(
        self,
        x: Float[Tensor, "row position dim"],
        forward: "CachedForward",
        kv_block: KVBlock,
        at: Int[Tensor, " row"] | None = None,
    ) -> Float[Tensor, "block row position_or_1 dim"]:
        """Return the output of each block at every token of the forward pass.

        If `at` is given, return the output only at the token with the index `at[row]` in each row.
        """


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Keep a module in evaluation mode during a `with` statement. Restore its previous mode afterwards."""
    was_training = module.training
    if was_training:
        module.eval()
    try:
        yield
    finally:
        if was_training:
            module.train()


class KVCache:
    """The keys and values of every block. A row contains one sequence, and is reused for another sequence later.

    The keys and values at position p are in slot p. The slots after the last position of a sequence may contain padding
    or rejected drafts. These slots are overwritten before any query can attend to them.
    """

    def __init__(self, blocks: Sequence[CachedBlock], num_rows: int, num_slots: int) -> None:
        self.num_slots = num_slots
        self.kv_blocks = [block.new_kv_block(num_rows, num_slots) for block in blocks]

    def reserve(self, num_slots: int, maximum: int) -> None:
        """Increase the number of slots per row to at least `num_slots`.

        If a row has fewer slots, the number of slots becomes twice `num_slots`, but at most `maximum`. The number
        therefore rarely has to be increased again.
        """
        if num_slots > self.num_slots:
            num_added = min(2 * num_slots, maximum) - self.num_slots
            self.num_slots += num_added
            self.kv_blocks = [F.pad(kv_block, (0, 0, 0, num_added)) for kv_block in self.kv_blocks]

    def copy(self, source: "KVCache", source_rows: list[int], rows: list[int], num_slots: int) -> None:
        """Copy the first `num_slots` slots of some rows from another cache.

        Row `source_rows[i]` of the cache `source` is copied to row `rows[i]` of this cache.
        """
        for target, kv_block in zip(self.kv_blocks, source.kv_blocks, strict=True):
            target[rows, :, :num_slots] = kv_block[source_rows, :, :num_slots]


class CachedForward:
    """The positions that one forward pass adds to a cache, and the tensors that all blocks share in this forward pass.

    In row i, the forward pass processes `width` tokens, the first of which is at position `starts[i]`. After the
    forward pass, the longest row has `length` cached positions.
    """

    context: Context = None
    """Information about the positions that every block needs, such as the rotary table."""
    head_1_states: Tensor
    """The normalized hidden states of head 1, which `CachedModel.next_logits` stores."""

    def __init__(self, starts: Int[Tensor, " row"], width: int, length: int, num_slots: int) -> None:
        self.length, self.num_slots = length, num_slots
        self.rows = torch.arange(len(starts), device=starts.device)
        self.positions = starts[:, None] + torch.arange(width, device=starts.device)
        self._slots: dict[int, Tensor] = {}
        self._shared: dict[object, Tensor] = {}
        self.is_causal = length == width
        """True if every row begins at position 0. Then causal attention needs no explicit mask."""

    def shared_tensor(self, name: object, make: Callable[[], Tensor]) -> Tensor:
        """Return the tensor with the given name, which all blocks share.

        The function `make` computes the tensor when it is needed for the first time.
        """
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    def update(self, new: Float[Tensor, "row position part_head head_dim"], kv_block: KVBlock) -> tuple[Tensor, Tensor]:
        """Write new keys and values to the cache. Return all keys and values in the cache, including the new ones."""
        kv_block.flatten(0, 2).index_copy_(0, self._flat_indices(new.shape[2]), new.reshape(-1, new.shape[3]))
        keys, values = kv_block[: len(new), :, : self.length].chunk(2, dim=1)
        return keys, values

    def _flat_indices(self, num_heads: int) -> Int[Tensor, " row_position_head"]:
        """Return the indices at which the new keys and values are stored in a cache block.

        The first three axes of the block are flattened. `num_heads` is the size of the axis of key and value heads.
        """
        if num_heads not in self._slots:
            first_slots = self.rows[:, None, None] * num_heads + torch.arange(num_heads, device=self.rows.device)
            self._slots[num_heads] = (first_slots * self.num_slots + self.positions[..., None]).flatten()
        return self._slots[num_heads]
