"""Interfaces between a multi-token model and the architecture of its blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

HeadKind = Literal["transformer", "medusa"]
"""The kind of heads 2 … H: blocks on the trunk's states, like head 1, or residual layers on head 1's state."""
Context = Any
"""Position-dependent input of every block, such as cosines and sines; the type depends on the architecture."""


class Positions(nn.Module):
    """Position encoding of a model: added to the embeddings, passed to every block, or both."""

    def embed(
        self, x: Float[Tensor, "batch position dim"], positions: Int[Tensor, "#batch position"]
    ) -> Float[Tensor, "batch position dim"]:
        """Return the token embeddings, with the position encoding added where the architecture does so."""
        return x

    def forward(self, positions: Int[Tensor, "#batch position"], x: Float[Tensor, "*any dim"]) -> Context:
        """Return the context that blocks receive for these positions, in the dtype of the residual stream `x`."""
        raise NotImplementedError


@dataclass
class Modules:
    """The top-level modules of a model; no two of them share parameters.

    A block is called with the residual stream and the context of its positions. If `unembedding` is None, the
    embedding is used for it too (tied weights).
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
        """Plain values that, together with the parameters, determine the result of a forward pass."""

    @property
    def max_positions(self) -> int | None:
        """Maximum sequence length in tokens; None: no limit."""

    @property
    def dim(self) -> int:
        """Width of the residual stream."""

    def build_modules(self) -> Modules:
        """Build new modules on torch's current default device."""

    def build_positions(self) -> Positions:
        """Build only the position module, never on the meta device: it may hold buffers that no checkpoint contains."""
