"""A causal language model of transformers as the trunk and first head of a multi-token model."""

import logging
from collections.abc import Iterator
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from wmtp.data.tokenizer import Tokenizer, kept_tokenizer
from wmtp.errors import InputError
from wmtp.field_types import ExistingPath, Positive
from wmtp.models.architecture import HeadKind
from wmtp.models.huggingface.adapters import FAMILIES, HuggingFaceArchitecture, split
from wmtp.models.huggingface.folder import one_line, read_config
from wmtp.models.lora import Lora
from wmtp.models.mtp import MtpModel
from wmtp.models.source import PretrainedSource, Problem

log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_HEADS, HEAD_KIND = "mtp_num_heads", "mtp_head_kind"
"""Keys of the config of an export that keeps all heads."""
EXTRA = "extra_heads."
"""Begins the names of the tensors of heads 2 … H in such an export."""


class Pretrained(PretrainedSource):
    """A model that `save_pretrained` wrote: its last block is head 1, which further heads begin as copies of.

    Where the folder is an export of ours with all heads, these are taken.
    """

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
            config = read_config(self.key, self.path, weights=False)
            if config.model_type not in FAMILIES:
                known = ", ".join(sorted(FAMILIES))
                raise self.error(f"is of the family {config.model_type}; supported are {known}")
            if getattr(config, "quantization_config", None) is not None:
                raise self.error("is quantised, and such weights cannot be trained; name the model it was made of")
            self._config = config
        return self._config

    @property
    def stored_heads(self) -> int:
        """How many heads the folder has, of the kind that is asked for."""
        if getattr(self.config, HEAD_KIND, self.head_kind) != self.head_kind:
            return 1
        return int(getattr(self.config, NUM_HEADS, 1))

    @property
    def max_positions(self) -> int | None:
        """As the folder says."""
        return self.architecture().max_positions if self.path.is_dir() else None

    def architecture(self) -> HuggingFaceArchitecture:
        """As the folder's config says."""
        return HuggingFaceArchitecture(self.config, self.num_heads, self.head_kind, self.dtype)

    def problems(self) -> Iterator[Problem]:
        """A folder that holds no such model, and adapters that it has no place for."""
        try:
            read_config(self.key, self.path)
            if self.config.num_hidden_layers < 2:
                yield "path", str(self.path), "has one block; a trunk and a head need two"
                return
            with torch.device("meta"):
                self.architecture().parts()
        except InputError as error:
            yield "path", str(self.path), str(error).removeprefix(str(self.error("")))
        except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            yield "path", str(self.path), f"its config.json is not usable: {type(error).__name__}: {one_line(error)}"
        else:
            yield from self.adapter_problems()

    def files(self) -> dict[str, bytes]:
        """Config and tokenizer."""
        there = [self.path / name for name in ("config.json", "generation_config.json")]
        kept = {path.name: path.read_bytes() for path in there if path.is_file()}
        return kept | kept_tokenizer(self.path, self.tokenizer)

    def begin(self) -> MtpModel:
        """Load the folder's weights; heads that it lacks begin as copies of head 1, or as residual layers of 0."""
        architecture = self.architecture()
        read_config(self.key, self.path)
        self.require_embeddings(int(self.config.vocab_size))
        self.announce_heads()
        if (declared := int(getattr(self.config, NUM_HEADS, 1))) > (used := min(self.stored_heads, self.num_heads)):
            kind = getattr(self.config, HEAD_KIND, self.head_kind)
            log.warning("%s has %d heads (%s), of which %d are used", self.path, declared, kind, used)
        model = MtpModel(architecture, split(self._load(), architecture), value_head_dim=self.value_head_dim)
        self._fill_heads(model)
        return model

    def _load(self) -> PreTrainedModel:
        disable_progress_bar()  # type: ignore[no-untyped-call]
        verbosity = get_verbosity()
        set_verbosity_error()  # type: ignore[no-untyped-call]  # what does not fit is told below, and heads are read afterwards
        loaded: Any
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                self.path, config=self.config, dtype=self.dtype, attn_implementation="sdpa", use_safetensors=True,
                local_files_only=True, trust_remote_code=False, output_loading_info=True,
            )  # fmt: skip
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            raise self.error(f"its weights cannot be loaded: {one_line(error)}; save the model again") from error
        finally:
            set_verbosity(verbosity)
        model, info = loaded
        faults = [f"{kind} {name}" for kind, name in _faults(info)]
        if faults:  # transformers would make up what is missing, and leave out what it does not know
            listed = "\n  ".join(faults)
            raise self.error(f"its weights are not those of its config:\n  {listed}")
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
                raise self.error(f"head {index + 1}: {one_line(error)}") from error

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
