"""Interfaces that an architecture implements for a multi-token model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

HeadKind = Literal["transformer", "medusa"]
"""The kind of heads 2 … H: blocks on the trunk's states, like head 1, or residual layers on head 1's state."""
Context = Any
"""Position-dependent input of a block, such as cosines and sines; its type depends on the architecture."""


class Positions(nn.Module):
    """Position encoding of a model: added to the embeddings, passed to every block, or both."""

    def embed(
        self, x: Float[Tensor, "batch position dim"], positions: Int[Tensor, "#batch position"]
    ) -> Float[Tensor, "batch position dim"]:
        """Return the token embeddings `x`, plus the position encoding if the architecture adds it there."""
        return x

    def forward(self, positions: Int[Tensor, "#batch position"], x: Float[Tensor, "*any dim"]) -> Context:
        """Return the context of the blocks for these positions, in the dtype of the residual stream `x`."""
        raise NotImplementedError


@dataclass
class Modules:
    """The top-level modules of a model; no two of them share parameters.

    A block is called with the residual stream and the context of its positions. If `unembedding` is None, the weights
    are tied: the matrix of the embedding is also the unembedding.
    """

    embedding: nn.Embedding
    positions: Positions
    trunk: Sequence[nn.Module]
    heads: Sequence[nn.Module]
    norm: nn.Module
    unembedding: nn.Linear | None


@runtime_checkable
class Architecture(Protocol):
    """The complete description of a model without its parameters."""

    @property
    def head_kind(self) -> HeadKind:
        """The kind of heads 2 … H."""

    @property
    def settings(self) -> dict[str, Any]:
        """Plain JSON values that, together with the parameters, determine the result of a forward pass."""

    @property
    def max_positions(self) -> int | None:
        """Maximum sequence length in tokens; None: no limit."""

    @property
    def dim(self) -> int:
        """Width of the residual stream."""

    def build_modules(self) -> Modules:
        """Build new modules on torch's current default device."""

    def build_positions(self) -> Positions:
        """Build only the position module, with real buffers, because checkpoints do not contain them."""
