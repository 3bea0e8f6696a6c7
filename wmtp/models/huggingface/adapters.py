"""Where the supported families of decoders keep their parts, and how those become parts of a multi-token model."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from wmtp.models.architecture import Context, HeadKind, Parts, Positions
from wmtp.models.heads import ResidualHead


class RotaryPositions(Positions):
    """Told to every block as cosines and sines, scaled as the model's config says."""

    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, positions: Int[Tensor, "#batch position"], x: Float[Tensor, "*any dim"]) -> Context:
        """Cosines and sines, of the stream's type."""
        return self.rotary(x, position_ids=positions)


class LearnedPositions(Positions):
    """Vectors that are added to the embeddings."""

    def __init__(self, vectors: nn.Embedding, dropout: nn.Module) -> None:
        super().__init__()
        self.vectors, self.dropout = vectors, dropout

    def embed(
        self, x: Float[Tensor, "batch position dim"], positions: Int[Tensor, "#batch position"]
    ) -> Float[Tensor, "batch position dim"]:
        """Add each position's vector. Drafts behind the last position are never used; they get that one's."""
        known = positions.clamp(max=self.vectors.num_embeddings - 1)
        out: Tensor = self.dropout(x + self.vectors(known))
        return out

    def forward(self, positions: Int[Tensor, "#batch position"], x: Float[Tensor, "*any dim"]) -> Context:
        """Nothing."""
        return None


@dataclass(frozen=True)
class Family:
    """The names of a decoder's parts below its causal language model, and how it knows positions."""

    body: str
    layers: str
    norm: str
    attention: str
    positions: Callable[[nn.Module], Positions]


def _rotary(body: nn.Module) -> Positions:
    return RotaryPositions(body.get_submodule("rotary_emb"))


def _learned(body: nn.Module) -> Positions:
    vectors = body.get_submodule("wpe")
    assert isinstance(vectors, nn.Embedding)
    return LearnedPositions(vectors, body.get_submodule("drop"))


LLAMA_LIKE = Family("model", "layers", "norm", "self_attn", _rotary)
FAMILIES: dict[str, Family] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gpt2": Family("transformer", "h", "ln_f", "attn", _learned),
}
"""By the `model_type` of their config."""


class DecoderBlock(nn.Module):
    """A decoder layer of transformers as a block."""

    def __init__(self, layer: nn.Module, attention: str, config: PreTrainedConfig) -> None:
        super().__init__()
        self.layer = layer
        attending: Any = layer.get_submodule(attention)
        self.head_dim: int = attending.head_dim
        self.num_kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.window = window_of(config, attending.layer_idx)

    def forward(self, x: Float[Tensor, "batch position dim"], context: Context) -> Float[Tensor, "batch position dim"]:
        """Attend to this and earlier positions, as far as the window reaches; padding is on the right."""
        mask = None
        if self.window is not None and x.shape[1] > self.window:
            positions = torch.arange(x.shape[1], device=x.device)
            mask = within_window(positions[None], x.shape[1], self.window)
        return self.read(x, context, mask, None)

    def read(
        self,
        x: Float[Tensor, "batch position dim"],
        context: Context,
        mask: Bool[Tensor, "#batch 1 position slot"] | None,
        memory: object | None,
    ) -> Float[Tensor, "batch position dim"]:
        """Attend where the `mask` allows it, None: causally. `memory.update` is given new keys and values."""
        out: Tensor = self.layer(
            x, attention_mask=mask, position_embeddings=context, past_key_values=memory, use_cache=memory is not None
        )
        return out


def within_window(
    positions: Int[Tensor, "batch query"], length: int, window: int | None
) -> Bool[Tensor, "batch 1 query slot"]:
    """What queries at these positions may see of the slots 0 … `length` − 1."""
    distance = positions[:, None, :, None] - torch.arange(length, device=positions.device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def window_of(config: PreTrainedConfig, layer: int) -> int | None:
    """How many positions back a layer sees; None: all."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window


@dataclass(frozen=True)
class HuggingFaceArchitecture:
    """A causal language model whose last block is head 1, with H − 1 further heads."""

    config: PreTrainedConfig
    num_heads: int
    head_kind: HeadKind = "transformer"
    dtype: torch.dtype = torch.float32
    family: Family = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "family", FAMILIES[self.config.model_type])

    @property
    def settings(self) -> dict[str, Any]:
        """The heads, the type of the parameters, and what the config says of the forward."""
        said = {k: v for k, v in self.config.to_diff_dict().items() if k not in DESCRIPTIVE and not k.startswith("_")}
        own = {"num_heads": self.num_heads, "head_kind": self.head_kind, "dtype": str(self.dtype)}
        plain: dict[str, Any] = json.loads(json.dumps(own | said | {"model_type": self.config.model_type}))
        return plain  # keys that are numbers would not be the same in a checkpoint

    @property
    def max_positions(self) -> int | None:
        """Of models with learned positions."""
        return int(self.config.max_position_embeddings) if self.config.model_type == "gpt2" else None

    @property
    def dim(self) -> int:
        """The width of the stream."""
        return int(self.config.hidden_size)

    def parts(self) -> Parts:
        """New modules, initialised as transformers does."""
        return split(self.causal_model(), self)

    def causal_model(self) -> PreTrainedModel:
        """A new one-head model as transformers knows it."""
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            self.config, attn_implementation="sdpa", dtype=self.dtype
        )
        return model

    def positions(self) -> Positions:
        """The module for positions, whose frequencies are computed from the config."""
        with torch.device("meta"):
            found = self.family.positions(self.causal_model().get_submodule(self.family.body))
        if isinstance(found, RotaryPositions):
            return RotaryPositions(type(found.rotary)(config=self.config))
        return found.to_empty(device=torch.get_default_device())


DESCRIPTIVE = frozenset({
    "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache", "auto_map", "bos_token_id",
    "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "num_labels", "name_or_path",
    "output_attentions", "output_hidden_states", "return_dict",
})  # fmt: skip
"""Keys of a config that change nothing of a forward."""


def split(model: PreTrainedModel, architecture: HuggingFaceArchitecture) -> Parts:
    """The modules of a causal language model as parts; heads 2 … H begin as copies of head 1, or as it."""
    family, config = architecture.family, architecture.config
    body = model.get_submodule(family.body)
    layers = body.get_submodule(family.layers)
    assert isinstance(layers, nn.ModuleList)
    embedding = model.get_input_embeddings()
    unembedding = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    assert isinstance(embedding, nn.Embedding) and isinstance(unembedding, nn.Linear)
    is_tied = unembedding.weight is embedding.weight or config.tie_word_embeddings
    blocks = [DecoderBlock(layer, family.attention, config) for layer in layers]
    more = architecture.num_heads - 1
    heads: list[nn.Module] = [blocks[-1]]
    if architecture.head_kind == "medusa":
        heads += [ResidualHead(architecture.dim).to(architecture.dtype) for _ in range(more)]
    else:
        heads += [copy.deepcopy(blocks[-1]) for _ in range(more)]
    return Parts(
        embedding=embedding,
        positions=family.positions(body),
        trunk=blocks[:-1],
        heads=heads,
        norm=body.get_submodule(family.norm),
        unembedding=None if is_tied else unembedding,
    )
