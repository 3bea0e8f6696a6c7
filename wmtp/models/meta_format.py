"""The format of Meta's multi-token checkpoints.

A checkpoint consists of params.json and consolidated.pth, or of metadata.json and safetensors files.

Source: Gloeckle et al. 2024 (arXiv 2404.19737) and the files of `facebook/multi-token-prediction`. In these files,
`layers` are the blocks of the trunk followed by head 1, `extra_heads` are heads 2 … H, and `n_layers` is the number of
all blocks, including the heads.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Annotated, Any

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch import Tensor

from wmtp.errors import InputError
from wmtp.field_types import PositiveFloat
from wmtp.models.llama import LlamaArchitecture
from wmtp.models.mtp import empty_model

PARAMS, METADATA, TORCH, SAFETENSORS = "params.json", "metadata.json", "consolidated.pth", "model.safetensors"
EMBEDDING = "tok_embeddings.weight"
BLOCK = {
    "attention.query": "attention.wq", "attention.key": "attention.wk", "attention.value": "attention.wv",
    "attention.output": "attention.wo", "feed_forward.gate": "feed_forward.w1", "feed_forward.up": "feed_forward.w3",
    "feed_forward.output": "feed_forward.w2", "attention_norm": "attention_norm", "feed_forward_norm": "ffn_norm",
}  # fmt: skip
"""Names of the modules of a block that have a weight. The keys are names in wmtp, and the values are Meta's names."""
OTHER_ROTATIONS = ("use_scaled_rope", "rope_scaling", "rope_parameters")
"""Keys in the params.json of later Llama versions, which have the same tensors but another forward pass."""
META_DEFAULTS = {"norm_eps": 1e-5, "vocab_size": -1}
"""Values of keys that a params.json may leave out, from the class `ModelArgs` in Meta's model.py."""
OTHER_NAMES = frozenset({"hidden_size", "rms_norm_eps"})
"""Keys that show that a file has Hugging Face's names, to which Meta's defaults do not apply."""
Size = Annotated[int, Field(ge=1, le=2**24)]
Count = Annotated[int, Field(ge=1, le=4096)]


class MetaParams(BaseModel):
    """The content of params.json. The keys can have Meta's names or Hugging Face's names.

    If `vocab_size` is −1, the vocabulary size is the number of rows of the embedding.
    """

    model_config = ConfigDict(strict=True, frozen=True)
    dim: Size = Field(validation_alias=AliasChoices("dim", "hidden_size"))
    n_layers: Count = Field(validation_alias=AliasChoices("n_layers", "num_hidden_layers"))
    n_heads: Size = Field(validation_alias=AliasChoices("n_heads", "num_attention_heads"))
    n_kv_heads: Size | None = Field(None, validation_alias=AliasChoices("n_kv_heads", "num_key_value_heads"))
    vocab_size: Annotated[int, Field(ge=-1, le=2**24)]
    norm_eps: PositiveFloat = Field(validation_alias=AliasChoices("norm_eps", "rms_norm_eps"))
    rope_theta: PositiveFloat = 10_000.0
    n_future_tokens: Count = 1
    multiple_of: Size = 256
    ffn_dim_multiplier: Annotated[float, Field(gt=0, le=1024)] | None = None
    intermediate_size: Size | None = None
    """Width of the feed-forward layers. If it is None, the width is computed by Meta's formula."""

    def architecture(self, vocab_size: int) -> LlamaArchitecture:
        """Return the architecture with all stored heads.

        The argument `vocab_size` is used only if `vocab_size` in params.json is −1.
        """
        return LlamaArchitecture(
            vocab_size=vocab_size if self.vocab_size == -1 else self.vocab_size, dim=self.dim,
            num_layers=self.n_layers - self.n_future_tokens + 1, num_heads=self.n_future_tokens,
            num_attention_heads=self.n_heads, num_kv_heads=self.n_kv_heads or self.n_heads,
            hidden_dim=self.intermediate_size or hidden_dim(self.dim, self.multiple_of, self.ffn_dim_multiplier),
            rope_theta=self.rope_theta, norm_eps=self.norm_eps,
        )  # fmt: skip


