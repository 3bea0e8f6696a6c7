"""Print the tables of docs/scaling.md: what a model takes on several GPUs, computed, not measured.

Without options it prints all of them; `--gpus 4 --memory 80` gives those of one machine.
"""

import argparse
from collections.abc import Sequence
from itertools import product

from wmtp.models.shapes import Layout
from wmtp.training.estimate import (
    GB,
    NODE_RING_BANDWIDTH,
    PEAK_FLOPS,
    RING_BANDWIDTH,
    UTILISATION,
    Machine,
    Setting,
    flops_per_token,
    memory,
    speed,
    traffic,
)

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
YES = ("no", "yes")
DESCRIPTION = ("GPUs", "strategy", "recompute", "reduce each", "micro-batch")
SIZES = ("dim", "num_layers", "num_heads", "num_attention_heads", "hidden_dim", "vocab_size")
"""What can be asked for of a model."""

# assumed
USABLE_MEMORY = 0.9
"""Of the nominal size; the rest is for CUDA, NCCL and fragments."""
DEVICE_TO_HOST = 5 * GB
NETWORK = 1.25 * GB
DISKS = (1 * GB, 2 * GB, 5 * GB)
TIME_FOR_SAVING = 0.02

# measured on CPU
HASH_BANDWIDTH = 1.57 * GB
"""SHA-256 of a file by one core."""


def fits(layout: Layout, machine: Machine, setting: Setting) -> bool:
    """Whether one GPU holds it."""
    return memory(layout, machine, setting)["total"] <= USABLE_MEMORY * machine.memory * GB


def checkpoint_seconds(layout: Layout, gpus: int, disk: float, sharded: bool) -> float:
    """Seconds that training waits: from the GPU, to a disk or file system shared by all, and the hash."""
    size, writers = 12 * layout.parameters, gpus if sharded else 1
    return size / (writers * DEVICE_TO_HOST) + size / disk + size / (writers * HASH_BANDWIDTH)


def candidates(layout: Layout, machine: Machine) -> list[Setting]:
    """Each way to set things up with the largest micro-batch that fits, or with 1 where none does."""
    found = [Setting("ddp", True, False, 1)]
    for recompute, each in product((True, False), (True, False)):
        sizes = [size for size in MICRO_BATCH_SIZES if size * machine.processes <= machine.batch_size] or [1]
        settings = [Setting("fsdp", recompute, each, size) for size in sizes]
        setting = max((s for s in settings if fits(layout, machine, s)), default=settings[0])
        if each or machine.micro_batches(setting) > 1:
            found.append(setting)
    return found


def best(layout: Layout, machine: Machine) -> Setting | None:
    """The candidate that fits and is fastest where things go badly."""
    fitting = [setting for setting in candidates(layout, machine) if fits(layout, machine, setting)]
    return max(fitting, key=lambda setting: speed(layout, machine, setting).slow, default=None)


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def described(machine: Machine, setting: Setting) -> list[object]:
    """The first cells of a row."""
    flags = [YES[setting.activation_checkpointing], YES[setting.reduce_each_micro_batch]]
    return [f"{machine.processes} × {machine.memory:g} GB", setting.strategy, *flags, setting.micro_batch_size]


def memory_table(layout: Layout, machines: list[Machine]) -> str:
    """GB of one GPU."""
    parts = ("parameters", "gradients", "optimizer", "activations", "loss", "work", "total")
    rows = []
    for machine in machines:
        for setting in candidates(layout, machine):
            found = memory(layout, machine, setting)
            sizes = [f"{found[part] / GB:.1f}" for part in parts]
            rows.append([*described(machine, setting), *sizes, YES[fits(layout, machine, setting)]])
    return table([*DESCRIPTION, *parts, "fits"], rows)


