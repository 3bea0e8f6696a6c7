"""The two formats of a checkpoint's tensors: full, written by the main process, or sharded, each process its own."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wmtp.checkpoint.manifest import Entries, entries
from wmtp.checkpoint.state import Snapshot, Tensors, live_counterpart
from wmtp.distributed.process_group import Processes
from wmtp.distributed.sharded_io import cut_like, gathered, read_parts, write_parts
from wmtp.runtime.atomic_files import sync

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"


def write_full(folder: Path, snapshot: Snapshot, processes: Processes) -> Entries:
    """Gather a snapshot's tensors in the main process, which writes them; returns the files' manifest entries."""
    return _write(folder / MODEL, snapshot.model, processes) | _write(folder / OPTIMIZER, snapshot.optimizer, processes)


def read_full(folder: Path, like: Mapping[str, Tensor], *, optimizer: bool) -> tuple[Tensors, Tensors]:
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


MODEL_PREFIX, OPTIMIZER_PREFIX = "model.", "optimizer."


def write_sharded(folder: Path, snapshot: Snapshot, processes: Processes) -> Entries:
    """Write every process's parts of a snapshot's tensors; returns the manifest entries of all files."""
    tensors = {MODEL_PREFIX + name: tensor for name, tensor in snapshot.model.items()}
    tensors |= {OPTIMIZER_PREFIX + name: tensor for name, tensor in snapshot.optimizer.items()}
    own = write_parts(tensors, folder)

    def synced() -> Entries:
        for path in own:
            sync(path)
        return entries(own)

    of_all: Entries = {}
    for of_one in processes.gather(processes.together(synced)):
        of_all |= of_one
    return of_all


def read_sharded(folder: Path, like: Mapping[str, Tensor], *, optimizer: bool) -> tuple[Tensors, Tensors]:
    """The model's tensors, and the optimizer's if they are asked for."""

    def live(name: str) -> Tensor | None:
        return live_counterpart(
            name.removeprefix(MODEL_PREFIX if name.startswith(MODEL_PREFIX) else OPTIMIZER_PREFIX), like
        )

    tensors = read_parts(folder, lambda name: optimizer or name.startswith(MODEL_PREFIX), live)

    def of(prefix: str) -> Tensors:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    return of(MODEL_PREFIX), of(OPTIMIZER_PREFIX)