def hidden_dim(dim: int, multiple_of: int = 256, ffn_dim_multiplier: float | None = None) -> int:
    """Return the width of the feed-forward layers by the formula of Meta's model.py."""
    width = int(2 * (4 * dim) / 3)
    if ffn_dim_multiplier is not None:
        width = int(ffn_dim_multiplier * width)
    return multiple_of * ((width + multiple_of - 1) // multiple_of)


def formula_keys(dim: int, width: int) -> dict[str, int | float]:
    """Return `multiple_of` and, if necessary, `ffn_dim_multiplier` with which `hidden_dim` returns `width`."""
    base = hidden_dim(dim, multiple_of=1)
    if hidden_dim(dim) == width:
        return {"multiple_of": 256}
    if base > width:
        return {"multiple_of": 1, "ffn_dim_multiplier": (width + 0.5) / base}  # 0.5 exceeds any rounding error
    return {"multiple_of": next(m for m in range(width - base + 1, width + 1) if width % m == 0)}


def params_json(architecture: LlamaArchitecture) -> dict[str, Any]:
    """Return the content of the params.json that describes an architecture."""
    return {
        "dim": architecture.dim,
        "n_layers": architecture.num_layers - 1 + architecture.num_heads,
        "n_heads": architecture.num_attention_heads,
        "n_kv_heads": architecture.num_kv_heads,
        "vocab_size": architecture.vocab_size,
        **formula_keys(architecture.dim, architecture.hidden_dim),
        "norm_eps": architecture.norm_eps,
        "rope_theta": architecture.rope_theta,
        "n_future_tokens": architecture.num_heads,
    }


def read_params(content: Mapping[str, Any], place: str) -> MetaParams:
    """Validate the content of a params.json. `place` is the name of the file in error messages.

    Raises:
        InputError: values are missing, invalid or inconsistent; the message has one line for each problem.
    """
    values = {key: value for key, value in content.items() if value is not None}
    if OTHER_NAMES.isdisjoint(values):
        values = META_DEFAULTS | values
    issues = [f"{key}: belongs to an unsupported kind of model" for key in OTHER_ROTATIONS if values.get(key)]
    try:
        params = MetaParams.model_validate(values)
    except ValidationError as error:
        for issue in error.errors():
            value = "" if issue["type"] == "missing" else f"={issue['input']!r}"
            problem = issue["msg"].replace("Input should be", "must be").replace("Field required", "is missing")
            issues.append(f"{issue['loc'][0]}{value}: {problem}")
    else:
        issues += _inconsistencies(params)
    if issues:
        raise InputError("\n".join(f"{place}: {issue}" for issue in issues))
    return params


def _inconsistencies(params: MetaParams) -> Iterator[str]:
    if params.vocab_size == 0:
        yield "vocab_size=0: must be at least 1, or -1"
    if params.n_layers < params.n_future_tokens:
        yield f"n_layers={params.n_layers}: must be at least n_future_tokens={params.n_future_tokens}"
    if params.dim % (2 * params.n_heads):
        yield f"dim={params.dim}: must be a multiple of 2 · n_heads = {2 * params.n_heads}"
    if params.n_heads % (params.n_kv_heads or 1):
        yield f"n_kv_heads={params.n_kv_heads}: must divide n_heads={params.n_heads}"


def meta_names(num_trunk_blocks: int, num_heads: int) -> dict[str, str]:
    """Return Meta's name for each tensor of wmtp. The keys are wmtp's names, in the order of Meta's files."""

    def _weights(blocks: dict[str, str]) -> dict[str, str]:
        """Return Meta's name of each weight of the blocks. `blocks` maps wmtp's name of a block to Meta's name."""
        named = [(f"{ours}.{{}}.weight", f"{theirs}.{{}}.weight") for ours, theirs in blocks.items()]
        return {ours.format(name): theirs.format(meta) for ours, theirs in named for name, meta in BLOCK.items()}

    layers = {f"trunk.{i}": f"layers.{i}" for i in range(num_trunk_blocks)} | {"heads.0": f"layers.{num_trunk_blocks}"}
    extra_heads = {f"heads.{i}": f"extra_heads.{i - 1}" for i in range(1, num_heads)}
    outer = {"norm.weight": "norm.weight", "unembedding.weight": "output.weight"}
    return {"embedding.weight": EMBEDDING} | _weights(layers) | outer | _weights(extra_heads)


@dataclass(frozen=True)
class MetaFolder:
    """A folder in Meta's layout.

    Its methods raise `InputError` if a file is invalid. The error messages do not contain the path of the folder.
    """

    path: Path
    metadata: dict[str, Any] | None
    """Content of metadata.json, or None if the folder has no such file."""
    config_file: str
    """Name of the file that contains the sizes of the model, relative to the folder."""
    content: dict[str, Any]
    params: MetaParams

    def architecture(self) -> LlamaArchitecture:
        """Return the architecture of the stored model.

        The weight files are read only if `vocab_size` is −1, to get the number of rows of the embedding.
        """
        if self.params.vocab_size != -1:
            return self.params.architecture(self.params.vocab_size)
        return self.params.architecture(_num_embeddings(self._map_files()))

    def weight_files(self) -> list[str]:
        """Return the names of the files that contain tensors, relative to the folder.

        Raises:
            InputError: the folder has no file with tensors, or metadata.json contains an invalid file name.
        """
        places = [TORCH] if self.metadata is None else [SAFETENSORS, f"safetensors/{SAFETENSORS}"]
        named = named_file(self.path, self.metadata or {}, "weights", "checkpoint")
        found = [named] if named else [place for place in places if (self.path / place).is_file()][:1]
        if not found and self.metadata is not None:
            found = sorted(f"safetensors/{path.name}" for path in self.path.glob("safetensors/*.safetensors"))
        if not found:
            metadata_problem = (
                f"no {METADATA} beside safetensors" if self.metadata is None else f"its {METADATA} names no weights"
            )
            raise InputError(f"has no {' or '.join(places)}, and {metadata_problem}")
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, with Meta's names as keys.

        The tensors are memory-mapped, so their values are read only when they are used.

        Raises:
            InputError: a file is missing or damaged, or the tensors do not match params.json.
        """
        found = self._map_files()
        stored = self.params.architecture(_num_embeddings(found))
        state = empty_model(stored).state_dict()
        names = meta_names(stored.num_layers - 1, stored.num_heads)
        expected = {theirs: tuple(state[ours].shape) for ours, theirs in names.items()}
        if issues := _tensor_issues(self, found, expected):
            listed = "".join(f"\n    {issue}" for issue in issues)
            raise InputError(f"{', '.join(self.weight_files())}: does not match {self.config_file}:{listed}")
        return {name: found[name] for name in expected}

    def check_hashes(self) -> None:
        """Compare the weight files with their sha256 in metadata.json. Do nothing if metadata.json has no sha256.

        The key `sha256` of metadata.json contains the hash of the only weight file, or an object with a hash for each
        weight file.

        Raises:
            InputError: the hash of a file is missing or differs.
        """
        declared, files = (self.metadata or {}).get("sha256"), self.weight_files()
        if declared is None:
            return
        hashes = declared if isinstance(declared, dict) else dict.fromkeys(files[:1], declared)
        for name in files:
            if not isinstance(expected := hashes.get(name), str):
                raise InputError(f"{METADATA}: sha256 must be a hash, or an object with one for each of {files}")
            with (self.path / name).open("rb") as file:
                actual = hashlib.file_digest(file, "sha256").hexdigest()
            if actual != expected.lower():
                raise InputError(f"{name}: its sha256 is {actual}, {METADATA} has {expected}; get the file again")

    def _map_files(self) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for name in self.weight_files():
            tensors = map_tensors(self.path / name)
            if duplicates := sorted(content.keys() & tensors.keys()):
                raise InputError(f"{name}: contains tensors that another file contains too: {', '.join(duplicates)}")
            content |= tensors
        return {name: tensor for name, tensor in content.items() if not f".{name}".endswith(".rope.freqs")}


def read_meta(path: Path) -> MetaFolder:
    """Read the description of the model in a folder. The tensors are not read.

    Raises:
        InputError: files or values are missing or invalid; the message has one line for each problem.
    """
    metadata = _read_json(path, METADATA) if (path / METADATA).is_file() else None
    places = [PARAMS] if metadata is None else [PARAMS, f"configs/{PARAMS}"]
    config_file = named_file(path, metadata or {}, "config", "params")
    config_file = config_file or next((place for place in places if (path / place).is_file()), METADATA)
    if config_file == METADATA and metadata is None:
        subfolders = [file.parent for file in sorted(path.glob(f"*/{PARAMS}"))]
        hint = f", such as {subfolders[0]}" if subfolders else ""
        raise InputError(f"has no {PARAMS} and no {METADATA}; name the folder that contains Meta's files{hint}")
    content = _read_json(path, config_file)
    return MetaFolder(path, metadata, config_file, content, read_params(content, config_file))


def named_file(path: Path, metadata: Mapping[str, Any], *keys: str) -> str | None:
    """Return the file name that the object `files` in metadata.json has under one of `keys`.

    The first of `keys` that is in the object is used. If the object has none of them, the result is None.

    Raises:
        InputError: the file does not exist or is outside the folder.
    """
    files = metadata.get("files") or {}
    if not isinstance(files, dict):
        raise InputError(f"{METADATA}: files={files!r}: must be an object with file names")
    for key in keys:
        if (name := files.get(key)) is None:
            continue
        # A symbolic link may point outside, as in Hugging Face's cache: the owner of the folder created it. The name,
        # however, was downloaded and is not trusted.
        if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{METADATA}: files.{key}={name}: must be a path inside the folder")
        if not (path / name).is_file():
            raise InputError(f"{METADATA}: files.{key}={name}: there is no such file")
        return name
    return None


def map_tensors(path: Path) -> dict[str, Any]:
    """Map the tensors of a file into memory, without running any code that the file contains.

    Raises:
        InputError: the file is damaged, or contains objects other than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)", str(error))
        problem = f"holds more than tensors ({match[1] if match else 'or is damaged'}), and nothing of it was run"
        raise InputError(f"{path.name}: {problem}; get it again, or save its state dict alone") from error
    except Exception as error:  # a damaged file can raise anything
        reason = f"{path.stat().st_size:,} bytes; {' '.join(str(error).split())[:100]} …"
        raise InputError(f"{path.name}: is cut short, damaged or of another format; get it again ({reason})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path.name}: holds a {type(content).__name__}, not tensors by name")
    return {str(name): tensor for name, tensor in content.items()}


