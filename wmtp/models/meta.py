"""Meta's multi-token checkpoints as a source of models, and models written as such checkpoints."""

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor

from wmtp.data.tokenizer import Tokenizer, kept_tokenizer
from wmtp.errors import InputError
from wmtp.field_types import Positive
from wmtp.models.llama import LlamaArchitecture
from wmtp.models.lora import Lora
from wmtp.models.meta_format import (
    METADATA,
    PARAMS,
    SAFETENSORS,
    TORCH,
    meta_names,
    params_of,
    read_meta,
    read_params,
)
from wmtp.models.mtp import MtpModel, empty_model
from wmtp.models.source import PretrainedSource, Problem
from wmtp.runtime.atomic_files import encode_json, replace_atomically, sync

log = logging.getLogger(__name__)


class MetaCheckpoint(PretrainedSource):
    """A multi-token model of Meta's; heads beyond those that are there begin as copies of head 1."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        path: Path,
        num_heads: Positive | None = None,
        create_heads: bool = True,
        dtype: Literal["fp32", "bf16"] = "fp32",
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        lora: Lora,
        value_head_dim: Positive | None = None,
    ) -> None:
        """`num_heads` of None: as many as are there. `dtype` is that of the parameters, whatever is stored.

        With `create_heads` the model gets heads that its folder lacks; without, it has as many as are there.
        """
        self.tokenizer, self.path, self.value_head_dim = tokenizer, path, value_head_dim
        self.lora = lora if lora.rank is not None else None
        self.wanted_heads, self.create_heads = num_heads, create_heads
        self.dtype, self.dropout = dtype, dropout

    @property
    def stored_heads(self) -> int:
        """As the folder says."""
        with self._placed():
            return read_meta(self.path).params.n_future_tokens

    def architecture(self) -> LlamaArchitecture:
        """As the folder says, with the heads that are asked for."""
        with self._placed():
            stored = read_meta(self.path).architecture()
        return replace(stored, num_heads=self.num_heads, dropout=self.dropout, dtype=self.dtype)

    def problems(self) -> Iterator[Problem]:
        """A folder that holds no such model, and adapters that it has no place for."""
        try:
            read_meta(self.path).tensors()
        except InputError as error:
            yield from (("path", str(self.path), problem) for problem in _problems(error))
            return
        yield from self.adapter_problems()

    def files(self) -> dict[str, bytes]:
        """A params.json that needs no other file, and the tokenizer."""
        with self._placed():
            kept = encode_json(params_of(read_meta(self.path).architecture()))
        return {PARAMS: kept} | kept_tokenizer(self.path, self.tokenizer)

    def begin(self) -> MtpModel:
        """Copy the folder's tensors one by one into a model with the parameters' type."""
        with self._placed():
            folder = read_meta(self.path)
            tensors = folder.tensors()
            stored = folder.architecture()
            folder.check_hashes()
        self.require_embeddings(stored.vocab_size)
        architecture = self.architecture()
        self.announce_heads()
        model = empty_model(architecture, value_head_dim=self.value_head_dim)
        model.to_empty(device=torch.get_default_device())
        names = meta_names(stored.num_layers - 1, stored.num_heads)
        for name, parameter in model.state_dict().items():
            parameter.copy_(tensors[names.get(name) or names[re.sub(r"^heads\.\d+", "heads.0", name)]])
        return model

    @contextmanager
    def _placed(self) -> Iterator[None]:
        """Puts the key and the path before every problem."""
        try:
            yield
        except InputError as error:
            raise InputError("\n".join(f"model.path={self.path}: {each}" for each in _problems(error))) from error


def _problems(error: InputError) -> list[str]:
    """The problems of a folder: a line each, and indented lines that belong to it."""
    return re.split(r"\n(?! )", str(error))


def write_meta(
    model: MtpModel,
    folder: Path,
    params: Mapping[str, Any] | None = None,
    layout: Literal["pth", "safetensors"] = "pth",
) -> None:
    """Write a model to a folder in Meta's layout, which is read as `MetaCheckpoint`. `params` is its params.json.

    Raises:
        InputError: the layout has no place for something that the model has, or `params` is of another model.
    """
    architecture = model.architecture
    if not isinstance(architecture, LlamaArchitecture) or architecture.head_kind != "transformer":
        raise InputError(f"{folder}: Meta's layout is for Llama models whose heads are blocks")
    if model.lora is not None or model.value_head is not None:
        raise InputError(f"{folder}: Meta's layout has no place for adapters and value heads: merge or remove them")
    other = folder / (METADATA if layout == "pth" else TORCH)
    if other.exists():
        raise InputError(f"{folder}: has a {other.name}, which is of the other layout; name another folder")
    architecture = replace(architecture, num_layers=len(model.trunk) + 1, num_heads=len(model.heads))
    content = dict(params_of(architecture) if params is None else params)
    described = asdict(read_params(content, f"{folder}: {PARAMS}").architecture(architecture.vocab_size))
    has = asdict(architecture) | {"dropout": described["dropout"], "dtype": described["dtype"]}
    if differing := [f"{name}={value}, not {has[name]}" for name, value in described.items() if value != has[name]]:
        raise InputError(f"{folder}: {PARAMS} is of another model: it says {'; '.join(differing)}")
    state = model.state_dict()
    names = meta_names(len(model.trunk), len(model.heads))
    tensors = {theirs: _alone(state[ours]) for ours, theirs in names.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (TORCH if layout == "pth" else SAFETENSORS)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(tensors, staged) if layout == "pth" else save_file(tensors, staged, {"format": "pt"})
        sync(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)
    replace_atomically(folder / PARAMS, encode_json(content))
    if layout == "safetensors":
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        said = {"format": "safetensors", "files": {"config": PARAMS, "weights": SAFETENSORS}, "sha256": digest}
        replace_atomically(folder / METADATA, encode_json(said))


def _alone(tensor: Tensor) -> Tensor:
    """The tensor in main memory of its own: of one that is part of a larger, torch.save writes all of that."""
    tensor = tensor.cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