def speed_table(layout: Layout, machines: list[Machine]) -> str:
    """Bytes and seconds of an update, for the settings that fit; the best in bold."""
    rows = []
    for machine in machines:
        for setting in candidates(layout, machine):
            if not fits(layout, machine, setting):
                continue
            count, found = machine.micro_batches(setting), speed(layout, machine, setting)
            gathered, reduced = traffic(layout, machine.processes, setting, count)
            model, _ = flops_per_token(layout, machine.sequence)
            rates = f"{found.slow:,.0f} – {found.fast:,.0f}"
            used = [100 * model * rate / machine.processes / PEAK_FLOPS for rate in (found.slow, found.fast)]
            products = f"{found.peak_seconds / UTILISATION[1]:.1f} – {found.peak_seconds / UTILISATION[0]:.1f}"
            rows.append([
                *described(machine, setting), count, f"{gathered / GB:.0f}", f"{reduced / GB:.0f}", products,
                f"{found.traffic_seconds:.2f}", f"**{rates}**" if setting == best(layout, machine) else rates,
                f"{used[0]:.0f} – {used[1]:.0f}",
            ])  # fmt: skip
    figures = ["forwards", "GB gathered", "GB reduced", "s products", "s traffic", "tokens/s", "MFU %"]
    return table([*DESCRIPTION, *figures], rows)


def checkpoint_table(layout: Layout, machines: list[Machine]) -> str:
    """Seconds that training waits for a save and minutes between saves, for each speed of the disk."""
    rows = []
    for gpus, sharded in product(sorted({machine.processes for machine in machines}), (False, True)):
        seconds = [checkpoint_seconds(layout, gpus, disk, sharded) for disk in DISKS]
        cells = [f"{second:.0f} s, {second / TIME_FOR_SAVING / 60:.0f} min" for second in seconds]
        size = 12 * layout.parameters
        rows.append([gpus, "sharded" if sharded else "whole", f"{size / GB:.1f}", *cells, f"{size / NETWORK:.0f} s"])
    disks = [f"disk {disk / GB:.0f} GB/s" for disk in DISKS]
    return table(["GPUs", "checkpoint", "GB", *disks, "upload 10 Gb/s"], rows)


def node_table(layout: Layout) -> str:
    """Seconds of traffic of an update on eight nodes of eight: sharding over all GPUs, or within a node."""
    setting = Setting("fsdp", False, True, 1)
    rows = []
    for cards, forwards in product((8, 1), (1, 4)):
        wire = NODE_RING_BANDWIDTH * cards / 8
        inside = sum(traffic(layout, 8, setting, forwards)) / RING_BANDWIDTH
        # each GPU of a node reduces its eighth over the nodes, once; together they share the node's network
        between = traffic(layout, 8, Setting("ddp", False, False, 1), 1)[1] / wire
        over_all = sum(traffic(layout, 64, setting, forwards)) / wire
        rows.append([f"{cards} × 200 Gb/s", forwards, f"{over_all:.2f}", f"{inside + between:.2f}"])
    return table(["network of a node", "forwards", "s, sharded over 64", "s, sharded within nodes"], rows)


def tables(layout: Layout, machines: list[Machine]) -> list[str]:
    """Everything, in the page's order."""
    nodes = [node_table(layout)] if any(machine.processes == 64 for machine in machines) else []
    return [speed_table(layout, machines), memory_table(layout, machines), *nodes, checkpoint_table(layout, machines)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, help="number of A100s; all machines of the page without it")
    parser.add_argument("--memory", type=float, default=80, help="nominal GB of a GPU")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--batch-size", type=int, default=256, help="samples of an update, over all GPUs")
    parser.add_argument("--ring", type=float, help="GB/s of a ring, per GPU; default: NVLink's, or the network's")
    for name in SIZES:
        value = getattr(Layout(), name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"of the model: {value}")
    options = parser.parse_args()
    layout = Layout(**{name: getattr(options, name) for name in SIZES})
    shapes = [(options.gpus, options.memory)] if options.gpus else [(4, 40), (4, 80), (64, 80)]
    ring = options.ring and options.ring * GB
    machines = [Machine(gpus, memory, options.sequence, options.batch_size, ring) for gpus, memory in shapes]
    print("\n\n".join(tables(layout, machines)))


if __name__ == "__main__":
    main()
