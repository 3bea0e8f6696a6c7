"""Print the tables of docs/scaling.md: memory and time of a model on several GPUs, calculated, not measured.

Without options, it prints the tables of all machines of the page. Options such as `--gpus 4 --memory 80` select one
machine.
"""

import argparse
from collections.abc import Sequence
from itertools import product

from wmtp.models.shapes import ModelShape
from wmtp.training.estimate.memory import GB, ParallelSetting, memory
from wmtp.training.estimate.speed import (
    NODE_RING_BANDWIDTH,
    PEAK_FLOPS,
    RING_BANDWIDTH,
    UTILIZATION,
    Cluster,
    flops_per_token,
    speed,
    traffic,
)

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
YES = ("no", "yes")
DESCRIPTION = ("GPUs", "strategy", "recompute", "reduce each", "micro-batch")
SIZES = ("dim", "num_layers", "num_heads", "num_attention_heads", "hidden_dim", "vocab_size")
"""Sizes of the model that have an option."""

MACHINES = [(4, 40.0), (4, 80.0), (64, 80.0)]
"""Number of GPUs and nominal GB of each, for the tables of docs/scaling.md."""

# assumed
USABLE_MEMORY = 0.9
"""Usable share of the nominal memory; the rest is for CUDA, NCCL and fragmentation."""
DEVICE_TO_HOST = 5 * GB
NETWORK = 1.25 * GB
DISKS = (1 * GB, 2 * GB, 5 * GB)
TIME_FOR_SAVING = 0.02

# measured on CPU
HASH_BANDWIDTH = 1.57 * GB
"""SHA-256 of a file by one core."""


def fits(shape: ModelShape, machine: Cluster, setting: ParallelSetting) -> bool:
    """Return whether the training fits in the memory of one GPU."""
    return memory(shape, machine, setting)["total"] <= USABLE_MEMORY * machine.memory * GB


def checkpoint_seconds(shape: ModelShape, gpus: int, disk: float, sharded: bool) -> float:
    """Return the seconds that training waits for a save: copying from the GPU, writing to the shared disk, hashing."""
    size, writers = 12 * shape.parameters, gpus if sharded else 1
    return size / (writers * DEVICE_TO_HOST) + size / disk + size / (writers * HASH_BANDWIDTH)


def candidates(shape: ModelShape, machine: Cluster) -> list[ParallelSetting]:
    """Return the settings to compare, each with the largest micro-batch that fits, or with 1 if none fits."""
    found = [ParallelSetting("ddp", True, False, 1)]
    for recompute, each in product((True, False), (True, False)):
        sizes = [size for size in MICRO_BATCH_SIZES if size * machine.processes <= machine.batch_size] or [1]
        settings = [ParallelSetting("fsdp", recompute, each, size) for size in sizes]
        setting = max((s for s in settings if fits(shape, machine, s)), default=settings[0])
        if each or machine.micro_batches(setting) > 1:
            found.append(setting)
    return found


def best(shape: ModelShape, machine: Cluster) -> ParallelSetting | None:
    """Return the candidate that fits and has the highest speed at its slow end; None if none fits."""
    fitting = [setting for setting in candidates(shape, machine) if fits(shape, machine, setting)]
    return max(fitting, key=lambda setting: speed(shape, machine, setting).slow, default=None)


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def setting_cells(machine: Cluster, setting: ParallelSetting) -> list[object]:
    """Return the first cells of a row: the machine and the setting."""
    flags = [YES[setting.activation_checkpointing], YES[setting.reduce_each_micro_batch]]
    return [f"{machine.processes} × {machine.memory:g} GB", setting.strategy, *flags, setting.micro_batch_size]


def memory_table(shape: ModelShape, machines: list[Cluster]) -> str:
    """Return the table of the memory of one GPU, in GB."""
    parts = ("parameters", "gradients", "optimizer", "activations", "loss", "work", "total")
    rows = []
    for machine in machines:
        for setting in candidates(shape, machine):
            found = memory(shape, machine, setting)
            sizes = [f"{found[part] / GB:.1f}" for part in parts]
            rows.append([*setting_cells(machine, setting), *sizes, YES[fits(shape, machine, setting)]])
    return table([*DESCRIPTION, *parts, "fits"], rows)


