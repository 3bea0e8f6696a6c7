"""Multi-token models that are built from a causal language model of transformers, which becomes trunk and head 1."""

import logging
from collections.abc import Iterator
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from wmtp.data.tokenizer import Tokenizer, tokenizer_files
from wmtp.errors import InputError
from wmtp.field_types import ExistingPath, Positive
from wmtp.models.architecture import HeadKind
from wmtp.models.huggingface.adapters import DECODER_ADAPTERS, HuggingFaceArchitecture, split_model
from wmtp.models.huggingface.folder import one_line, read_model_config
from wmtp.models.lora import Lora
from wmtp.models.mtp import MtpModel
from wmtp.models.source import ModelIssue, PretrainedSource
from wmtp.runtime.untrusted_files import read_own_file

log = logging.getLogger(__name__)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NUM_HEADS, HEAD_KIND = "mtp_num_heads", "mtp_head_kind"
"""Config keys of an export with all heads. They contain the number of heads and the kind of heads 2 … H."""
EXTRA_HEADS = "extra_heads."
"""Prefix of the tensor names of heads 2 … H in an export with all heads."""


class Pretrained(PretrainedSource):
    """The source of a model that is stored in a folder written by `save_pretrained`.

    The last block of the stored model is head 1. If the folder is an export of wmtp with all heads, the stored heads
    are used. New heads start as copies of head 1, or as residual layers that return the state of head 1 unchanged.
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
        """Create the source.

        Args:
            tokenizer: the tokenizer of the model; None if the source is only validated.
            path: the folder that `save_pretrained` wrote.
            num_heads: the number of prediction heads.
            create_heads: whether heads that are not stored are created. If false, the model has only stored heads.
            head_kind: the kind of heads 2 … H.
            dtype: the dtype to which the parameters are converted.
            lora: the settings of the trunk's adapters.
            value_head_dim: the hidden width of a value head; None for a linear value head.
        """
        self.tokenizer, self.path, self.value_head_dim = tokenizer, path, value_head_dim
        self.lora = lora if lora.rank is not None else None
        self.requested_heads, self.create_heads = num_heads, create_heads
        self.head_kind, self.dtype = head_kind, DTYPES[dtype]
        self._config: PreTrainedConfig | None = None

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the stored model.

        Raises:
            InputError: the config is missing or not usable, or the architecture is not supported.
        """
        if self._config is None:
            config = read_model_config(self.key, self.path, weights=False)
            if config.model_type not in DECODER_ADAPTERS:
                known = ", ".join(sorted(DECODER_ADAPTERS))
                raise self.error(f"has the unsupported model type {config.model_type}; supported: {known}")
            if getattr(config, "quantization_config", None) is not None:
                raise self.error("is quantized, and quantized weights cannot be trained; name the original model")
            self._config = config
        return self._config

    @property
    def stored_heads(self) -> int:
        """Number of stored prediction heads. Additional heads are counted only if they have the configured kind."""
        if getattr(self.config, HEAD_KIND, self.head_kind) != self.head_kind:
            return 1
        return int(getattr(self.config, NUM_HEADS, 1))

    @property
    def max_positions(self) -> int | None:
        """Maximum sequence length in tokens, or None if there is no limit or the folder does not exist."""
        return self.architecture().max_positions if self.path.is_dir() else None

    def architecture(self) -> HuggingFaceArchitecture:
        """Return the architecture that the folder's config describes, with the configured heads and dtype."""
        return HuggingFaceArchitecture(self.config, self.num_heads, self.head_kind, self.dtype)

    def issues(self) -> Iterator[ModelIssue]:
        """Yield issues of the folder. If there are none, yield issues of adapters that do not match the model."""
        try:
            read_model_config(self.key, self.path)
            if self.config.num_hidden_layers < 2:
                yield "path", str(self.path), "has one block; a trunk and a head need two"
                return
            with torch.device("meta"):
                self.architecture().build_modules()
        except InputError as error:
            yield "path", str(self.path), str(error).removeprefix(str(self.error("")))
        except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            yield "path", str(self.path), f"its config.json is not usable: {type(error).__name__}: {one_line(error)}"
        else:
            yield from self.adapter_issues()

    def files_to_save(self) -> dict[str, bytes]:
        """Return the contents of the config files and of the tokenizer files, by file name."""
        candidates = [self.path / name for name in ("config.json", "generation_config.json")]
        files = {path.name: read_own_file(path) for path in candidates if path.is_file()}
        return files | tokenizer_files(self.path, self.tokenizer)

    def load_base(self) -> MtpModel:
        """Load the weights in the folder.

        Heads that are not stored start as copies of head 1, or as residual layers that return the state of head 1
        unchanged.
        """
        architecture = self.architecture()
        read_model_config(self.key, self.path)
        self.check_embeddings(int(self.config.vocab_size))
        self.log_head_counts()
        if (declared := int(getattr(self.config, NUM_HEADS, 1))) > (used := min(self.stored_heads, self.num_heads)):
            kind = getattr(self.config, HEAD_KIND, self.head_kind)
            log.warning("%s has %d heads (%s); %d are used", self.path, declared, kind, used)
        model = MtpModel(architecture, split_model(self._load(), architecture), value_head_dim=self.value_head_dim)
        self._fill_heads(model)
        return model

    def _load(self) -> PreTrainedModel:
        disable_progress_bar()  # type: ignore[no-untyped-call]
        verbosity = get_verbosity()
        set_verbosity_error()  # type: ignore[no-untyped-call]  # mismatches are reported below; heads are read later
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
        issues = [f"{kind} {name}" for kind, name in _load_issues(info)]
        if issues:  # transformers would initialize missing tensors and ignore unexpected ones
            listed = "\n  ".join(issues)
            raise self.error(f"its weights do not match its config:\n  {listed}")
        assert isinstance(model, PreTrainedModel)
        return model

    def _fill_heads(self, model: MtpModel) -> None:
        """Load the stored additional heads (head 2, head 3, …) into the model."""
        num_stored = min(self.stored_heads, self.num_heads)
        for index in range(1, num_stored):
            prefix = f"{EXTRA_HEADS}{index - 1}."
            stored = self._tensors(prefix)
            head = model.heads[index]
            target = head if self.head_kind == "medusa" else head.get_submodule("layer")
            try:
                target.load_state_dict(stored, strict=True)
            except RuntimeError as error:
                raise self.error(f"head {index + 1}: {one_line(error)}") from error

    def _tensors(self, prefix: str) -> dict[str, Tensor]:
        """Return the stored tensors whose names start with `prefix`. The names in the result are without the prefix."""
        tensors: dict[str, Tensor] = {}
        for path in sorted(self.path.glob("model*.safetensors")):
            with safe_open(path, framework="pt") as file:
                tensors |= {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118
        return tensors


def _load_issues(info: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the kind of issue and the name of each tensor that is missing, unexpected or of a wrong shape.

    `info` is the report of transformers about loaded weights. Unexpected tensors of additional heads are not an issue,
    because these heads are loaded separately.
    """
    kinds = ("missing", "unexpected", "mismatched")
    missing, unexpected, mismatched = (info.get(f"{kind}_keys") or () for kind in kinds)
    for name in sorted(missing):
        yield "missing:", name
    for name in sorted(unexpected):
        if not name.startswith(EXTRA_HEADS):
            yield "unexpected:", name
    for name, stored, expected in mismatched:
        yield "mis-shaped:", f"{name} is {list(stored)}, the config needs {list(expected)}"