def _read_json(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((path / name).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{name}: holds a {type(content).__name__}, not an object with names")
    return content


def _num_embeddings(tensors: Mapping[str, Any]) -> int:
    """Return the number of rows of the embedding.

    If the embedding is missing, the result is 1, and the missing tensor is reported by another function.
    """
    embedding = tensors.get(EMBEDDING)
    return len(embedding) if isinstance(embedding, Tensor) and embedding.ndim == 2 and len(embedding) else 1


def _tensor_issues(folder: MetaFolder, found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Return issues of the tensors `found` in the files, with one line for each wrong tensor.

    Wrong numbers of heads or blocks are the first issues, because they may be the cause of the others.
    """
    prefixes = "layers.", "extra_heads."
    num_layers, num_extra = (len({n.split(".")[1] for n in found if n.startswith(prefix)}) for prefix in prefixes)
    counts = {
        "n_future_tokens": (num_extra + min(num_layers, 1), "heads"),
        "n_layers": (num_layers + num_extra, "blocks"),
    }
    issues = [
        f"{folder.config_file} has {key}={declared}, the file has {count} {unit}"
        for key, (count, unit) in counts.items()
        if count != (declared := getattr(folder.params, key))
    ]
    issues += [f"missing: {name}" for name in expected if name not in found]
    issues += [f"unexpected: {name}" for name in found if name not in expected]
    for name, shape in expected.items():
        if name not in found:
            continue
        tensor = found[name]
        if not _holds_floats(tensor):
            issues.append(f"mis-typed: {name} is {getattr(tensor, 'dtype', type(tensor).__name__)}, not dense floats")
        elif tuple(tensor.shape) != shape:
            issues.append(f"mis-shaped: {name} is {[*tensor.shape]}, {folder.config_file} needs {[*shape]}")
    return issues


def _holds_floats(value: object) -> bool:
    if not isinstance(value, Tensor) or value.is_meta:
        return False
    return value.layout is torch.strided and value.is_floating_point()
