"""Llama-style models with random initial parameters. Their architecture is that of Meta's multi-token models."""

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
from wmtp.models.architecture import HeadKind, Modules, Positions
from wmtp.models.mtp import MtpModel
from wmtp.models.source import ModelIssue, ModelSource
from wmtp.models.transformer import Block, RotaryTable, rotary_table


class Rotary(Positions):
    """Rotary position encoding, applied to queries and keys in every attention layer."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.theta = head_dim, theta

    def forward(self, positions: Int[Tensor, "#batch position"], x: Float[Tensor, "*any dim"]) -> RotaryTable:
        """Return the cosines and sines of the rotation angles at the given positions."""
        return rotary_table(positions, self.head_dim, self.theta)


@dataclass(frozen=True, kw_only=True)
class LlamaArchitecture:
    """A Llama-style architecture with RMSNorm, SwiGLU, rotary positions and grouped-query attention.

    `num_layers` is the number of blocks of a model with one prediction head: `num_layers − 1` trunk blocks and head 1.
    Every additional head adds one block. `num_heads` is H, the number of prediction heads. `num_attention_heads` is the
    number of attention heads in a block.
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
        """None, because rotary positions do not limit the sequence length."""

    @property
    def settings(self) -> dict[str, Any]:
        """The values of all fields, by field name."""
        return asdict(self)

    def build_modules(self) -> Modules:
        """Build new modules with torch's default initialization."""

        def _block() -> Block:
            """Create one block."""
            return Block(
                self.dim, self.num_attention_heads, self.num_kv_heads, self.hidden_dim, self.norm_eps, self.dropout
            )

        dtype = torch.bfloat16 if self.dtype == "bf16" else torch.float32
        return Modules(
            embedding=nn.Embedding(self.vocab_size, self.dim).to(dtype),
            positions=self.build_positions(),
            trunk=[_block().to(dtype) for _ in range(self.num_layers - 1)],
            heads=[_block().to(dtype) for _ in range(self.num_heads)],
            norm=nn.RMSNorm(self.dim, eps=self.norm_eps).to(dtype),
            unembedding=nn.Linear(self.dim, self.vocab_size, bias=False).to(dtype),
        )

    def build_positions(self) -> Rotary:
        """Build the rotary position module."""
        return Rotary(self.dim // self.num_attention_heads, self.rope_theta)


class Llama(ModelSource):
    """The source of a new Llama-style model with random parameters."""

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
        """Create the source. Most arguments are fields of `LlamaArchitecture`.

        The vocabulary size is the number of tokens of `tokenizer`. `value_head_dim` is the hidden width of a value
        head, or None for a linear value head.
        """
        self.tokenizer, self.value_head_dim = tokenizer, value_head_dim
        self._sizes = {
            "dim": dim, "num_layers": num_layers, "num_heads": num_heads, "num_attention_heads": num_attention_heads,
            "num_kv_heads": num_kv_heads, "hidden_dim": hidden_dim, "rope_theta": rope_theta, "norm_eps": norm_eps,
            "dropout": dropout,
        }  # fmt: skip

    @property
    def num_heads(self) -> int:
        """H, the configured number of prediction heads."""
        return int(self._sizes["num_heads"])

    def architecture(self) -> LlamaArchitecture:
        """Return the architecture with the configured sizes and the vocabulary size of the tokenizer."""
        assert self.tokenizer is not None
        return LlamaArchitecture(vocab_size=self.tokenizer.vocab_size, **self._sizes)  # type: ignore[arg-type]

    def issues(self) -> Iterator[ModelIssue]:
        """Yield an issue for each configured size that violates a divisibility requirement."""
        dim, heads, kv_heads = (int(self._sizes[key]) for key in ("dim", "num_attention_heads", "num_kv_heads"))
        if dim % (2 * heads):
            yield "dim", str(dim), f"must be a multiple of 2 · model.num_attention_heads = {2 * heads}"
        if heads % kv_heads:
            yield "num_kv_heads", str(kv_heads), f"must divide model.num_attention_heads = {heads}"

    def load_base(self) -> MtpModel:
        """Create the model with random parameters."""
        return create_llama(self.architecture(), self.value_head_dim)


def create_llama(architecture: LlamaArchitecture, value_head_dim: int | None = None) -> MtpModel:
    """Create a model whose random parameters are drawn from torch's global generator.

    The standard deviation is 1 for embeddings and 1/√(number of inputs) for matrices. For matrices whose result is
    added to the residual stream, it is multiplied by 1/√(2 · `num_layers`). A fixed standard deviation of 0.02 is
    suitable only for wide models. With 0.02, attention in narrow models learns to copy names and numbers much later.
    """
    model = MtpModel(architecture, value_head_dim=value_head_dim)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = 1.0 if parameter is model.embedding.weight else parameter.shape[1] ** -0.5
            is_residual_output = "output" in name
            nn.init.normal_(parameter, std=std / math.sqrt(2 * architecture.num_layers) if is_residual_output else std)
    return model
