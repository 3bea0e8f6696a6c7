"""Print the tables of docs/scaling.md: what a model takes on several GPUs, computed, not measured.

Without options it prints all of them; `--gpus 4 --memory 80` gives those of one machine.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

GB = 1e9
MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
YES = ("no", "yes")
DESCRIPTION = ("GPUs", "strategy", "recompute", "reduce each", "micro-batch")

# A100, published
PEAK_FLOPS = 312e12
MEMORY_BANDWIDTH = 1.555e12
RING_BANDWIDTH = 200 * GB
"""Bytes per second and GPU of a ring over NVLink 3, as nccl-tests reports it ("busbw")."""

# assumed
USABLE_MEMORY = 0.9
"""Of the nominal size; the rest is for CUDA, NCCL and fragments."""
NODE_RING_BANDWIDTH = 160 * GB
"""The same over nodes of eight GPUs with a 200 Gb/s card each: 80 % of 8 · 25 GB/s, since rings use every card."""
UTILISATION = (0.40, 0.65)
"""Share of the peak that all products reach, recomputed ones too: slow and fast."""
DEVICE_TO_HOST = 5 * GB
NETWORK = 1.25 * GB
DISKS = (1 * GB, 2 * GB, 5 * GB)

# measured on CPU
HASH_BANDWIDTH = 1.57 * GB
"""SHA-256 of a file by one core."""
BACKWARD_WORK = 1.07
"""The most that the backward of a block holds, as a multiple of what autograd kept of its forward."""

CHUNK_BYTES = 56 * 2**20
"""As in wmtp/losses.py."""
ADAM_TRAFFIC = 92
"""Bytes that AdamW over lists of tensors and the clipping move for each parameter."""
TIME_FOR_SAVING = 0.02


@dataclass(frozen=True)
class Layout:
    """The sizes of a model. The default is Meta's 7B with four heads: 28 trunk blocks and one block for each head."""

    dim: int = 4096
    num_layers: int = 29
    num_heads: int = 4
    num_attention_heads: int = 32
    hidden_dim: int = 11008
    vocab_size: int = 32000

    @property
    def num_blocks(self) -> int:
        """Of trunk and heads."""
        return self.num_layers - 1 + self.num_heads

    @property
    def block_parameters(self) -> int:
        """Four matrices of attention, three of the feed-forward layer, two norms; as many key heads as queries."""
        return 4 * self.dim**2 + 3 * self.dim * self.hidden_dim + 2 * self.dim

    @property
    def vocabulary_parameters(self) -> int:
        """Of the embedding, and of the unembedding."""
        return self.vocab_size * self.dim

    @property
    def parameters(self) -> int:
        """All that is trained; a value head would add dim + 1 and a norm."""
        return self.num_blocks * self.block_parameters + 2 * self.vocabulary_parameters + self.dim


class Setting(NamedTuple):
    """How the processes share the work."""

    strategy: str
    activation_checkpointing: bool
    reduce_each_micro_batch: bool
    micro_batch_size: int


