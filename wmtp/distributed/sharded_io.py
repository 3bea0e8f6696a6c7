"""Gather, shard, write and read tensors that are sharded over the ranks (DTensor).

The package torch.distributed.checkpoint writes the shards. By default, it writes the index of the shards as a pickle,
which can execute code when it is loaded. This module writes the index as JSON instead, so that only tensors are
unpickled.
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


def gather_full(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Gather tensors that may be sharded, and return full copies of them on the CPU.

    All ranks must call this with tensors of the same names. On a rank where `keep` is False, the result is empty. The
    tensors are gathered one at a time, so that no device holds more than one full copy.
    """
    kept: dict[str, Tensor] = {}
    problem: Exception | None = None
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        try:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if keep and problem is None:
                kept[name] = full.to("cpu", copy=True).contiguous()
        except Exception as error:  # noqa: BLE001 - raised below, because the other ranks still need this rank's shards
            problem = error
    if problem is not None:
        raise problem
    return kept


def is_shard_of(tensor: Tensor | None, shape: torch.Size) -> bool:
    """Return whether a tensor is sharded and the shape of the full tensor is `shape`."""
    return isinstance(tensor, DTensor) and tensor.shape == shape


def shard_like(tensor: Tensor, like: Tensor | None) -> Tensor:
    """Return this rank's shard of a full tensor, if `like` is a sharded tensor with the same full shape.

    Otherwise return `tensor` unchanged.
    """
    if isinstance(tensor, DTensor) or not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    (chunk,) = like.__create_chunk_list__()  # type: ignore[no-untyped-call]
    shard = tensor.detach()[tuple(slice(o, o + s) for o, s in zip(chunk.offsets, chunk.sizes, strict=True))]
    local = torch.empty(shard.shape, dtype=tensor.dtype, device=like.to_local().device).copy_(shard)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@dataclass(frozen=True)
class ShardEntry:
    """The position of a shard in the full tensor (`offsets`, `sizes`) and in a file.

    In the file, the shard occupies `length` bytes from the byte position `start`.
    """

    offsets: list[int]
    sizes: list[int]
    file: str
    start: int
    length: int


def write_shards(tensors: Mapping[str, Tensor], folder: Path) -> list[Path]:
    """Write this rank's shards to a file. The main process also writes the index of the shards of all ranks.

    All ranks must call this function. It does not sync the file of shards to the disk.

    Returns:
        The paths of the files that this rank has written.

    Raises:
        OtherProcessFailed: another rank could not write its shards.
    """
    writer = _Writer(folder, sync_files=False)
    is_single = not dist.is_initialized()
    rank = 0 if is_single else dist.get_rank()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        try:
            save({name: tensor.detach() for name, tensor in tensors.items()}, storage_writer=writer, no_dist=is_single)
        except CheckpointException as error:
            raise _original_error(error, rank) from error
    return [*folder.glob(f"__{rank}_*.distcp"), *([folder / INDEX] if rank == 0 else [])]


def read_shards(
    folder: Path, should_read: Callable[[str], bool], like: Callable[[str], Tensor | None]
) -> dict[str, Tensor]:
    """Read tensors from the files that `write_shards` wrote, without communication between the ranks.

    The number of ranks may differ from the number of ranks that wrote the files.

    Args:
        folder: folder of the files. Their hashes must have been verified before.
        should_read: returns whether to read the tensor with the given name.
        like: returns the tensor in memory that corresponds to the given name, or None. If that tensor is sharded and
            has the same full shape as the stored one, this function returns the stored tensor sharded in the same way.
            Otherwise it returns the full tensor on the CPU.
    """
    tensors: dict[str, Tensor] = {}
    for name, stored in _read_index(folder).state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        if should_read(name):
            live, dtype = like(name), stored.properties.dtype
            if is_shard_of(live, stored.size):
                assert live is not None
                tensors[name] = torch.empty_like(live.detach(), dtype=dtype, requires_grad=False)
            else:
                tensors[name] = torch.empty(stored.size, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is", category=UserWarning)
        try:
            load(tensors, storage_reader=_Reader(folder), no_dist=True)
        except CheckpointException as error:
            raise _original_error(error, 0) from error
    return tensors


class _Writer(FileSystemWriter):
    """A version of torch's writer that writes the index as JSON and raises the original errors of the file system."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shards. If an OSError caused the error that torch raises, raise an OSError instead."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None:  # the message of torch's archive is only "unexpected pos"
                if isinstance(cause, OSError):
                    raise OSError(cause.errno, cause.strerror, str(self.path)) from error
                cause = cause.__context__
            raise

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index, which contains the positions of the shards of all ranks."""
        locations = {result.index: result.storage_data for rank_results in results for result in rank_results}
        index: dict[str, Any] = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            parts = []
            for chunk in stored.chunks:
                info = locations[MetadataIndex(name, chunk.offsets)]
                parts.append(
                    asdict(ShardEntry([*chunk.offsets], [*chunk.sizes], info.relative_path, info.offset, info.length))
                )
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            index[name] = {"dtype": dtype, "shape": list(stored.size), "parts": parts}
        write_synced(Path(self.path) / INDEX, encode_json(index))


class _Reader(FileSystemReader):
    """A version of torch's reader that reads the index as JSON."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index, and return it as an object of torch's class `Metadata`."""
        return _read_index(Path(self.path))


def _read_index(folder: Path) -> Metadata:
    tensors: dict[str, Any] = {}
    locations: dict[MetadataIndex, _StorageInfo] = {}
    for name, entry in json.loads((folder / INDEX).read_bytes()).items():
        chunks = []
        for shard in (ShardEntry(**part) for part in entry["parts"]):
            chunks.append(ChunkStorageMetadata(torch.Size(shard.offsets), torch.Size(shard.sizes)))
            locations[MetadataIndex(name, shard.offsets)] = _StorageInfo(shard.file, shard.start, shard.length)
            if Path(shard.file).name != shard.file:
                raise ValueError(f"{INDEX} names a file outside the checkpoint: {shard.file}")
        dtype = getattr(torch, entry["dtype"])
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{INDEX}: {entry['dtype']} is not a data type")
        tensors[name] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(entry["shape"]), chunks)
    return Metadata(tensors, storage_data=locations, storage_meta=StorageMeta())


def _original_error(error: CheckpointException, rank: int) -> BaseException:
    """Return the original error that a CheckpointException contains.

    This is the error of this rank. If this rank had no error, it is an `OtherProcessFailed` for the lowest rank that
    failed.
    """
    if rank in error.failures:
        return error.failures[rank][0]
    other, (problem, _) = min(error.failures.items(), key=lambda item: item[0])
    return OtherProcessFailed(other, str(problem) or type(problem).__name__, getattr(problem, "exit_code", 1))
