"""A causal language model of transformers as the trunk and first head of a multi-token model."""

import logging
from collections.abc import Iterator
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from wmtp.annotations import ExistingPath, Positive
from wmtp.data.tokenization import Tokenizer, kept_tokenizer
from wmtp.errors import InputError
from wmtp.models.architecture import HeadKind
from wmtp.models.huggingface.families import FAMILIES, HuggingFaceArchitecture, split
from wmtp.models.huggingface.folder import one_line, read_config
from wmtp.models.lora import Lora
from wmtp.models.mtp import MtpModel
from wmtp.models.source import ModelSource, Problem

log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_HEADS, HEAD_KIND = "mtp_num_heads", "mtp_head_kind"
"""Keys of the config of an export that keeps all heads."""
EXTRA = "extra_heads."
"""Begins the names of the tensors of heads 2 … H in such an export."""


class Pretrained(ModelSource):
    """A model that `save_pretrained` wrote: its last block is head 1, which further heads begin as copies of.

    Where the folder is an export of ours with all heads, these are taken.
    """

    is_pretrained = True

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        path: ExistingPath,
        num_heads: Positive = 4,
        create_heads: bool = True,
        head_kind: HeadKind = "transformer",
        dtype: Literal["fp32", "bf16"] = "fp32",
        lora: Lora,
        value_head_dim: Positive | None = None,
    ) -> None:
        """`dtype` is that of the parameters, whatever they are stored in.

        With `create_heads` the model gets heads that its folder lacks; without, it has as many as are there.
        """
        self.tokenizer, self.path, self.value_head_dim = tokenizer, path, value_head_dim
        self.lora = lora if lora.rank is not None else None
        self.wanted_heads, self.create_heads = num_heads, create_heads
        self.head_kind, self.dtype = head_kind, DTYPES[dtype]
        self._config: PreTrainedConfig | None = None

    @property
    def config(self) -> PreTrainedConfig:
        """What the folder says of the model.

        Raises:
            InputError: it says nothing usable, or the model is of a family that is not supported.
        """
        if self._config is None:
            config = read_config("model.path", self.path, weights=False)
            if config.model_type not in FAMILIES:
                known = ", ".join(sorted(FAMILIES))
                raise InputError(f"model.path={self.path}: is of the family {config.model_type}; supported are {known}")
            self._config = config
        return self._config

    @property
    def stored_heads(self) -> int:
        """How many heads the folder has, of the kind that is asked for."""
        if getattr(self.config, HEAD_KIND, self.head_kind) != self.head_kind:
            return 1
        return int(getattr(self.config, NUM_HEADS, 1))

    @property
    def num_heads(self) -> int:
        """As it was asked for, or as many as there are."""
        return self.wanted_heads if self.create_heads else min(self.wanted_heads, self.stored_heads)

    @property
    def max_positions(self) -> int | None:
        """Of models with learned positions."""
        return int(self.config.max_position_embeddings) if self.config.model_type == "gpt2" else None

    def architecture(self) -> HuggingFaceArchitecture:
        """As the folder's config says."""
        return HuggingFaceArchitecture(self.config, self.num_heads, self.head_kind, self.dtype)

    def problems(self) -> Iterator[Problem]:
        """A folder that holds no such model."""
        try:
            config = read_config("model.path", self.path, weights=True)
            if config.model_type in FAMILIES and config.num_hidden_layers < 2:
                yield "path", str(self.path), "has one block; a trunk and a head need two"
            if self.lora is not None:
                with torch.device("meta"):
                    trunk = nn.ModuleList(self.architecture().parts().trunk)
                self.lora.require_targets(trunk)
            self.stored_heads  # noqa: B018 - raises where the family is not supported
        except InputError as error:
            key, _, problem = str(error).partition(": ")
            name, _, value = key.removeprefix("model.").partition("=")
            yield name, value, problem

    def files(self) -> dict[str, bytes]:
        """Config and tokenizer."""
        there = [self.path / name for name in ("config.json", "generation_config.json")]
        kept = {path.name: path.read_bytes() for path in there if path.is_file()}
        return kept | kept_tokenizer(self.path, self.tokenizer)

    def begin(self) -> MtpModel:
        """Load the folder's weights; heads that it lacks begin as copies of head 1, or as residual layers of 0."""
        read_config("model.path", self.path)
        if self.num_heads < self.wanted_heads:
            log.warning(
                "model.num_heads=%d, but %s has %d, and model.create_heads=false: the model has %d",
                self.wanted_heads, self.path, self.stored_heads, self.num_heads,
            )  # fmt: skip
        architecture = self.architecture()
        self._check_vocabulary()
        model = MtpModel(architecture, split(self._load(), architecture), value_head_dim=self.value_head_dim)
        self._fill_heads(model)
        return model

    def _check_vocabulary(self) -> None:
        assert self.tokenizer is not None
        size = int(self.config.vocab_size)
        if size < self.tokenizer.vocab_size:
            problem = f"has embeddings for {size} tokens, its tokenizer has {self.tokenizer.vocab_size}"
            raise InputError(f"model.path={self.path}: {problem}")

    def _load(self) -> PreTrainedModel:
        disable_progress_bar()  # type: ignore[no-untyped-call]
        loaded: Any
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                self.path, config=self.config, dtype=self.dtype, attn_implementation="sdpa", use_safetensors=True,
                local_files_only=True, trust_remote_code=False, output_loading_info=True,
            )  # fmt: skip
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            problem = f"its weights cannot be loaded: {one_line(error)}; save the model again"
            raise InputError(f"model.path={self.path}: {problem}") from error
        model, info = loaded
        faults = [f"{kind} {name}" for kind, name in _faults(info)]
        if faults:  # transformers would make up what is missing, and leave out what it does not know
            listed = "\n  ".join(faults)
            raise InputError(f"model.path={self.path}: its weights are not those of its config:\n  {listed}")
        assert isinstance(model, PreTrainedModel)
        return model

    def _fill_heads(self, model: MtpModel) -> None:
        """Put the stored heads 2 … into the model."""
        there = min(self.stored_heads, self.num_heads)
        for index in range(1, there):
            prefix = f"{EXTRA}{index - 1}."
            stored = self._tensors(prefix)
            head = model.heads[index]
            target = head if self.head_kind == "medusa" else head.get_submodule("layer")
            try:
                target.load_state_dict(stored, strict=True)
            except RuntimeError as error:
                raise InputError(f"model.path={self.path}: head {index + 1}: {one_line(error)}") from error

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        """The stored tensors whose names begin so, without that beginning."""
        found: dict[str, Tensor] = {}
        for path in sorted(self.path.glob("model*.safetensors")):
            with safe_open(path, framework="pt") as file:
                found |= {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118
        return found


def _faults(info: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What does not fit, of what transformers says about a load; heads are read by ourselves."""
    missing, unexpected, other = (info.get(f"{kind}_keys") or () for kind in ("missing", "unexpected", "mismatched"))
    for name in sorted(missing):
        yield "missing:", name
    for name in sorted(unexpected):
        if not name.startswith(EXTRA):
            yield "unexpected:", name
    for name, stored, expected in other:
        yield "mis-shaped:", f"{name} is {list(stored)}, the config says {list(expected)}"
