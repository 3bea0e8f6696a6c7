"""What a training takes, calculated: memory by what it holds, operations, traffic, and time on a known GPU.

Memory and traffic are in bytes. docs/scaling.md and docs/presets.md say what the figures rest on.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from textwrap import fill
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from wmtp.models.shapes import Layout
from wmtp.ops import cross_entropy

GB = 1e9
PEAK_FLOPS = 312e12
"""Of an A100 in bf16, as published; so are the next two."""
MEMORY_BANDWIDTH = 1.555e12
RING_BANDWIDTH = 200 * GB
"""Bytes per second and GPU of a ring over NVLink 3, as nccl-tests reports it ("busbw")."""
NODE_RING_BANDWIDTH = 160 * GB
"""Assumed: the same over nodes of eight GPUs with a 200 Gb/s card each, 80 % of 8 · 25 GB/s; rings use every card."""
UTILISATION = (0.40, 0.65)
"""Assumed: share of the peak that all products reach, recomputed ones too: slow and fast."""
BACKWARD_WORK = 1.07
"""Measured on CPU: the most that the backward of a block holds, as a multiple of what autograd kept of its forward."""
ADAM_TRAFFIC = 92
"""Bytes that AdamW over lists of tensors and the clipping move for each parameter."""


class Setting(NamedTuple):
    """How the processes share the work, the precision of products, and the optimizer's numbers for each parameter."""

    strategy: str
    activation_checkpointing: bool
    reduce_each_micro_batch: bool
    micro_batch_size: int
    precision: str = "bf16"
    moments: int = 2


