"""Tensors in whole, written by the main process: one safetensors file for the model, one for the optimizer."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wmtp.checkpoint.manifest import Entries, entries
from wmtp.checkpoint.state import Snapshot, Tensors, live_counterpart
from wmtp.runtime.distributed import Processes
from wmtp.runtime.files import sync
from wmtp.runtime.sharding import cut_like, gathered

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


def write(folder: Path, snapshot: Snapshot, processes: Processes) -> Entries:
    """Gather a snapshot's tensors in the main process, which writes them; returns the files' manifest entries."""
    return _write(folder / MODEL, snapshot.model, processes) | _write(folder / OPTIMIZER, snapshot.optimizer, processes)


def read(folder: Path, like: Mapping[str, Tensor], *, optimizer: bool) -> tuple[Tensors, Tensors]:
    """The model's tensors, and the optimizer's if they are asked for, mapped into memory rather than read."""
    return _read(folder / MODEL, like), _read(folder / OPTIMIZER, like) if optimizer else {}


def _write(path: Path, tensors: Tensors, processes: Processes) -> Entries:
    whole = processes.together(lambda: gathered(tensors, keep=processes.is_main))

    def written() -> Entries:
        try:
            save_file(whole, path)
        except SafetensorError as error:
            raise OSError(f"{path}: cannot be written: {error}") from error
        sync(path)
        return entries([path])

    return processes.from_main(written)


def _read(path: Path, like: Mapping[str, Tensor]) -> Tensors:
    with safe_open(path, framework="pt") as file:
        return {name: cut_like(file.get_tensor(name), live_counterpart(name, like)) for name in file.keys()}  # noqa: SIM118
