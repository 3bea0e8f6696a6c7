"""Tensor formats of a checkpoint: full tensors that rank 0 writes, or shards that every rank writes."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wmtp.checkpoint.manifest import Entries, entries
from wmtp.checkpoint.state import Snapshot, Tensors, find_live_parameter
from wmtp.distributed.process_group import Processes
from wmtp.distributed.sharded_io import gather_full, read_shards, shard_like, write_shards
from wmtp.runtime.atomic_files import fsync_path

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
MODEL_PREFIX, OPTIMIZER_PREFIX = "model.", "optimizer."


def write_full(folder: Path, snapshot: Snapshot, processes: Processes) -> Entries:
    """Gather a snapshot's tensors on rank 0, write them there, and return the manifest entries of the files."""
    return _write(folder / MODEL, snapshot.model, processes) | _write(folder / OPTIMIZER, snapshot.optimizer, processes)


def read_full(folder: Path, like: Mapping[str, Tensor], *, optimizer: bool) -> tuple[Tensors, Tensors]:
    """Read the files of `write_full`. Return the tensors of the model, and with `optimizer` those of the optimizer.

    Args:
        folder: folder of the checkpoint.
        like: live parameters. A stored tensor of a sharded parameter is returned as this rank's shard.
        optimizer: read the optimizer's tensors, too.
    """
    return _read(folder / MODEL, like), _read(folder / OPTIMIZER, like) if optimizer else {}


def _write(path: Path, tensors: Tensors, processes: Processes) -> Entries:
    full = processes.run_on_all(lambda: gather_full(tensors, keep=processes.is_main))

    def _write_file() -> Entries:
        try:
            save_file(full, path)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error
        fsync_path(path)
        return entries([path])

    return processes.run_on_main(_write_file)


def _read(path: Path, like: Mapping[str, Tensor]) -> Tensors:
    with safe_open(path, framework="pt") as file:
        return {name: shard_like(file.get_tensor(name), find_live_parameter(name, like)) for name in file.keys()}  # noqa: SIM118


def write_sharded(folder: Path, snapshot: Snapshot, processes: Processes) -> Entries:
    """Write each rank's shards of a snapshot's tensors, and return the manifest entries of all files."""
    tensors = {MODEL_PREFIX + name: tensor for name, tensor in snapshot.model.items()}
    tensors |= {OPTIMIZER_PREFIX + name: tensor for name, tensor in snapshot.optimizer.items()}
    paths = write_shards(tensors, folder)

    def _sync() -> Entries:
        for path in paths:
            fsync_path(path)
        return entries(paths)

    merged: Entries = {}
    for rank_entries in processes.gather(processes.run_on_all(_sync)):
        merged |= rank_entries
    return merged


def read_sharded(folder: Path, like: Mapping[str, Tensor], *, optimizer: bool) -> tuple[Tensors, Tensors]:
    """Read the files of `write_sharded`. Arguments and result are those of `read_full`."""

    def _live(name: str) -> Tensor | None:
        prefix = MODEL_PREFIX if name.startswith(MODEL_PREFIX) else OPTIMIZER_PREFIX
        return find_live_parameter(name.removeprefix(prefix), like)

    tensors = read_shards(folder, lambda name: optimizer or name.startswith(MODEL_PREFIX), _live)

    def _select(prefix: str) -> Tensors:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    return _select(MODEL_PREFIX), _select(OPTIMIZER_PREFIX)
