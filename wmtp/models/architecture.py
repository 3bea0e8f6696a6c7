"""What a multi-token model is made of, whatever its blocks are."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

HeadKind = Literal["transformer", "medusa"]
"""What heads 2 … H are: blocks beside head 1 on the trunk's states, or residual layers on head 1's state."""
Context = Any
"""What the blocks of one architecture must know of the positions that they read."""


class Positions(nn.Module):
    """How positions come into a model: added to the embeddings, told to every block, or both."""

    def embed(
        self, x: Float[Tensor, "batch position dim"], positions: Int[Tensor, "#batch position"]
    ) -> Float[Tensor, "batch position dim"]:
        """The embedded tokens with what depends on their positions."""
        return x

    def forward(self, positions: Int[Tensor, "#batch position"], x: Float[Tensor, "*any dim"]) -> Context:
        """What the blocks are told of these positions, for a stream of the type of `x`."""
        raise NotImplementedError


@dataclass
class Parts:
    """The modules of a model, each of which holds parameters of its own.

    A block is called with the stream and the context of its positions. Without an `unembedding` the embedding
    serves as one.
    """

    embedding: nn.Embedding
    positions: Positions
    trunk: Sequence[nn.Module]
    heads: Sequence[nn.Module]
    norm: nn.Module
    unembedding: nn.Linear | None


@runtime_checkable
class Architecture(Protocol):
    """All of a model but its parameters."""

    @property
    def head_kind(self) -> HeadKind:
        """What heads 2 … H are."""

    @property
    def settings(self) -> dict[str, Any]:
        """Plain values that, with the parameters, decide what a forward gives."""

    @property
    def max_positions(self) -> int | None:
        """The longest text that can be read at all; None: there is no limit."""

    @property
    def dim(self) -> int:
        """The width of the stream."""

    def parts(self) -> Parts:
        """New modules, on torch's current default device."""

    def positions(self) -> Positions:
        """The module for positions alone, never on the meta device: it may hold numbers that no checkpoint has."""