@dataclass(frozen=True)
class Machine:
    """GPUs, and what an update is made of. Memory is in nominal GB, the ring in bytes per second."""

    gpus: int
    memory: float
    sequence: int = 2048
    batch_size: int = 256
    ring: float | None = None

    @property
    def bandwidth(self) -> float:
        """Bytes per second and GPU that a ring carries."""
        return self.ring or (RING_BANDWIDTH if self.gpus <= 8 else NODE_RING_BANDWIDTH)

    def micro_batches(self, setting: Setting) -> int:
        """Forwards of one GPU in an update."""
        return -(-self.batch_size // (self.gpus * setting.micro_batch_size))


def block_bytes(layout: Layout) -> int:
    """What autograd keeps of a block for each token: bf16 products by autocast, the residual stream in fp32.

    Two norms keep their fp32 input and a statistic. Autocast casts the normed state anew for each of the five
    matrices that read it. Attention keeps queries, keys, values, its result and a log-sum in fp32 per head;
    SwiGLU the gate, its activation, the other half and their product.
    """
    norms = 2 * (4 * layout.dim + 4)
    casts = 5 * 2 * layout.dim
    attention = 4 * 2 * layout.dim + 4 * layout.num_attention_heads
    return norms + casts + attention + 4 * 2 * layout.hidden_dim


def activation_bytes(layout: Layout, activation_checkpointing: bool) -> int:
    """What autograd keeps for each token between forward and backward.

    With checkpointing these are the blocks' inputs, of which all heads share one. The last norm keeps its input,
    the stacked heads.
    """
    inputs = layout.num_layers * 4 * layout.dim
    last_norm = layout.num_heads * (4 * layout.dim + 4)
    if activation_checkpointing:
        return inputs + last_norm
    return layout.num_blocks * (block_bytes(layout) - 4 * layout.dim) + inputs + last_norm


def loss_bytes(layout: Layout, tokens: int) -> float:
    """The chunked loss: states of all heads and their gradient, gradient and bf16 copies of the unembedding."""
    states = 2 * 4 * layout.num_heads * layout.dim * tokens
    return states + (4 + 2 + 2) * layout.vocabulary_parameters + 1.5 * CHUNK_BYTES


def work_bytes(layout: Layout, setting: Setting, tokens: int) -> float:
    """What comes and goes: gathered blocks, gradients on their way, and the block whose backward runs."""
    kept = block_bytes(layout)
    running = (BACKWARD_WORK * kept - (4 * layout.dim if setting.activation_checkpointing else kept)) * tokens
    if setting.strategy == "ddp":
        copies = 2 * layout.parameters  # autocast's bf16 matrices live until the backward
        return copies + 4 * layout.parameters + running  # and DDP's buckets
    gathered = 2 * 2 * 2 * layout.block_parameters  # two blocks in bf16, and the buffers that they come from
    leaving = (2 + 2 * 4) * layout.block_parameters  # a bf16 gradient, two fp32 buffers to reduce
    vocabulary = (2 * 4 + 4) * layout.vocabulary_parameters  # both matrices in fp32, the embedding's gradient
    return gathered + leaving + vocabulary + running


def memory(layout: Layout, machine: Machine, setting: Setting) -> dict[str, float]:
    """Bytes of one GPU by what they hold, and the most at one time."""
    tokens = setting.micro_batch_size * machine.sequence
    shards = machine.gpus if setting.strategy == "fsdp" else 1
    accumulates = machine.micro_batches(setting) > 1 and not setting.reduce_each_micro_batch
    gradients = 4 * layout.parameters / (1 if accumulates else shards)
    parts = {
        "parameters": 4 * layout.parameters / shards,
        "gradients": gradients,
        "Adam": 8 * layout.parameters / shards,
        "activations": float(activation_bytes(layout, setting.activation_checkpointing) * tokens),
        "loss": loss_bytes(layout, tokens),
        "work": work_bytes(layout, setting, tokens),
    }
    optimizer_step = (4 + 4 + 8 + 4) * layout.parameters / shards  # AdamW takes roots in a list of their own
    return parts | {"total": max(sum(parts.values()), optimizer_step)}


def fits(layout: Layout, machine: Machine, setting: Setting) -> bool:
    """Whether one GPU holds it."""
    return memory(layout, machine, setting)["total"] <= USABLE_MEMORY * machine.memory * GB


def traffic(layout: Layout, gpus: int, setting: Setting, micro_batches: int) -> tuple[float, float]:
    """Bytes that one GPU sends in an update to gather parameters, and to reduce gradients; ring algorithms.

    fsdp gathers every block in bf16 for the forward and again for the backward, and both vocabulary matrices once
    in fp32; it reduces and scatters fp32. ddp reduces to all: twice the bytes.
    """
    share = (gpus - 1) / gpus
    if setting.strategy == "ddp":
        return 0.0, 2 * share * 4 * layout.parameters
    blocks = layout.num_blocks * layout.block_parameters
    gathered = share * (2 * 2 * blocks + 4 * (layout.parameters - blocks))
    reductions = micro_batches if setting.reduce_each_micro_batch else 1
    return micro_batches * gathered, reductions * share * 4 * layout.parameters


def flops_per_token(layout: Layout, sequence: int) -> tuple[float, float]:
    """Of forward and backward, and of what checkpointing computes again.

    Attention counts all pairs of positions, as published utilisations do, though the causal half is enough.
    Computing again stops before a block's last product, which no gradient needs.
    """
    matrices = layout.num_blocks * (layout.block_parameters - 2 * layout.dim)
    blocks = 2 * matrices + 4 * sequence * layout.dim * layout.num_blocks
    last_products = 2 * layout.num_blocks * layout.dim * layout.hidden_dim
    return 3 * (blocks + 2 * layout.num_heads * layout.vocabulary_parameters), blocks - last_products


class Speed(NamedTuple):
    """An update: seconds of the products at the peak, of the traffic and of the optimizer; tokens per second."""

    peak_seconds: float
    traffic_seconds: float
    optimizer_seconds: float
    slow: float
    fast: float


def speed(layout: Layout, machine: Machine, setting: Setting) -> Speed:
    """Slow is low utilisation and traffic that hides behind nothing; fast is high utilisation and all hidden."""
    model, again = flops_per_token(layout, machine.sequence)
    tokens = machine.batch_size * machine.sequence
    flops = (model + (again if setting.activation_checkpointing else 0)) * tokens / machine.gpus
    shards = machine.gpus if setting.strategy == "fsdp" else 1
    optimizer = ADAM_TRAFFIC * layout.parameters / shards / MEMORY_BANDWIDTH
    wire = sum(traffic(layout, machine.gpus, setting, machine.micro_batches(setting))) / machine.bandwidth
    peak = flops / PEAK_FLOPS
    slow = tokens / (peak / UTILISATION[0] + wire + optimizer)
    fast = tokens / (max(peak / UTILISATION[1], wire) + optimizer)
    return Speed(peak, wire, optimizer, slow, fast)


def checkpoint_seconds(layout: Layout, gpus: int, disk: float, sharded: bool) -> float:
    """Seconds that training waits: from the GPU, to a disk or file system shared by all, and the hash."""
    size, writers = 12 * layout.parameters, gpus if sharded else 1
    return size / (writers * DEVICE_TO_HOST) + size / disk + size / (writers * HASH_BANDWIDTH)


def candidates(layout: Layout, machine: Machine) -> list[Setting]:
    """Each way to set things up with the largest micro-batch that fits, or with 1 where none does."""
    found = [Setting("ddp", True, False, 1)]
    for recompute, each in product((True, False), (True, False)):
        sizes = [size for size in MICRO_BATCH_SIZES if size * machine.gpus <= machine.batch_size] or [1]
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
    return [f"{machine.gpus} × {machine.memory:g} GB", setting.strategy, *flags, setting.micro_batch_size]


def memory_table(layout: Layout, machines: list[Machine]) -> str:
    """GB of one GPU."""
    parts = ("parameters", "gradients", "Adam", "activations", "loss", "work", "total")
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
            gathered, reduced = traffic(layout, machine.gpus, setting, count)
            model, _ = flops_per_token(layout, machine.sequence)
            rates = f"{found.slow:,.0f} – {found.fast:,.0f}"
            used = [100 * model * rate / machine.gpus / PEAK_FLOPS for rate in (found.slow, found.fast)]
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
    for gpus, sharded in product(sorted({machine.gpus for machine in machines}), (False, True)):
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
    nodes = [node_table(layout)] if any(machine.gpus == 64 for machine in machines) else []
    return [speed_table(layout, machines), memory_table(layout, machines), *nodes, checkpoint_table(layout, machines)]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, help="number of A100s; all machines of the page without it")
    parser.add_argument("--memory", type=float, default=80, help="nominal GB of a GPU")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of a sample")
    parser.add_argument("--batch-size", type=int, default=256, help="samples of an update, over all GPUs")
    parser.add_argument("--ring", type=float, help="GB/s of a ring, per GPU; default: NVLink's, or the network's")
    for name, value in vars(Layout()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value, help=f"of the model: {value}")
    options = parser.parse_args()
    layout = Layout(**{name: getattr(options, name) for name in vars(Layout())})
    shapes = [(options.gpus, options.memory)] if options.gpus else [(4, 40), (4, 80), (64, 80)]
    ring = options.ring and options.ring * GB
    machines = [Machine(gpus, memory, options.sequence, options.batch_size, ring) for gpus, memory in shapes]
    print("\n\n".join(tables(layout, machines)))


if __name__ == "__main__":
    main()
