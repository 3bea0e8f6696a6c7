"""The sizes of a model, as calculations of memory and time need them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from wmtp.models.architecture import HeadKind
from wmtp.models.mtp import MtpModel

BlockKind = Literal["wmtp", "llama", "qwen3", "gpt2"]
"""Whose code the blocks are: ours, or that of a family of transformers; `llama` stands for Mistral and Qwen2 too."""


@dataclass(frozen=True)
class Counts:
    """How many numbers a model has, how many are trained, and the bytes of both."""

    parameters: int
    trained: int
    parameter_bytes: int
    trained_bytes: int


@dataclass(frozen=True)
class Layout:
    """The sizes of a model. The default is Meta's 7B with four heads: 28 trunk blocks and one block for each head."""

    dim: int = 4096
    num_layers: int = 29
    num_heads: int = 4
    num_attention_heads: int = 32
    hidden_dim: int = 11008
    vocab_size: int = 32000
    num_kv_heads: int | None = None
    """None: as many as attention heads."""
    head_dim: int | None = None
    """None: `dim` shared by the attention heads."""
    kind: BlockKind = "wmtp"
    head_kind: HeadKind = "transformer"
    is_tied: bool = False
    """Whether the embedding serves as unembedding."""
    number_bytes: int = 4
    """Of a parameter, and so of the stream between blocks."""
    has_dropout: bool = False
    adapter_rank: int | None = None
    """Of the adapters beside which the trunk, the embedding and the unembedding are frozen."""
    value_dim: int | None = None
    """Width inside the value head, 0 for a linear one; None: there is none."""
    trains_values_only: bool = False
    counts: Counts | None = None
    """What was counted in a model; None: `parameters`, all of them trained."""

    @property
    def query_dim(self) -> int:
        """Width of all queries of a token."""
        return self.num_attention_heads * (self.head_dim or self.dim // self.num_attention_heads)

    @property
    def kv_dim(self) -> int:
        """Width of all keys of a token, and of all its values."""
        return self.query_dim * (self.num_kv_heads or self.num_attention_heads) // self.num_attention_heads

    @property
    def num_trunk_blocks(self) -> int:
        """Of the blocks that heads start from."""
        return self.num_layers - 1

    @property
    def num_head_blocks(self) -> int:
        """Of heads that are blocks."""
        return self.num_heads if self.head_kind == "transformer" else 1

    @property
    def num_blocks(self) -> int:
        """Of trunk and heads."""
        return self.num_trunk_blocks + self.num_head_blocks

    @property
    def block_matrices(self) -> int:
        """Numbers of the matrices of a block: four of attention, two or three of the feed-forward layer."""
        attention = 2 * self.dim * (self.query_dim + self.kv_dim)
        return attention + (2 if self.kind == "gpt2" else 3) * self.dim * self.hidden_dim

    @property
    def block_parameters(self) -> int:
        """Matrices, norms, and GPT-2's biases."""
        others = 2 * self.dim
        if self.kind == "gpt2":
            others += 2 * self.dim + 5 * self.dim + self.hidden_dim
        if self.kind == "qwen3":
            others += 2 * self.query_dim // self.num_attention_heads
        return self.block_matrices + others

    @property
    def residual_parameters(self) -> int:
        """Of heads that are residual layers."""
        return (self.num_heads - self.num_head_blocks) * self.dim**2

    @property
    def vocabulary_parameters(self) -> int:
        """Of the embedding, and of the unembedding."""
        return self.vocab_size * self.dim

    @property
    def num_vocabulary_matrices(self) -> int:
        """One where the embedding serves as unembedding."""
        return 1 if self.is_tied else 2

    @property
    def parameters(self) -> int:
        """All but learned positions, adapters and a value head; a linear one would add dim + 1 and a norm."""
        blocks = self.num_blocks * self.block_parameters + self.residual_parameters
        norm = (2 if self.kind == "gpt2" else 1) * self.dim
        return blocks + self.num_vocabulary_matrices * self.vocabulary_parameters + norm

    @property
    def counted(self) -> Counts:
        """What was counted, or follows from the sizes."""
        size = self.parameters * self.number_bytes
        return self.counts or Counts(self.parameters, self.parameters, size, size)


def count(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """How many numbers these are, in all processes together, and their bytes."""
    listed = list(parameters)
    return sum(p.numel() for p in listed), sum(p.numel() * p.dtype.itemsize for p in listed)


def layout_of(model: MtpModel) -> Layout:
    """The sizes of a model, and what of it is trained; it may lie on the meta device."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    (everything, all_bytes), (some, some_bytes) = count(model.parameters()), count(trained.values())
    return Layout(
        **_sizes(model.architecture),
        num_heads=model.num_heads,
        head_kind=model.architecture.head_kind,
        is_tied=model.unembedding is None,
        number_bytes=model.embedding.weight.dtype.itemsize,
        adapter_rank=None if model.lora is None else model.lora.rank,
        value_dim=None if model.value_head is None else model.value_head_dim or 0,
        trains_values_only=all(name.startswith("value_head.") for name in trained),
        counts=Counts(everything, some, all_bytes, some_bytes),
    )


def _sizes(architecture: Any) -> dict[str, Any]:
    """What our architecture says of its blocks, or the config of one of transformers."""
    own = ("dim", "num_layers", "num_attention_heads", "hidden_dim", "vocab_size", "num_kv_heads")
    config = getattr(architecture, "config", None)
    if config is None:
        return {name: getattr(architecture, name) for name in own} | {"has_dropout": architecture.dropout > 0}
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    theirs = (
        config.hidden_size, config.num_hidden_layers, config.num_attention_heads, inner or 4 * config.hidden_size,
        config.vocab_size, getattr(config, "num_key_value_heads", None),
    )  # fmt: skip
    kind = config.model_type if config.model_type in ("qwen3", "gpt2") else "llama"
    drops = ("attention_dropout", "attn_pdrop", "resid_pdrop")
    return dict(zip(own, theirs, strict=True)) | {
        "kind": kind,
        "head_dim": getattr(config, "head_dim", None),
        "has_dropout": any(getattr(config, name, 0) for name in drops),
    }
