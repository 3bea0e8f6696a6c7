"""Write and read the tensors of a checkpoint. Either rank 0 writes full tensors, or every rank writes its shards."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wmtp.checkpoint.manifest import Entries, entries
from wmtp.checkpoint.state import Snapshot, Tensors, find_live_parameter
from wmtp.distributed.process_group import Processes
from wmtp.distributed.sharded_io import gather_full, read_shards, shard_like, write_shards
from wmtp.runtime.atomic_files import fsync_path, share_like_folder

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
MODEL_PREFIX, OPTIMIZER_PREFIX = "model.", "optimizer."


def write_full(folder: Path, snapshot: Snapshot, processes: Processes) -> Entries:
    """Gather a snapshot's tensors on rank 0, which writes them to files. Return the manifest entries of these files."""
    return _write(folder / MODEL, snapshot.model, processes) | _write(folder / OPTIMIZER, snapshot.optimizer, processes)


def read_full(folder: Path, like: Mapping[str, Tensor], *, optimizer: bool) -> tuple[Tensors, Tensors]:
    """Read the files that `write_full` wrote. Return the tensors of the model and the tensors of the optimizer.

    Args:
        folder: folder of the checkpoint.
        like: parameters of the model in memory, by name. If one of them is sharded, its stored tensors are returned
            as this rank's shards.
        optimizer: True to read the tensors of the optimizer. If it is False, the second result is empty.
    """
    return _read(folder / MODEL, like), _read(folder / OPTIMIZER, like) if optimizer else {}


def _write(path: Path, tensors: Tensors, processes: Processes) -> Entries:
    full = processes.run_on_all(lambda: gather_full(tensors, keep=processes.is_main))

    def _write_file() -> Entries:
        """Write the tensors to the file, and return its manifest entries."""
        try:
            save_file(full, path)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error
        share_like_folder(path)
        fsync_path(path)
        return entries([path])

    return processes.run_on_main(_write_file)


def _read(path: Path, like: Mapping[str, Tensor]) -> Tensors:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: shard_like(file.get_tensor(name), find_live_parameter(name, like)) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a safetensors file: {error}") from error


def write_sharded(folder: Path, snapshot: Snapshot, processes: Processes) -> Entries:
    """Write this rank's shards of a snapshot's tensors. Return the manifest entries of the files of all ranks."""
    tensors = {MODEL_PREFIX + name: tensor for name, tensor in snapshot.model.items()}
    tensors |= {OPTIMIZER_PREFIX + name: tensor for name, tensor in snapshot.optimizer.items()}
    paths = write_shards(tensors, folder)

    def _sync() -> Entries:
        """Sync the shards to disk, and return their manifest entries."""
        for path in paths:
            fsync_path(path)
        return entries(paths)

    merged: Entries = {}
    for rank_entries in processes.gather(processes.run_on_all(_sync)):
        merged |= rank_entries
    return merged


def read_sharded(folder: Path, like: Mapping[str, Tensor], *, optimizer: bool) -> tuple[Tensors, Tensors]:
    """Read the files that `write_sharded` wrote. The arguments and the result are the same as those of `read_full`."""

    def _live(name: str) -> Tensor | None:
        """Return the parameter of the model that corresponds to a stored tensor."""
        prefix = MODEL_PREFIX if name.startswith(MODEL_PREFIX) else OPTIMIZER_PREFIX
        return find_live_parameter(name.removeprefix(prefix), like)

    tensors = read_shards(folder, lambda name: optimizer or name.startswith(MODEL_PREFIX), _live)

    def _select(prefix: str) -> Tensors:
        """Return the tensors whose names start with the prefix, without the prefix in their names."""
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    return _select(MODEL_PREFIX), _select(OPTIMIZER_PREFIX)
