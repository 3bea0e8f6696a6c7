"""Tensors of which every process holds a part: gathering them, cutting them out, writing and reading the parts.

The parts are written by torch's distributed checkpoint. Its own index of them is a pickle, which runs what it
holds when it is read; here the index is JSON, so that nothing on disk is ever unpickled but tensors.
"""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from wmtp.distributed.process_group import OtherProcessFailed
from wmtp.runtime.atomic_files import encode_json, write_synced

INDEX = "shards.json"


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole copies on the CPU of tensors that may be spread over the processes; none where they are not to be kept.

    Must be called by all processes with tensors of the same names. One tensor at a time is whole on the device.
    """
    kept: dict[str, Tensor] = {}
    problem: Exception | None = None
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        try:
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep and problem is None:
                kept[name] = whole.to("cpu", copy=True).contiguous()
        except Exception as error:  # noqa: BLE001 - raised below: the others wait for this process's part of the rest
            problem = error
    if problem is not None:
        raise problem
    return kept


def is_part_of(tensor: Tensor | None, shape: torch.Size) -> bool:
    """Whether a live tensor is spread over the processes and has this shape when it is whole."""
    return isinstance(tensor, DTensor) and tensor.shape == shape


def cut_like(tensor: Tensor, like: Tensor | None) -> Tensor:
    """This process's part of a whole tensor, where `like` is spread over the processes; else the tensor itself."""
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    (chunk,) = like.__create_chunk_list__()  # type: ignore[no-untyped-call]
    part = tensor.detach()[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))]
    local = torch.empty(part.shape, dtype=tensor.dtype, device=like.to_local().device).copy_(part)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@dataclass(frozen=True)
class Part:
    """Where a piece of a tensor lies in its whole, and its bytes in a file."""

    offsets: list[int]
    sizes: list[int]
    file: str
    start: int
    length: int


def write_parts(tensors: Mapping[str, Tensor], folder: Path) -> list[Path]:
    """Write this process's parts of the tensors into one file, and as the main process their index; returns the files.

    Must be called by all processes. The parts are not synced to the disk yet.

    Raises:
        OtherProcessFailed: another process could not write its parts.
    """
    writer = _Writer(folder, sync_files=False)
    alone = not dist.is_initialized()
    rank = 0 if alone else dist.get_rank()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        try:
            save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer, no_dist=alone)
        except CheckpointException as error:
            raise _failure_of(error, rank) from error
    return [*folder.glob(f"__{rank}_*.distcp"), *([folder / INDEX] if rank == 0 else [])]


def read_parts(folder: Path, wanted: Callable[[str], bool], like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
    """The wanted tensors by name, from any number of processes' parts.

    A tensor comes spread over the processes like the one that `like` names for it, if that has its shape; else
    whole, on the CPU. No process waits for another. The files must be verified.
    """
    tensors: dict[str, Tensor] = {}
    for name, stored in _read_index(folder).state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        if wanted(name):
            model, dtype = like(name), stored.properties.dtype
            if is_part_of(model, stored.size):
                assert model is not None
                tensors[name] = torch.empty_like(model.detach(), dtype=dtype, requires_grad=False)
            else:
                tensors[name] = torch.empty(stored.size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        try:
            load(tensors, storage_reader=_Reader(folder), no_dist=True)
        except CheckpointException as error:
            raise _failure_of(error, 0) from error
    return tensors


class _Writer(FileSystemWriter):
    """Writes the index as JSON, and says what the disk said."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None:  # torch's archive only says that a position is unexpected
                if isinstance(cause, OSError):
                    raise OSError(cause.errno, cause.strerror, str(self.path)) from error
                cause = cause.__context__
            raise

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        where = {result.index: result.storage_data for of_rank in results for result in of_rank}
        index: dict[str, Any] = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            parts = []
            for chunk in stored.chunks:
                info = where[MetadataIndex(name, chunk.offsets)]
                parts.append(
                    asdict(Part([*chunk.offsets], [*chunk.sizes], info.relative_path, info.offset, info.length))
                )
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            index[name] = {"dtype": dtype, "shape": list(stored.size), "parts": parts}
        write_synced(Path(self.path) / INDEX, encode_json(index))


class _Reader(FileSystemReader):
    """Reads the index as JSON."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return _read_index(Path(self.path))


def _read_index(folder: Path) -> Metadata:
    tensors: dict[str, Any] = {}
    where: dict[MetadataIndex, _StorageInfo] = {}
    for name, entry in json.loads((folder / INDEX).read_bytes()).items():
        chunks = []
        for part in (Part(**part) for part in entry["parts"]):
            chunks.append(ChunkStorageMetadata(torch.Size(part.offsets), torch.Size(part.sizes)))
            where[MetadataIndex(name, part.offsets)] = _StorageInfo(part.file, part.start, part.length)
        dtype = getattr(torch, entry["dtype"])
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry["shape"]), chunks)
    return Metadata(tensors, storage_data=where, storage_meta=StorageMeta())


def _failure_of(error: CheckpointException, rank: int) -> BaseException:
    """What went wrong in this process or, if nothing did, in another one."""
    if rank in error.failures:
        return error.failures[rank][0]
    other, (problem, _) = min(error.failures.items(), key=lambda item: item[0])
    return OtherProcessFailed(other, str(problem) or type(problem).__name__, getattr(problem, "exit_code", 1))
