"""What a model remembers of the sequences that it reads piece by piece, and where the next pieces go."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from wmtp.models.architecture import Context

Memory = Float[Tensor, "any_row part_head slot head_dim"]
"""Keys of one block's kv heads and then its values, for every row and slot."""


@runtime_checkable
class Reader(Protocol):
    """A block, or several side by side, made ready for reading."""

    def new_memory(self, num_rows: int, num_slots: int) -> Memory:
        """Memory for keys and values, empty."""

    def __call__(
        self,
        x: Float[Tensor, "row position dim"],
        reading: "Reading",
        memory: Memory,
        at: Int[Tensor, " row"] | None = None,
    ) -> Float[Tensor, "block row position_or_1 dim"]:
        """Each block's stream behind every position, or behind the one that `at` names in each row."""


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within it, a module is not training."""
    was_training = module.training
    if was_training:
        module.eval()
    try:
        yield
    finally:
        if was_training:
            module.train()


class Cache:
    """Keys and values of every block for every position read so far; rows are used again.

    A position's slot is its number. What lies behind a row's last position was padding or a rejected draft: it is
    overwritten before any query may see it.
    """

    def __init__(self, readers: Sequence[Reader], num_rows: int, num_slots: int) -> None:
        self.num_slots = num_slots
        self.blocks = [reader.new_memory(num_rows, num_slots) for reader in readers]

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

    context: Context = None
    """What the blocks must know of the positions."""
    first: Tensor
    """The normed states of head 1, where it has read."""

    def __init__(self, starts: Int[Tensor, " row"], width: int, length: int, num_slots: int) -> None:
        self.length, self.num_slots = length, num_slots
        self.rows = torch.arange(len(starts), device=starts.device)
        self.positions = starts[:, None] + torch.arange(width, device=starts.device)
        self._slots: dict[int, Tensor] = {}
        self._shared: dict[object, Tensor] = {}
        self.is_causal = length == width
        """Every row begins at 0, so that attention is plainly causal."""

    def shared(self, name: object, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that every block needs, made once."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    def remember(self, new: Float[Tensor, "row position part_head head_dim"], memory: Memory) -> tuple[Tensor, Tensor]:
        """Put keys and values into their slots; those of all positions known so far, keys and values apart."""
        memory.flatten(0, 2).index_copy_(0, self._lines(new.shape[2]), new.reshape(-1, new.shape[3]))
        keys, values = memory[: len(new), :, : self.length].chunk(2, dim=1)
        return keys, values

    def _lines(self, num_heads: int) -> Int[Tensor, " row_position_head"]:
        """Which vectors of a block's memory are those of the tokens read, with `num_heads` for each slot."""
        if num_heads not in self._slots:
            lines = self.rows[:, None, None] * num_heads + torch.arange(num_heads, device=self.rows.device)
            self._slots[num_heads] = (lines * self.num_slots + self.positions[..., None]).flatten()
        return self._slots[num_heads]