@dataclass(frozen=True)
class Machine:
    """Processes, and what an update is made of. Memory is in nominal GB, the ring in bytes per second."""

    processes: int
    memory: float = 80
    sequence: int = 2048
    batch_size: int = 256
    ring: float | None = None
    device: str = "cuda"
    name: str = "A100"
    """Of the device; time is calculated for an A100 only."""

    @property
    def bandwidth(self) -> float:
        """Bytes per second and GPU that a ring carries."""
        return self.ring or (RING_BANDWIDTH if self.processes <= 8 else NODE_RING_BANDWIDTH)

    def micro_batches(self, setting: Setting) -> int:
        """Forwards of one process in an update."""
        return -(-self.batch_size // (self.processes * setting.micro_batch_size))


def product_bytes(layout: Layout, setting: Setting) -> int:
    """Of a number that comes out of a matrix product."""
    return min(layout.number_bytes, 2 if setting.precision == "bf16" else 4)


def has_fused_norm(layout: Layout, machine: Machine) -> bool:
    """Whether a norm is one kernel, which keeps its input and a statistic.

    RMSNorm is made of several on CPUs, on MPS and in transformers; the gradient of its weight needs the scaled input.
    """
    return layout.kind == "gpt2" or (layout.kind == "wmtp" and machine.device == "cuda")


def normed_bytes(layout: Layout, machine: Machine, setting: Setting) -> int:
    """Of a number that comes out of a norm: on CUDA autocast runs those of torch in fp32."""
    is_raised = setting.precision == "bf16" and machine.device == "cuda" and has_fused_norm(layout, machine)
    return 4 if is_raised else layout.number_bytes


def kept_input_bytes(layout: Layout, machine: Machine, setting: Setting) -> int:
    """Of a number of a norm's input, as autograd keeps it: made of several kernels, a norm makes it fp32 first."""
    return normed_bytes(layout, machine, setting) if has_fused_norm(layout, machine) else 4


def norm_bytes(layout: Layout, machine: Machine, setting: Setting, frozen: bool = False) -> int:
    """What autograd keeps of a norm for each token, besides what reads its result."""
    scaled = 0
    if not has_fused_norm(layout, machine) and not frozen:
        scaled = 4 if layout.kind == "wmtp" else layout.number_bytes
    return (kept_input_bytes(layout, machine, setting) + scaled) * layout.dim + (8 if layout.kind == "gpt2" else 4)


def block_bytes(layout: Layout, machine: Machine, setting: Setting, frozen: bool = False) -> int:
    """What autograd keeps of a block for each token; a `frozen` one has adapters.

    Autocast casts the normed state anew for each of the matrices that read it. Attention keeps queries, keys,
    values, its result and a log-sum in fp32 per head; ours repeats the keys that heads share. SwiGLU keeps the gate,
    its activation, the other half and their product. GPT-2's GELU is made of several kernels and keeps five tensors,
    of which autocast on CUDA makes three fp32.
    """
    dim, size, is_gpt2 = layout.dim, product_bytes(layout, setting), layout.kind == "gpt2"
    is_cast = size < normed_bytes(layout, machine, setting)
    keys = layout.query_dim if layout.kind == "wmtp" else layout.kv_dim
    feed_forward = 4 * size
    if is_gpt2:
        feed_forward = 16 if setting.precision == "bf16" and machine.device == "cuda" else 5 * size
    kept = 2 * norm_bytes(layout, machine, setting, frozen) + (5 if is_cast and not is_gpt2 else 2) * size * dim
    kept += 2 * size * (layout.query_dim + keys) + 4 * layout.num_attention_heads + feed_forward * layout.hidden_dim
    if layout.kind == "qwen3":  # queries and keys are normed too
        kept += (4 + (0 if frozen else size)) * (layout.query_dim + layout.kv_dim)
    if layout.has_dropout:
        kept += 2 * (1 if machine.device == "cuda" else size) * dim
    if machine.device == "mps" or (layout.has_dropout and machine.device == "cpu"):  # attention is no one kernel there
        kept += (3 if layout.has_dropout else 1) * 4 * layout.num_attention_heads * machine.sequence
    return kept + ((layout.adapter_rank or 0) * size * (4 if is_gpt2 else 7) if frozen else 0)


def activation_bytes(layout: Layout, machine: Machine, setting: Setting) -> int:
    """What autograd keeps for each token between forward and backward.

    With checkpointing these are the blocks' inputs, of which all heads share one. The last norm keeps its input,
    the stacked heads. Heads that are residual layers share what their matrices read, unless autocast casts it for
    each, and keep the matrices' results.
    """
    values = 0 if layout.value_dim is None else 8 * (layout.dim + layout.value_dim)
    if layout.trains_values_only:
        return values
    heads, is_frozen, stream = layout.num_head_blocks, layout.adapter_rank is not None, layout.number_bytes * layout.dim
    last = heads * norm_bytes(layout, machine, setting, is_frozen) + values
    if further := layout.num_heads - heads:
        size, normed = product_bytes(layout, setting), normed_bytes(layout, machine, setting)
        last += (further * size + (further * size if size < normed else normed)) * layout.dim
    if setting.activation_checkpointing:
        return layout.num_layers * stream + last
    is_shared = kept_input_bytes(layout, machine, setting) == layout.number_bytes  # no copy made for each head
    blocks = layout.num_trunk_blocks * block_bytes(layout, machine, setting, is_frozen)
    blocks += heads * block_bytes(layout, machine, setting) - (heads - 1) * (stream if is_shared else 0)
    return blocks + last


def all_logits_bytes(layout: Layout, tokens: int) -> int:
    """What the loss does without: the logits of all heads at once in fp32, and their gradient."""
    return 2 * 4 * layout.num_heads * layout.vocab_size * tokens


def chunk_bytes(machine: Machine) -> int:
    """Of the logits that the loss has at one time."""
    return cross_entropy.GPU_CHUNK_BYTES if machine.device == "cuda" else cross_entropy.CHUNK_BYTES


def loss_bytes(layout: Layout, machine: Machine, setting: Setting, tokens: int) -> float:
    """The chunked loss: states and their gradient, gradient and bf16 copies of the unembedding, one chunk."""
    if layout.trains_values_only:
        return 0.0
    is_trained, size = layout.adapter_rank is None, product_bytes(layout, setting)
    states = 2 * normed_bytes(layout, machine, setting) * layout.num_heads * layout.dim * tokens
    unembedding = layout.number_bytes if is_trained else 0
    if size < layout.number_bytes:
        unembedding += 2 * size if is_trained else size
    copies = 1.0
    if size == 2:
        copies = 1.5 if machine.device == "cuda" else 2.5  # elsewhere a division into bf16 is made in fp32 first
    chunk = min(chunk_bytes(machine), all_logits_bytes(layout, tokens) // 2)
    return states + unembedding * layout.vocabulary_parameters + copies * chunk


def work_bytes(layout: Layout, machine: Machine, setting: Setting, tokens: int) -> float:
    """What comes and goes: gathered blocks, gradients on their way, and the block whose backward runs."""
    size, kept, number = product_bytes(layout, setting), block_bytes(layout, machine, setting), layout.number_bytes
    there = number * layout.dim if setting.activation_checkpointing else kept
    running = 0.0 if layout.trains_values_only else (BACKWARD_WORK * kept - there) * tokens
    if setting.strategy != "fsdp":
        copies = 2 * layout.counted.parameters if size < number else 0  # autocast's matrices live until the backward
        buckets = layout.counted.trained_bytes if setting.strategy == "ddp" else 0
        return copies + buckets + running
    gathered = 2 * 2 * size * layout.block_parameters  # two blocks, and the buffers that they come from
    vocabulary = layout.num_vocabulary_matrices * number * layout.vocabulary_parameters
    if layout.trains_values_only:
        return gathered + vocabulary
    leaving = (size + 2 * 4) * layout.block_parameters  # a gradient, two fp32 buffers to reduce
    embedding = number * layout.vocabulary_parameters if layout.adapter_rank is None else 0  # its gradient
    return gathered + leaving + vocabulary + embedding + running


def memory(layout: Layout, machine: Machine, setting: Setting) -> dict[str, float]:
    """Bytes of one process by what they hold, and the most at one time.

    Where one forward is an update, the total is less than the sum: gradients come as activations go.
    """
    tokens, counts = setting.micro_batch_size * machine.sequence, layout.counted
    shards = machine.processes if setting.strategy == "fsdp" else 1
    gradients, accumulates = counts.trained_bytes / shards, machine.micro_batches(setting) > 1
    if shards > 1 and accumulates and not setting.reduce_each_micro_batch:
        gradients = float(4 * counts.trained if setting.precision == "bf16" else counts.trained_bytes)
    parts = {
        "parameters": counts.parameter_bytes / shards,
        "gradients": gradients,
        "optimizer": setting.moments * counts.trained_bytes / shards,
        "activations": float(activation_bytes(layout, machine, setting) * tokens),
        "loss": loss_bytes(layout, machine, setting, tokens),
        "work": work_bytes(layout, machine, setting, tokens),
    }
    state, held = parts["parameters"] + parts["optimizer"], parts["activations"] + parts["loss"]
    most = gradients + held if accumulates else max(gradients, held)
    roots = counts.trained_bytes / shards if machine.device == "cuda" else 0.0  # AdamW has them in a list of their own
    return parts | {"total": state + max(most + parts["work"], counts.trained_bytes / shards + roots)}


def traffic(layout: Layout, processes: int, setting: Setting, micro_batches: int) -> tuple[float, float]:
    """Bytes that one process sends in an update to gather parameters, and to reduce gradients; ring algorithms.

    fsdp gathers every block for the forward and again for the backward, in bf16 if that is the precision, and both
    vocabulary matrices once as they are; it reduces and scatters fp32. ddp reduces to all: twice the bytes.
    """
    share, counts = (processes - 1) / processes, layout.counted
    if setting.strategy != "fsdp":
        return 0.0, 2 * share * counts.trained_bytes
    blocks = layout.num_blocks * layout.block_parameters
    others = layout.number_bytes * (counts.parameters - blocks)
    times = 1 if layout.trains_values_only else 2
    gathered = share * (times * product_bytes(layout, setting) * blocks + others)
    reductions = micro_batches if setting.reduce_each_micro_batch else 1
    return micro_batches * gathered, reductions * share * 4 * counts.trained


def flops_per_token(layout: Layout, sequence: int) -> tuple[float, float]:
    """Of forward and backward, and of what checkpointing computes again.

    Attention counts all pairs of positions, as published utilisations do, though the causal half is enough.
    Computing again stops before a block's last product, which no gradient needs. Frozen matrices need no gradient of
    their own; what adapters cost is left out.
    """
    products, attention = 2 * layout.block_matrices, 4 * sequence * layout.query_dim
    if layout.trains_values_only:
        return float(layout.num_trunk_blocks * (products + attention)), 0.0
    passes = 3 if layout.adapter_rank is None else 2
    blocks = layout.num_trunk_blocks * passes * products + 3 * layout.num_head_blocks * products
    blocks += 3 * layout.num_blocks * attention + 3 * 2 * layout.residual_parameters
    again = layout.num_blocks * (products + attention - 2 * layout.dim * layout.hidden_dim)
    return float(blocks + passes * 2 * layout.num_heads * layout.vocabulary_parameters), float(again)


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
    flops = (model + (again if setting.activation_checkpointing else 0)) * tokens / machine.processes
    shards = machine.processes if setting.strategy == "fsdp" else 1
    optimizer = ADAM_TRAFFIC * layout.counted.trained / shards / MEMORY_BANDWIDTH
    wire = sum(traffic(layout, machine.processes, setting, machine.micro_batches(setting))) / machine.bandwidth
    peak = flops / PEAK_FLOPS
    slow = tokens / (peak / UTILISATION[0] + wire + optimizer)
    fast = tokens / (max(peak / UTILISATION[1], wire) + optimizer)
    return Speed(peak, wire, optimizer, slow, fast)


class Estimate(NamedTuple):
    """Bytes of one process by what they hold, and seconds of an update, slow and fast, where the device is known."""

    memory: dict[str, float]
    seconds: tuple[float, float] | None


def estimate(layout: Layout, machine: Machine, setting: Setting) -> Estimate:
    """What a training takes."""
    seconds = None
    if machine.device == "cuda" and "A100" in machine.name and setting.precision == "bf16":
        found, tokens = speed(layout, machine, setting), machine.batch_size * machine.sequence
        seconds = tokens / found.slow, tokens / found.fast
    return Estimate(memory(layout, machine, setting), seconds)


def name_of(device: torch.device) -> str:
    """What the maker calls a GPU; the kind of any other device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def moments(optimizer: Optimizer) -> int:
    """How many numbers an optimizer that has made a step holds for each parameter; 2 for Adam."""
    found = [sum(getattr(x, "shape", None) == p.shape for x in state.values()) for p, state in optimizer.state.items()]
    return max(found, default=0)


def in_words(found: Estimate, machine: Machine, setting: Setting) -> str:
    """The memory and what takes it, and the time as far as it was calculated; small parts are left out."""
    total = found.memory["total"]
    unit, name = (GB, "GB") if total >= GB else (1e6, "MB")
    parts = {part: f"{size / unit:,.1f}" for part, size in found.memory.items() if part != "total"}
    parts = {part: size for part, size in parts.items() if size != "0.0"}
    if "gradients" in parts and machine.micro_batches(setting) == 1:
        parts["gradients"] += " (as activations go)"
    which = f"{setting.micro_batch_size} x {machine.sequence:,} tokens"
    listed = ", ".join(f"{part} {size}" for part, size in parts.items())
    lines = [f"memory: about {total / unit:,.1f} {name} a process with {which}: {listed}"]
    if found.seconds is not None:
        slow, fast = map(duration, found.seconds)
        lines.append(f"calculated for an A100: {fast} to {slow} for an update of the longest samples")
    return wrapped(lines)


def wrapped(lines: Iterable[str]) -> str:
    """Lines of at most 80 columns."""
    return "\n".join(fill(line, 80, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def duration(seconds: float) -> str:
    """A time in words.

    >>> [duration(x) for x in (0.42, 59, 600, 86_000, 3_000_000)]
    ['0.4 s', '59 s', '10 min', '23.9 h', '34.7 days']
    """
    for size, name, decimals in ((86_400, "days", 1), (3_600, "h", 1), (60, "min", 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{decimals}f} {name}"
    return f"{seconds:.{0 if seconds >= 10 else 1}f} s"
