"""Adapters that turn decoders of the transformers library into the modules of a multi-token model."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from wmtp.models.architecture import Context, HeadKind, Modules, Positions
from wmtp.models.heads import ResidualHead
from wmtp.models.huggingface.decoder_block import DecoderBlock


class RotaryPositions(Positions):
    """Rotary position encoding. Every block receives cosines and sines, scaled as the model's config specifies."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, positions: Int[Tensor, "#batch position"], x: Float[Tensor, "*any dim"]) -> Context:
        """Return the cosines and sines of the rotation angles, in the dtype of the residual stream `x`."""
        return self.rotary(x, position_ids=positions)


class LearnedPositions(Positions):
    """Learned position vectors that are added to the token embeddings."""

    def __init__(self, vectors: nn.Embedding, dropout: nn.Module) -> None:
        super().__init__()
        self.vectors, self.dropout = vectors, dropout

    def embed(
        self, x: Float[Tensor, "batch position dim"], positions: Int[Tensor, "#batch position"]
    ) -> Float[Tensor, "batch position dim"]:
        """Return the token embeddings `x` plus the learned vector of each position, after dropout.

        Positions beyond the last learned vector use the last vector. Only draft tokens that are discarded have such
        positions.
        """
        clamped = positions.clamp(max=self.vectors.num_embeddings - 1)
        out: Tensor = self.dropout(x + self.vectors(clamped))
        return out

    def forward(self, positions: Int[Tensor, "#batch position"], x: Float[Tensor, "*any dim"]) -> Context:
        """Return None, because the blocks need no position-dependent input."""
        return None


@dataclass(frozen=True)
class DecoderAdapter:
    """The names of the modules of a causal language model, and the function that builds its position module.

    `body` is the name of the decoder in the causal language model. `layers` and `norm` are names of modules in the
    decoder. `attention` is the name of the attention module in a layer.
    """

    body: str
    layers: str
    norm: str
    attention: str
    build_positions: Callable[[nn.Module], Positions]


def _rotary(body: nn.Module) -> Positions:
    return RotaryPositions(body.get_submodule("rotary_emb"))


def _learned(body: nn.Module) -> Positions:
    vectors = body.get_submodule("wpe")
    assert isinstance(vectors, nn.Embedding)
    return LearnedPositions(vectors, body.get_submodule("drop"))


LLAMA_ADAPTER = DecoderAdapter("model", "layers", "norm", "self_attn", _rotary)
DECODER_ADAPTERS: dict[str, DecoderAdapter] = {
    "llama": LLAMA_ADAPTER,
    "mistral": LLAMA_ADAPTER,
    "qwen2": LLAMA_ADAPTER,
    "qwen3": LLAMA_ADAPTER,
    "gpt2": DecoderAdapter("transformer", "h", "ln_f", "attn", _learned),
}
"""The adapter of every supported architecture, by the `model_type` in the model's config."""


@dataclass(frozen=True)
class HuggingFaceArchitecture:
    """The architecture of a causal language model of transformers with additional prediction heads.

    The last block of the causal language model is head 1. There are `num_heads` − 1 additional heads.
    """

    config: PreTrainedConfig
    num_heads: int
    head_kind: HeadKind = "transformer"
    dtype: torch.dtype = torch.float32
    adapter: DecoderAdapter = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapter", DECODER_ADAPTERS[self.config.model_type])

    @property
    def settings(self) -> dict[str, Any]:
        """The number and kind of heads, the parameters' dtype, and the config values that affect forward passes."""
        from_config = {
            k: v for k, v in self.config.to_diff_dict().items() if k not in NON_FORWARD_KEYS and not k.startswith("_")
        }
        from_wmtp = {"num_heads": self.num_heads, "head_kind": self.head_kind, "dtype": str(self.dtype)}
        settings: dict[str, Any] = json.loads(
            json.dumps(from_wmtp | from_config | {"model_type": self.config.model_type})
        )
        return settings  # JSON turns integer keys into strings, as in a checkpoint

    @property
    def max_positions(self) -> int | None:
        """Number of learned position vectors, or None for rotary positions."""
        return int(self.config.max_position_embeddings) if self.config.model_type == "gpt2" else None

    @property
    def dim(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    def build_modules(self) -> Modules:
        """Build new modules, initialized as in transformers."""
        return split_model(self.build_causal_model(), self)

    def build_causal_model(self) -> PreTrainedModel:
        """Build a new causal language model of transformers, without additional heads."""
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            self.config, attn_implementation="sdpa", dtype=self.dtype
        )
        return model

    def build_positions(self) -> Positions:
        """Build only the position module. Rotary frequencies are computed from the config."""
        with torch.device("meta"):
            body = self.build_causal_model().get_submodule(self.adapter.body)
            on_meta = self.adapter.build_positions(body)
        if isinstance(on_meta, RotaryPositions):
            return RotaryPositions(type(on_meta.rotary)(config=self.config))
        return on_meta.to_empty(device=torch.get_default_device())


NON_FORWARD_KEYS = frozenset({
    "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "auto_map", "bos_token_id",
    "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "num_labels", "name_or_path",
    "output_attentions", "output_hidden_states", "return_dict",
})  # fmt: skip
"""Config keys that do not affect a forward pass."""


def split_model(model: PreTrainedModel, architecture: HuggingFaceArchitecture) -> Modules:
    """Split a causal language model of transformers into the modules of a multi-token model.

    "transformer" heads 2 … H start as copies of head 1. "medusa" heads start as residual layers that return the hidden
    state of head 1 unchanged.
    """
    adapter, config = architecture.adapter, architecture.config
    body = model.get_submodule(adapter.body)
    layers = body.get_submodule(adapter.layers)
    assert isinstance(layers, nn.ModuleList)
    embedding = model.get_input_embeddings()
    unembedding = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    assert isinstance(embedding, nn.Embedding) and isinstance(unembedding, nn.Linear)
    is_tied = unembedding.weight is embedding.weight or config.tie_word_embeddings
    blocks = [DecoderBlock(layer, adapter.attention, config) for layer in layers]
    num_extra = architecture.num_heads - 1
    heads: list[nn.Module] = [blocks[-1]]
    if architecture.head_kind == "medusa":
        heads += [ResidualHead(architecture.dim).to(architecture.dtype) for _ in range(num_extra)]
    else:
        heads += [copy.deepcopy(blocks[-1]) for _ in range(num_extra)]
    return Modules(
        embedding=embedding,
        positions=adapter.build_positions(body),
        trunk=blocks[:-1],
        heads=heads,
        norm=body.get_submodule(adapter.norm),
        unembedding=None if is_tied else unembedding,
    )
