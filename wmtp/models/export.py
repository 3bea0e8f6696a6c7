"""Export of trained models to a folder, in one of several formats.

The kind of heads 2 … H determines which inference servers can use them. Residual layers are Medusa heads (Cai et al.
2024, arXiv 2401.10774), which vLLM supports. No inference server is known that supports transformer blocks, which are
the heads of Meta's models (Gloeckle et al. 2024, arXiv 2404.19737).
"""

import json
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from wmtp.config.overrides import shell_argument
from wmtp.data.tokenizer import Tokenizer, tokenizer_files
from wmtp.errors import InputError
from wmtp.field_types import OutputPath
from wmtp.models.architecture import Architecture
from wmtp.models.llama import LlamaArchitecture
from wmtp.models.mtp import MtpModel
from wmtp.runtime.atomic_files import fsync_path, share_like_folder
from wmtp.runtime.run_dir import module_command

Format = Literal["hf", "hf_trunk", "medusa", "meta"]
BASE_FOLDER = "base"
"""Name of the subfolder of a Medusa export that contains the base model."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The config keys of export.yaml."""

    checkpoint: dict[Literal["path"], str]
    folder: str
    format: Format
    cache_dir: OutputPath


@dataclass(frozen=True)
class TrainedModel:
    """A trained model whose adapters are merged into its weights, and the tokenizer of this model."""

    model: MtpModel
    tokenizer: Tokenizer
    max_length: int
    """Maximum sequence length during training, in tokens."""
    source_folder: Path | None = None
    """Folder, written by `save_pretrained`, from which the tokenizer was loaded. None for wmtp's own tokenizer."""


def check_format(format: Format, architecture: Architecture) -> None:  # noqa: A002 - the config key
    """Check that an export format supports models of an architecture.

    Raises:
        InputError: the format does not support the architecture; the message gives the reason.
    """
    kind, num_heads = architecture.head_kind, int(architecture.settings["num_heads"])
    problem = None
    if format == "medusa" and kind != "medusa":
        problem = (
            "heads 2 … H of this model are transformer blocks, and Medusa's are residual layers; export all heads "
            "with format=hf or head 1 with format=hf_trunk, or train with model.head_kind=medusa"
        )
    elif format == "medusa" and num_heads == 1:
        problem = "this model has one head and therefore no draft heads; export it with format=hf_trunk"
    elif format == "meta" and not isinstance(architecture, LlamaArchitecture):
        from wmtp.models.huggingface.adapters import HuggingFaceArchitecture
        from wmtp.models.huggingface.export import meta_format_issues  # imports transformers, which takes seconds

        assert isinstance(architecture, HuggingFaceArchitecture)
        if issues := meta_format_issues(architecture):
            problem = f"Meta's layout does not support this model: {'; '.join(issues)}; export it with format=hf"
    if problem:
        raise InputError(f"format={format}: {problem}")


def write_export(trained: TrainedModel, format: Format, folder: Path) -> list[str]:  # noqa: A002 - the config key
    """Write an export atomically to a folder. Return lines of text that describe the export and how to load it.

    The folder must be new or empty.

    Raises:
        InputError: the format does not support the model, the folder is not empty or cannot be written, or the
            written tensors do not match the written config.
    """
    check_format(format, trained.model.architecture)
    writer = {"hf": _write_hf, "hf_trunk": _write_trunk, "medusa": _write_medusa, "meta": _write_meta}[format]
    with staging_folder(folder) as staging:
        notes = writer(trained, staging)
    return [*usage_lines(trained.model, format, folder), *notes]