def speed_table(shape: ModelShape, machines: list[Cluster]) -> str:
    """Return the table of bytes and seconds of an update, for settings that fit; the best in bold."""
    rows = []
    for machine in machines:
        for setting in candidates(shape, machine):
            if not fits(shape, machine, setting):
                continue
            count, found = machine.micro_batches(setting), speed(shape, machine, setting)
            gathered, reduced = traffic(shape, machine.processes, setting, count)
            model, _ = flops_per_token(shape, machine.sequence)
            rates = f"{found.slow:,.0f} – {found.fast:,.0f}"
            used = [100 * model * rate / machine.processes / PEAK_FLOPS for rate in (found.slow, found.fast)]
            products = f"{found.peak_seconds / UTILIZATION[1]:.1f} – {found.peak_seconds / UTILIZATION[0]:.1f}"
            rows.append([
                *setting_cells(machine, setting), count, f"{gathered / GB:.0f}", f"{reduced / GB:.0f}", products,
                f"{found.traffic_seconds:.2f}", f"**{rates}**" if setting == best(shape, machine) else rates,
                f"{used[0]:.0f} – {used[1]:.0f}",
            ])  # fmt: skip
    figures = ["forwards", "GB gathered", "GB reduced", "s products", "s traffic", "tokens/s", "MFU %"]
    return table([*DESCRIPTION, *figures], rows)


def checkpoint_table(shape: ModelShape, machines: list[Cluster]) -> str:
    """Return the table of seconds per save and minutes between saves, for each disk speed."""
    rows = []
    for gpus, sharded in product(sorted({machine.processes for machine in machines}), (False, True)):
        seconds = [checkpoint_seconds(shape, gpus, disk, sharded) for disk in DISKS]
        cells = [f"{second:.0f} s, {second / TIME_FOR_SAVING / 60:.0f} min" for second in seconds]
        size = 12 * shape.parameters
        rows.append([gpus, "sharded" if sharded else "whole", f"{size / GB:.1f}", *cells, f"{size / NETWORK:.0f} s"])
    disks = [f"disk {disk / GB:.0f} GB/s" for disk in DISKS]
    return table(["GPUs", "checkpoint", "GB", *disks, "upload 10 Gb/s"], rows)


def node_table(shape: ModelShape) -> str:
    """Return the table of an update's traffic in seconds on 8 nodes of 8 GPUs: sharded over all, or within nodes."""
    setting = ParallelSetting("fsdp", False, True, 1)
    rows = []
    for cards, forwards in product((8, 1), (1, 4)):
        wire = NODE_RING_BANDWIDTH * cards / 8
        inside = sum(traffic(shape, 8, setting, forwards)) / RING_BANDWIDTH
        # each GPU of a node reduces an eighth of the gradients over the nodes, once; its GPUs share the node's network
        between = traffic(shape, 8, ParallelSetting("ddp", False, False, 1), 1)[1] / wire
        over_all = sum(traffic(shape, 64, setting, forwards)) / wire
        rows.append([f"{cards} × 200 Gb/s", forwards, f"{over_all:.2f}", f"{inside + between:.2f}"])
    return table(["network of a node", "forwards", "s, sharded over 64", "s, sharded within nodes"], rows)


def tables(shape: ModelShape, machines: list[Cluster]) -> list[str]:
    """Return all tables, in the order of the page."""
    nodes = [node_table(shape)] if any(machine.processes == 64 for machine in machines) else []
    return [speed_table(shape, machines), memory_table(shape, machines), *nodes, checkpoint_table(shape, machines)]


def default_tables() -> list[str]:
    """Return the tables of docs/scaling.md."""
    return tables(ModelShape(), [Cluster(gpus, memory=memory) for gpus, memory in MACHINES])


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, help="number of A100s; default: all machines of the page")
    parser.add_argument("--memory", type=float, default=80, help="nominal GB of a GPU")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens per sample")
    parser.add_argument("--batch-size", type=int, default=256, help="samples per update, in total over all GPUs")
    parser.add_argument("--ring", type=float, help="GB/s of a ring, per GPU; default: NVLink, or the network")
    for name in SIZES:
        value = getattr(ModelShape(), name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=value, help=f"default: {value}, as in the 7B model"
        )
    options = parser.parse_args()
    shape = ModelShape(**{name: getattr(options, name) for name in SIZES})
    shapes = [(options.gpus, options.memory)] if options.gpus else MACHINES
    ring = options.ring and options.ring * GB
    machines = [
        Cluster(gpus, options.sequence, options.batch_size, memory=memory, ring=ring) for gpus, memory in shapes
    ]
    print("\n\n".join(tables(shape, machines)))


if __name__ == "__main__":
    main()
