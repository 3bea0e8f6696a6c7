"""The forms in which a trained model leaves wmtp: which models have which, and how a folder of one comes to be.

Which servers can use the heads follows from what these are: residual layers are Medusa's (Cai et al. 2024, arXiv
2401.10774); blocks as Meta's (Gloeckle et al. 2024, arXiv 2404.19737) are drafts for no server that is known here.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from wmtp.data.tokenizer import Tokenizer
from wmtp.errors import InputError
from wmtp.models.architecture import Architecture
from wmtp.models.llama import LlamaArchitecture
from wmtp.models.mtp import MtpModel
from wmtp.runtime.atomic_files import sync

Format = Literal["hf", "hf_trunk", "medusa", "meta"]
BASE = "base"
"""The folder of the model that a Medusa draft model drafts for."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """The keys of export.yaml."""

    checkpoint: dict[Literal["path"], str]
    folder: str
    format: Format
    cache_dir: Path


@dataclass(frozen=True)
class Trained:
    """A trained model, whose adapters are merged, with what must be known of it elsewhere."""

    model: MtpModel
    tokenizer: Tokenizer
    max_length: int
    """The longest text it was trained on."""
    files: Path | None = None
    """A folder of transformers with the files that the tokenizer came from, if there is one."""


def require_form(format: Format, architecture: Architecture) -> None:  # noqa: A002 - the config's word
    """Raises `InputError` where models of this architecture do not have this form, with the reason."""
    kind, num_heads = architecture.head_kind, int(architecture.settings["num_heads"])
    problem = None
    if format == "medusa" and kind != "medusa":
        problem = (
            "heads 2 … H of this model are transformer blocks, and Medusa's are residual layers; export all heads "
            "with format=hf or head 1 with format=hf_trunk, or train with model.head_kind=medusa"
        )
    elif format == "medusa" and num_heads == 1:
        problem = "this model has one head, and nothing could draft; export it with format=hf_trunk"
    elif format == "meta" and not isinstance(architecture, LlamaArchitecture):
        from wmtp.models.huggingface.adapters import HuggingFaceArchitecture
        from wmtp.models.huggingface.export import meta_obstacles  # imports transformers, which takes seconds

        assert isinstance(architecture, HuggingFaceArchitecture)
        if obstacles := meta_obstacles(architecture):
            problem = f"Meta's layout has no place for this model: {'; '.join(obstacles)}; export it with format=hf"
    if problem:
        raise InputError(f"format={format}: {problem}")


def write(trained: Trained, format: Format, folder: Path) -> list[str]:  # noqa: A002 - the config's word
    """Write an export to a new or empty folder, which is there only when all of it is; what was written, in words.

    Raises:
        InputError: the model does not have this form, the folder is not empty or cannot be written, or what was
            written does not agree with its own config.
    """
    require_form(format, trained.model.architecture)
    writer = {"hf": _write_hf, "hf_trunk": _write_trunk, "medusa": _write_medusa, "meta": _write_meta}[format]
    with staged(folder) as staging:
        notes = writer(trained, staging)
    return [*how_to_load(trained.model, format, folder), *notes]


def how_to_load(model: MtpModel, format: Format, folder: Path) -> list[str]:  # noqa: A002 - the config's word
    """What lies in the folder of an export, and the lines that load it."""
    heads, kind, plain = model.num_heads, model.architecture.head_kind, "AutoModelForCausalLM.from_pretrained"
    if format == "hf_trunk":
        return [f"{folder}: trunk and head 1 of {heads}, a plain causal language model", f'{plain}("{folder}")']
    if format == "hf":
        return [
            f"{folder}: all {heads} heads; without trust_remote_code it loads as head 1 alone",
            f'{plain}("{folder}", trust_remote_code=True)(…, return_all_heads=True)',
            f"python -m wmtp.train model=huggingface model.path={folder} model.num_heads={heads}"
            f" model.head_kind={kind}",
        ]
    if format == "medusa":
        options = f'{{"method": "medusa", "model": "{folder}", "num_speculative_tokens": {heads - 1}}}'
        return [
            f"{folder}: {heads - 1} Medusa heads, and in {folder / BASE} the model that they draft for",
            f"vllm serve {folder / BASE} --speculative-config '{options}'",
        ]
    return [
        f"{folder}: all {heads} heads in Meta's layout",
        f"python -m wmtp.train model=meta_mtp_7b model.path={folder}",
    ]


def _write_trunk(trained: Trained, folder: Path) -> list[str]:
    return _write_causal(trained, folder, all_heads=False)


def _write_hf(trained: Trained, folder: Path) -> list[str]:
    return _write_causal(trained, folder, all_heads=True)


def _write_causal(trained: Trained, folder: Path, *, all_heads: bool) -> list[str]:
    from wmtp.models.huggingface.export import tokenizer_notes, write_causal, write_generation, write_tokenizer

    write_causal(trained.model, trained.tokenizer, trained.max_length, folder, all_heads=all_heads)
    write_tokenizer(trained.tokenizer, trained.files, folder)
    write_generation(trained.tokenizer, trained.files, folder)
    return tokenizer_notes(trained.tokenizer, folder)


def _write_medusa(trained: Trained, folder: Path) -> list[str]:
    from wmtp.models.huggingface.export import write_medusa

    (folder / BASE).mkdir()
    notes = _write_trunk(trained, folder / BASE)
    write_medusa(trained.model, folder)
    return notes


def _write_meta(trained: Trained, folder: Path) -> list[str]:
    from wmtp.models.huggingface.export import as_own_llama, write_tokenizer
    from wmtp.models.meta import write_meta
    from wmtp.models.meta_format import read_meta

    model = trained.model
    if not isinstance(model.architecture, LlamaArchitecture):
        model = as_own_llama(model)
    write_meta(model, folder)
    read_meta(folder).tensors()  # raises where names and shapes are not those of params.json
    write_tokenizer(trained.tokenizer, trained.files, folder)
    return []


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `folder` when all went well, and else is removed.

    Raises:
        InputError: `folder` is not new or empty, or the disk does not take what is written.
    """
    if problem := occupied(folder):
        raise InputError(f"folder={folder}: {problem}")
    folder = Path(os.path.abspath(folder))
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in staging.rglob("*"):
            sync(path)
        staging.rename(folder)  # over an empty folder, too
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(f"folder={folder}: cannot be written: {error}; nothing was kept") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def occupied(folder: Path) -> str | None:
    """Why an export cannot be written to a folder; None if it is new or empty."""
    if folder.is_dir():
        return "holds something already; name a new folder" if any(folder.iterdir()) else None
    return "is a file; name a new folder" if folder.exists() else None