def usage_lines(model: MtpModel, format: Format, folder: Path) -> list[str]:  # noqa: A002 - the config key
    """Return lines of text that describe the content of an export folder and how to load the export."""
    heads, kind = model.num_heads, model.architecture.head_kind
    loader = f"AutoModelForCausalLM.from_pretrained({json.dumps(str(folder), ensure_ascii=False)}"
    path = shell_argument("model.path", folder)
    if format == "hf_trunk":
        return [f"{folder}: trunk and head 1 of {heads}, a plain causal language model", f"{loader})"]
    if format == "hf":
        return [
            f"{folder}: all {heads} heads; without trust_remote_code only head 1 is loaded",
            f"{loader}, trust_remote_code=True)(…, return_all_heads=True)",
            f"{module_command('wmtp.train')} model=huggingface {path} model.num_heads={heads} model.head_kind={kind}",
        ]
    if format == "medusa":
        options = {"method": "medusa", "model": str(folder), "num_speculative_tokens": heads - 1}
        option = shlex.quote(json.dumps(options, ensure_ascii=False))
        return [
            f"{folder}: {heads - 1} Medusa heads, and in {folder / BASE_FOLDER} their base model",
            f"vllm serve {shlex.quote(str(folder / BASE_FOLDER))} --speculative-config {option}",
        ]
    return [
        f"{folder}: all {heads} heads in Meta's layout",
        f"{module_command('wmtp.train')} model=meta_mtp_7b {path}",
    ]


def _write_trunk(trained: TrainedModel, folder: Path) -> list[str]:
    return _write_causal(trained, folder, all_heads=False)


def _write_hf(trained: TrainedModel, folder: Path) -> list[str]:
    return _write_causal(trained, folder, all_heads=True)


def _write_causal(trained: TrainedModel, folder: Path, *, all_heads: bool) -> list[str]:
    from wmtp.models.huggingface.export import tokenizer_notes, write_causal, write_generation_config

    write_causal(trained.model, trained.tokenizer, trained.max_length, folder, all_heads=all_heads)
    _write_tokenizer(trained, folder)
    write_generation_config(trained.tokenizer, trained.source_folder, folder)
    return tokenizer_notes(trained.tokenizer, folder)


def _write_medusa(trained: TrainedModel, folder: Path) -> list[str]:
    from wmtp.models.huggingface.export import write_medusa

    (folder / BASE_FOLDER).mkdir()
    notes = _write_trunk(trained, folder / BASE_FOLDER)
    write_medusa(trained.model, folder)
    return notes


def _write_meta(trained: TrainedModel, folder: Path) -> list[str]:
    from wmtp.models.huggingface.export import to_llama_model
    from wmtp.models.meta import write_meta
    from wmtp.models.meta_format import read_meta

    model = trained.model
    if not isinstance(model.architecture, LlamaArchitecture):
        model = to_llama_model(model)
    write_meta(model, folder)
    read_meta(folder).tensors()  # raises if names or shapes do not match params.json
    _write_tokenizer(trained, folder)
    return []


def _write_tokenizer(trained: TrainedModel, folder: Path) -> None:
    for name, content in tokenizer_files(trained.source_folder, trained.tokenizer).items():
        (folder / name).write_bytes(content)


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder. On success it is renamed to `folder`; on failure it is removed.

    Raises:
        InputError: `folder` is a file or is not empty, or it cannot be written.
    """
    if problem := folder_issue(folder):
        raise InputError(f"folder={folder}: {problem}")
    folder = Path(os.path.abspath(folder))
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in staging.rglob("*"):
            if path.is_file():
                share_like_folder(path)
            fsync_path(path)
        staging.rename(folder)  # also replaces an empty folder
        fsync_path(folder.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"folder={folder}: cannot be written: {error}; no files were kept") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def folder_issue(folder: Path) -> str | None:
    """Return the reason why an export cannot be written to a folder, or None if the folder is new or empty."""
    if folder.is_dir():
        return "is not empty; name a new folder" if any(folder.iterdir()) else None
    if folder.is_symlink():
        return f"is a link to {folder.readlink()}, which is not a folder; name a new folder"
    return "is a file; name a new folder" if folder.exists() else None
