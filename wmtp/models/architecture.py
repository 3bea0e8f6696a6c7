"""Interfaces that an architecture implements for a multi-token model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

HeadKind = Literal["transformer", "medusa"]
"""The kind of the prediction heads 2 … H.

"transformer" heads are blocks that are applied to the trunk's hidden states, like head 1. "medusa" heads are residual
layers that are applied to the hidden state of head 1.
"""
Context = Any
"""The position-dependent input of a block, such as cosines and sines. Its type depends on the architecture."""


class Positions(nn.Module):
    """The position encoding of a model. It is added to the embeddings, passed to every block, or both."""

    def embed(
        self, x: Float[Tensor, "batch position dim"], positions: Int[Tensor, "#batch position"]
    ) -> Float[Tensor, "batch position dim"]:
        """Return the token embeddings `x`, plus the position encoding if the architecture adds it to the embeddings."""
        return x

    def forward(self, positions: Int[Tensor, "#batch position"], x: Float[Tensor, "*any dim"]) -> Context:
        """Return the position-dependent input of the blocks, in the dtype of the residual stream `x`."""
        raise NotImplementedError


@dataclass
class Modules:
    """The top-level modules of a model. No two of them share parameters.

    A block is called with the residual stream and with the position-dependent input (`Context`). If `unembedding` is
    None, the matrix of the embedding is also used as the unembedding.
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
        """The kind of the prediction heads 2 … H."""

    @property
    def settings(self) -> dict[str, Any]:
        """The JSON values that, together with the parameters, determine the result of a forward pass."""

    @property
    def max_positions(self) -> int | None:
        """Maximum sequence length in tokens, or None if there is no limit."""

    @property
    def dim(self) -> int:
        """Width of the residual stream."""

    def build_modules(self) -> Modules:
        """Build new modules on the default device of torch."""

    def build_positions(self) -> Positions:
        """Build only the position module. Its buffers are filled, because checkpoints do not contain them."""
