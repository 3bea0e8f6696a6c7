"""Read and write Meta's multi-token checkpoints."""

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

from wmtp.data.tokenizer import Tokenizer, tokenizer_files
from wmtp.errors import InputError
from wmtp.field_types import InputPath, Positive
from wmtp.models.llama import LlamaArchitecture
from wmtp.models.lora import Lora
from wmtp.models.meta_format import (
    METADATA,
    PARAMS,
    SAFETENSORS,
    TORCH,
    meta_names,
    params_json,
    read_meta,
    read_params,
)
from wmtp.models.mtp import MtpModel, empty_model
from wmtp.models.source import ModelIssue, PretrainedSource
from wmtp.runtime.atomic_files import encode_json, fsync_path, replace_atomically, share_like_folder

log = logging.getLogger(__name__)


class MetaCheckpoint(PretrainedSource):
    """The source of a multi-token model in Meta's layout. Heads that are not stored start as copies of head 1."""

    def __init__(
        self,
        *,
        tokenizer: Tokenizer | None,
        path: InputPath,
        num_heads: Positive | None = None,
        create_heads: bool = True,
        dtype: Literal["fp32", "bf16"] = "fp32",
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        lora: Lora,
        value_head_dim: Positive | None = None,
    ) -> None:
        """Create the source.

        Args:
            tokenizer: the tokenizer of the model; None if the source is only validated.
            path: the folder with Meta's files.
            num_heads: the number of prediction heads; None for the number of stored heads.
            create_heads: whether heads that are not stored are created. If false, the model has only stored heads.
            dtype: the dtype to which the parameters are converted.
            dropout: the dropout probability of the blocks.
            lora: the settings of the trunk's adapters.
            value_head_dim: the hidden width of a value head; None for a linear value head.
        """
        self.tokenizer, self.path, self.value_head_dim = tokenizer, path, value_head_dim
        self.lora = lora if lora.rank is not None else None
        self.requested_heads, self.create_heads = num_heads, create_heads
        self.dtype, self.dropout = dtype, dropout

    @property
    def stored_heads(self) -> int:
        """Number of prediction heads in the folder, as declared in params.json."""
        with self._error_location():
            return read_meta(self.path).params.n_future_tokens

    def architecture(self) -> LlamaArchitecture:
        """Return the architecture in params.json, with the configured number of heads, dropout and dtype."""
        with self._error_location():
            stored = read_meta(self.path).architecture()
        return replace(stored, num_heads=self.num_heads, dropout=self.dropout, dtype=self.dtype)

    def issues(self) -> Iterator[ModelIssue]:
        """Yield issues of the folder. If there are none, yield issues of adapters that do not match the model."""
        try:
            read_meta(self.path).tensors()
        except InputError as error:
            yield from (("path", str(self.path), problem) for problem in _split_problems(error))
            return
        yield from self.adapter_issues()

    def files_to_save(self) -> dict[str, bytes]:
        """Return the contents of params.json and of the tokenizer files, by file name.

        This params.json describes the model completely, so no metadata.json is needed.
        """
        with self._error_location():
            params = encode_json(params_json(read_meta(self.path).architecture()))
        return {PARAMS: params} | tokenizer_files(self.path, self.tokenizer)

    def load_base(self) -> MtpModel:
        """Load the tensors in the folder one by one into a model whose parameters have the configured dtype."""
        with self._error_location():
            folder = read_meta(self.path)
            tensors = folder.tensors()
            stored = folder.architecture()
            folder.check_hashes()
        self.check_embeddings(stored.vocab_size)
        architecture = self.architecture()
        self.log_head_counts()
        model = empty_model(architecture, value_head_dim=self.value_head_dim)
        model.to_empty(device=torch.get_default_device())
        names = meta_names(stored.num_layers - 1, stored.num_heads)
        for name, parameter in model.state_dict().items():
            parameter.copy_(tensors[names.get(name) or names[re.sub(r"^heads\.\d+", "heads.0", name)]])
        return model

    @contextmanager
    def _error_location(self) -> Iterator[None]:
        """Add the config key and the path of the folder before every problem in the message of an `InputError`."""
        try:
            yield
        except InputError as error:
            raise InputError("\n".join(f"model.path={self.path}: {each}" for each in _split_problems(error))) from error


def _split_problems(error: InputError) -> list[str]:
    """Split the message of an error into problems. A problem is one line and the indented lines that follow it."""
    return re.split(r"\n(?! )", str(error))


def write_meta(
    model: MtpModel,
    folder: Path,
    params: Mapping[str, Any] | None = None,
    layout: Literal["pth", "safetensors"] = "pth",
) -> None:
    """Write a model to a folder in Meta's layout, which `MetaCheckpoint` can load.

    Args:
        model: a Llama model whose heads are transformer blocks.
        folder: the folder, which is created if necessary.
        params: the content of params.json; None to derive it from the architecture.
        layout: "pth" to write consolidated.pth, "safetensors" to write model.safetensors and metadata.json.

    Raises:
        InputError: the layout does not support the model, or `params` describes another model.
    """
    architecture = model.architecture
    if not isinstance(architecture, LlamaArchitecture) or architecture.head_kind != "transformer":
        raise InputError(f"{folder}: Meta's layout supports only Llama models whose heads are blocks")
    if model.lora is not None or model.value_head is not None:
        raise InputError(f"{folder}: Meta's layout does not support adapters and value heads: merge or remove them")
    other = folder / (METADATA if layout == "pth" else TORCH)
    if other.exists():
        raise InputError(f"{folder}: has a {other.name}, which belongs to the other layout; name another folder")
    architecture = replace(architecture, num_layers=len(model.trunk) + 1, num_heads=len(model.heads))
    content = dict(params_json(architecture) if params is None else params)
    from_params = asdict(read_params(content, f"{folder}: {PARAMS}").architecture(architecture.vocab_size))
    actual = asdict(architecture) | {"dropout": from_params["dropout"], "dtype": from_params["dtype"]}
    if differences := [
        f"{name}={value}, not {actual[name]}" for name, value in from_params.items() if value != actual[name]
    ]:
        raise InputError(f"{folder}: {PARAMS} describes another model: {'; '.join(differences)}")
    state = model.state_dict()
    names = meta_names(len(model.trunk), len(model.heads))
    tensors = {theirs: _own_storage(state[ours]) for ours, theirs in names.items()}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (TORCH if layout == "pth" else SAFETENSORS)
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(tensors, staging) if layout == "pth" else save_file(tensors, staging, {"format": "pt"})
        share_like_folder(staging)
        fsync_path(staging)
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
    replace_atomically(folder / PARAMS, encode_json(content))
    if layout == "safetensors":
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        metadata = {"format": "safetensors", "files": {"config": PARAMS, "weights": SAFETENSORS}, "sha256": digest}
        replace_atomically(folder / METADATA, encode_json(metadata))


def _own_storage(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU, in a storage that contains nothing else.

    A view is copied, because torch.save would write the complete storage to which the view belongs.
    """
    tensor = tensor.cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
