"""A Llama-style model in the layout of Meta's multi-token models, with new parameters."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn

from wmtp.data.tokenizer import Tokenizer
from wmtp.field_types import Positive, PositiveFloat
from wmtp.models.architecture import HeadKind, Parts, Positions
from wmtp.models.mtp import MtpModel
from wmtp.models.source import ModelSource, Problem
from wmtp.models.transformer import Block, Rotation, rotation


class Rotary(Positions):
    """Positions that every block's attention turns queries and keys by."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, positions: Int[Tensor, "#batch position"], x: Float[Tensor, "*any dim"]) -> Rotation:
        """Cosines and sines."""
        return rotation(positions, self.head_dim, self.theta)


@dataclass(frozen=True, kw_only=True)
class LlamaArchitecture:
    """RMSNorm, SwiGLU, rotary positions, grouped-query attention.

    `num_layers` is the depth of the one-head model: `num_layers − 1` trunk blocks and one head; every further head
    adds one block. `num_heads` is H, not the heads of the attention.
    """

    vocab_size: int
    dim: int
    num_layers: int
    num_heads: int
    num_attention_heads: int
    num_kv_heads: int
    hidden_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    dropout: float = 0.0
    dtype: Literal["fp32", "bf16"] = "fp32"
    head_kind: HeadKind = "transformer"

    @property
    def max_positions(self) -> None:
        """Positions are relative."""

    @property
    def settings(self) -> dict[str, Any]:
        """All of them."""
        return asdict(self)

    def parts(self) -> Parts:
        """New modules, initialised as torch does."""

        def block() -> Block:
            return Block(
                self.dim, self.num_attention_heads, self.num_kv_heads, self.hidden_dim, self.norm_eps, self.dropout
            )

        dtype = torch.bfloat16 if self.dtype == "bf16" else torch.float32
        return Parts(
            embedding=nn.Embedding(self.vocab_size, self.dim).to(dtype),
            positions=self.positions(),
            trunk=[block().to(dtype) for _ in range(self.num_layers - 1)],
            heads=[block().to(dtype) for _ in range(self.num_heads)],
            norm=nn.RMSNorm(self.dim, eps=self.norm_eps).to(dtype),
            unembedding=nn.Linear(self.dim, self.vocab_size, bias=False).to(dtype),
        )

    def positions(self) -> Rotary:
        """The rotation."""
        return Rotary(self.dim // self.num_attention_heads, self.rope_theta)


class Llama(ModelSource):
    """A new model: its parameters are drawn."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        dim: Positive,
        num_layers: Positive,
        num_heads: Positive,
        num_attention_heads: Positive,
        num_kv_heads: Positive,
        hidden_dim: Positive,
        rope_theta: PositiveFloat = 10_000.0,
        norm_eps: PositiveFloat = 1e-5,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        value_head_dim: Positive | None = None,
    ) -> None:
        """The sizes are those of `LlamaArchitecture`; the vocabulary is the tokenizer's."""
        self.tokenizer, self.value_head_dim = tokenizer, value_head_dim
        self._sizes = {
            "dim": dim, "num_layers": num_layers, "num_heads": num_heads, "num_attention_heads": num_attention_heads,
            "num_kv_heads": num_kv_heads, "hidden_dim": hidden_dim, "rope_theta": rope_theta, "norm_eps": norm_eps,
            "dropout": dropout,
        }  # fmt: skip

    @property
    def num_heads(self) -> int:
        """As it was asked for."""
        return int(self._sizes["num_heads"])

    def architecture(self) -> LlamaArchitecture:
        """Of these sizes."""
        assert self.tokenizer is not None
        return LlamaArchitecture(vocab_size=self.tokenizer.vocab_size, **self._sizes)  # type: ignore[arg-type]

    def problems(self) -> Iterator[Problem]:
        """Widths that do not divide."""
        dim, heads, kv_heads = (int(self._sizes[key]) for key in ("dim", "num_attention_heads", "num_kv_heads"))
        if dim % (2 * heads):
            yield "dim", str(dim), f"must be a multiple of 2 · model.num_attention_heads = {2 * heads}"
        if heads % kv_heads:
            yield "num_kv_heads", str(kv_heads), f"must divide model.num_attention_heads = {heads}"

    def begin(self) -> MtpModel:
        """Draw all parameters."""
        return drawn(self.architecture(), self.value_head_dim)


def drawn(architecture: LlamaArchitecture, value_head_dim: int | None = None) -> MtpModel:
    """A model whose parameters torch's generator draws.

    Deviation 1 for embeddings, 1/√inputs for matrices, 1/√(2·depth) of that where they write to the stream.

    A fixed small deviation (0.02) suits wide models only: in narrow ones attention then learns to
    copy names and numbers far later.
    """
    model = MtpModel(architecture, value_head_dim=value_head_dim)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = 1.0 if parameter is model.embedding.weight else parameter.shape[1] ** -0.5
            writes = "output" in name
            nn.init.normal_(parameter, std=std / math.sqrt(2 * architecture.num_layers) if writes else std)
    return model
