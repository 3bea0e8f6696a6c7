"""The sizes of a model, from which its memory and time are estimated."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from wmtp.models.architecture import HeadKind
from wmtp.models.mtp import MtpModel
from wmtp.models.value_heads import ValueKind

BlockKind = Literal["wmtp", "llama", "qwen3", "gpt2"]
"""The implementation of the blocks.

"wmtp" is the implementation of this package. The other values are model types of transformers. "llama" also stands
for Mistral and Qwen2.
"""


@dataclass(frozen=True)
class Counts:
    """The numbers and sizes in bytes of all parameters of a model and of its trained parameters."""

    parameters: int
    trained: int
    parameter_bytes: int
    trained_bytes: int


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a model.

    The default values describe Meta's 7B model with four heads, which has 28 trunk blocks and one block per head.
    """

    dim: int = 4096
    num_layers: int = 29
    num_heads: int = 4
    num_attention_heads: int = 32
    hidden_dim: int = 11008
    vocab_size: int = 32000
    num_kv_heads: int | None = None
    """Number of key-value heads in an attention layer. None means the number of attention heads."""
    head_dim: int | None = None
    """Width of an attention head. None means `dim` divided by the number of attention heads."""
    kind: BlockKind = "wmtp"
    head_kind: HeadKind = "transformer"
    is_tied: bool = False
    """Whether the embedding and the unembedding share one matrix."""
    number_bytes: int = 4
    """Size in bytes of a parameter, which is also the size of an element of the residual stream."""
    has_dropout: bool = False
    adapter_rank: int | None = None
    """Rank of the LoRA adapters, or None if the model has no adapters.

    If it has adapters, its trunk, embedding and unembedding are frozen.
    """
    value_dim: int | None = None
    """Hidden width of the value head. 0 means a linear value head, and None means no value head."""
    value_kind: ValueKind = "state"
    trains_values_only: bool = False
    counts: Counts | None = None
    """Parameter counts of an existing model. If None, all parameters are assumed to be trained."""

    @property
    def query_dim(self) -> int:
        """Total width of the queries of a token, summed over all attention heads."""
        return self.num_attention_heads * (self.head_dim or self.dim // self.num_attention_heads)

    @property
    def kv_dim(self) -> int:
        """Total width of the keys of a token, which is also the total width of its values."""
        return self.query_dim * (self.num_kv_heads or self.num_attention_heads) // self.num_attention_heads

    @property
    def num_trunk_blocks(self) -> int:
        """Number of blocks of the trunk."""
        return self.num_layers - 1

    @property
    def num_head_blocks(self) -> int:
        """Number of heads that are transformer blocks."""
        return self.num_heads if self.head_kind == "transformer" else 1

    @property
    def num_blocks(self) -> int:
        """Total number of blocks in the trunk and in the heads."""
        return self.num_trunk_blocks + self.num_head_blocks

    @property
    def block_matrices(self) -> int:
        """Number of parameters in the matrices of a block.

        A block has four matrices in the attention layer, and two (GPT-2) or three matrices in the feed-forward layer.
        """
        attention = 2 * self.dim * (self.query_dim + self.kv_dim)
        return attention + (2 if self.kind == "gpt2" else 3) * self.dim * self.hidden_dim

    @property
    def block_parameters(self) -> int:
        """Number of parameters of a block, including its norms and, in GPT-2, its biases."""
        others = 2 * self.dim
        if self.kind == "gpt2":
            others += 2 * self.dim + 5 * self.dim + self.hidden_dim
        if self.kind == "qwen3":
            others += 2 * self.query_dim // self.num_attention_heads
        return self.block_matrices + others

    @property
    def residual_parameters(self) -> int:
        """Number of parameters of all heads that are residual layers."""
        return (self.num_heads - self.num_head_blocks) * self.dim**2

    @property
    def vocabulary_parameters(self) -> int:
        """Number of parameters of the embedding. The unembedding has the same number."""
        return self.vocab_size * self.dim

    @property
    def num_vocabulary_matrices(self) -> int:
        """Number of vocabulary matrices. It is 1 if the embedding and the unembedding share one matrix, otherwise 2."""
        return 1 if self.is_tied else 2

    @property
    def parameters(self) -> int:
        """Number of parameters, excluding learned positions, adapters and the value head."""
        blocks = self.num_blocks * self.block_parameters + self.residual_parameters
        norm = (2 if self.kind == "gpt2" else 1) * self.dim
        return blocks + self.num_vocabulary_matrices * self.vocabulary_parameters + norm

    @property
    def counted(self) -> Counts:
        """The parameter counts. They are `counts` if it is set, otherwise they are computed from the sizes."""
        size = self.parameters * self.number_bytes
        return self.counts or Counts(self.parameters, self.parameters, size, size)


def count_parameters(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Return the total number of elements of the given parameters, and their total size in bytes.

    A sharded parameter is counted with its complete size.
    """
    listed = list(parameters)
    return sum(p.numel() for p in listed), sum(p.numel() * p.dtype.itemsize for p in listed)


def model_shape(model: MtpModel) -> ModelShape:
    """Return the sizes and the parameter counts of a model, which may be on the meta device."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    (total, total_bytes), (trainable, trained_bytes) = (
        count_parameters(model.parameters()),
        count_parameters(trained.values()),
    )
    return ModelShape(
        **_sizes(model.architecture),
        num_heads=model.num_heads,
        head_kind=model.architecture.head_kind,
        is_tied=model.unembedding is None,
        number_bytes=model.embedding.weight.dtype.itemsize,
        adapter_rank=None if model.lora is None else model.lora.rank,
        value_dim=None if model.value_head is None else model.value_head_dim or 0,
        value_kind=model.value_kind,
        trains_values_only=all(name.startswith("value_head.") for name in trained),
        counts=Counts(total, trainable, total_bytes, trained_bytes),
    )


def _sizes(architecture: Any) -> dict[str, Any]:
    """Return the sizes of an architecture of wmtp or of transformers. The keys are fields of `ModelShape`."""
    names = ("dim", "num_layers", "num_attention_heads", "hidden_dim", "vocab_size", "num_kv_heads")
    config = getattr(architecture, "config", None)
    if config is None:
        return {name: getattr(architecture, name) for name in names} | {"has_dropout": architecture.dropout > 0}
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    values = (
        config.hidden_size, config.num_hidden_layers, config.num_attention_heads, inner or 4 * config.hidden_size,
        config.vocab_size, getattr(config, "num_key_value_heads", None),
    )  # fmt: skip
    kind = config.model_type if config.model_type in ("qwen3", "gpt2") else "llama"
    dropout_keys = ("attention_dropout", "attn_pdrop", "resid_pdrop")
    return dict(zip(names, values, strict=True)) | {
        "kind": kind,
        "head_dim": getattr(config, "head_dim", None),
        "has_dropout": any(getattr(config, name, 0) for name in dropout_keys),
    }
