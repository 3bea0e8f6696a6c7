"""Tensors in parts, written by the processes that hold them; saving and resuming gather nothing."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from wmtp.checkpoint.manifest import Entries, entries
from wmtp.checkpoint.state import Snapshot, Tensors, live_counterpart
from wmtp.runtime.distributed import Processes
from wmtp.runtime.files import sync
from wmtp.runtime.sharding import INDEX, read_parts, write_parts

__all__ = ["INDEX", "read", "write"]
MODEL, OPTIMIZER = "model.", "optimizer."


def write(folder: Path, snapshot: Snapshot, processes: Processes) -> Entries:
    """Write every process's parts of a snapshot's tensors; returns the manifest entries of all files."""
    tensors = {MODEL + name: tensor for name, tensor in snapshot.model.items()}
    tensors |= {OPTIMIZER + name: tensor for name, tensor in snapshot.optimizer.items()}
    own = write_parts(tensors, folder)

    def synced() -> Entries:
        for path in own:
            sync(path)
        return entries(own)

    of_all: Entries = {}
    for of_one in processes.gather(processes.together(synced)):
        of_all |= of_one
    return of_all


def read(folder: Path, like: Mapping[str, Tensor], *, optimizer: bool) -> tuple[Tensors, Tensors]:
    """The model's tensors, and the optimizer's if they are asked for."""

    def live(name: str) -> Tensor | None:
        return live_counterpart(name.removeprefix(MODEL if name.startswith(MODEL) else OPTIMIZER), like)

    tensors = read_parts(folder, lambda name: optimizer or name.startswith(MODEL), live)

    def of(prefix: str) -> Tensors:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    return of(MODEL), of(OPTIMIZER)
