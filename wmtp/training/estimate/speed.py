"""Estimate of the speed of a training run on A100 GPUs.

docs/scaling.md and docs/presets.md list the sources of the numbers.
"""

from dataclasses import dataclass
from typing import NamedTuple

from wmtp.algorithms.base import AdditionalPass
from wmtp.models.shapes import ModelShape
from wmtp.training.estimate.memory import GB, Machine, ParallelSetting, product_bytes

PEAK_FLOPS = 312e12
"""Peak speed of matrix products on an A100 in bf16, in FLOP/s. Published value."""
MEMORY_BANDWIDTH = 1.555e12
"""Memory bandwidth of an A100, in bytes per second. Published value."""
RING_BANDWIDTH = 200 * GB
"""Bandwidth of each GPU if a ring uses NVLink 3, in bytes per second. Published value ("busbw" of nccl-tests)."""
NODE_RING_BANDWIDTH = 160 * GB
"""Bandwidth of each GPU if a ring connects several nodes, in bytes per second. Assumed value.

Each node has eight GPUs, and a 200 Gb/s network card for each GPU. A ring uses all cards of a node, and it reaches
80 % of their total bandwidth of 8 · 25 GB/s.
"""
UTILIZATION = (0.40, 0.65)
"""Low and high estimate of the share of the peak FLOP/s that matrix products reach. Assumed values.

Recomputed matrix products are included.
"""
ADAM_TRAFFIC = 92
"""Bytes that gradient clipping and AdamW (foreach) read and write for each parameter."""


@dataclass(frozen=True)
class Cluster(Machine):
    """A machine with the nominal memory of each device in GB, and with the bandwidth of its network.

    `ring` is the bandwidth of each GPU in bytes per second, if all GPUs communicate in a ring. If it is None,
    `RING_BANDWIDTH` or `NODE_RING_BANDWIDTH` is used, depending on the number of processes.
    """

    memory: float = 80
    ring: float | None = None

    @property
    def bandwidth(self) -> float:
        """The bandwidth of each GPU in bytes per second, if all GPUs communicate in a ring."""
        return self.ring or (RING_BANDWIDTH if self.processes <= 8 else NODE_RING_BANDWIDTH)


def traffic(shape: ModelShape, processes: int, setting: ParallelSetting, micro_batches: int) -> tuple[float, float]:
    """Return the bytes that one process sends per update, as two numbers.

    The first number is for gathering parameters, and the second is for reducing gradients. All collectives use ring
    algorithms. The strategy fsdp gathers every block for the forward pass and again for the backward pass, in bf16 if
    that is the precision of matrix products. It gathers both vocabulary matrices once per forward pass, in their own
    dtype, and it reduces gradients in fp32. The strategy ddp gathers nothing. Its all-reduce sends twice as many bytes
    as a reduce-scatter. An additional forward pass for the weights gathers its blocks once more, but no vocabulary
    matrix, because these stay gathered until a backward pass ends.
    """
    share, counts = (processes - 1) / processes, shape.counted
    if setting.strategy != "fsdp":
        return 0.0, 2 * share * counts.trained_bytes
    blocks = shape.num_blocks * shape.block_parameters
    other_bytes = shape.number_bytes * (counts.parameters - blocks)
    gathered_blocks = shape.num_blocks * (1 if shape.trains_values_only else 2)
    if micro_batches > 1 and setting.additional_pass != "none":
        gathered_blocks += shape.num_blocks if setting.additional_pass == "heads" else shape.num_trunk_blocks
    block_bytes = product_bytes(shape, setting) * shape.block_parameters
    gathered = share * (gathered_blocks * block_bytes + other_bytes)
    reductions = micro_batches if setting.reduce_each_micro_batch else 1
    return micro_batches * gathered, reductions * share * 4 * counts.trained


def flops_per_token(shape: ModelShape, sequence: int) -> tuple[float, float]:
    """Return the FLOPs per token of the forward and backward pass, and the FLOPs of recomputing activations.

    For attention, all pairs of positions are counted, although causal attention needs only half of them. Published
    utilizations use the same convention. The last matrix product of a block is not recomputed, because no gradient
    needs its result. Frozen matrices need no gradient. The FLOPs of adapters are not included.
    """
    products, attention = 2 * shape.block_matrices, 4 * sequence * shape.query_dim
    if shape.trains_values_only:
        return float(shape.num_trunk_blocks * (products + attention)), 0.0
    num_passes = 3 if shape.adapter_rank is None else 2
    blocks = shape.num_trunk_blocks * num_passes * products + 3 * shape.num_head_blocks * products
    blocks += 3 * shape.num_blocks * attention + 3 * 2 * shape.residual_parameters
    recomputed = shape.num_blocks * (products + attention - 2 * shape.dim * shape.hidden_dim)
    return float(blocks + num_passes * 2 * shape.num_heads * shape.vocabulary_parameters), float(recomputed)


def additional_flops_per_token(shape: ModelShape, sequence: int, part: AdditionalPass) -> float:
    """Return the FLOPs per token of a forward pass without gradient through the trunk, or through the heads too."""
    if part == "none":
        return 0.0
    block = 2 * shape.block_matrices + 4 * sequence * shape.query_dim
    if part == "trunk":
        return float(shape.num_trunk_blocks * block)
    heads = shape.residual_parameters + shape.num_heads * shape.vocabulary_parameters
    return float(shape.num_blocks * block + 2 * heads)


class Speed(NamedTuple):
    """The duration of the parts of an update, and the resulting speed of training.

    The durations are in seconds. `peak_seconds` is the duration of all matrix products at the peak FLOP/s,
    `traffic_seconds` that of the network traffic, and `optimizer_seconds` that of the optimizer. `slow` and
    `fast` are the low and the high estimate of the speed, in tokens per second.
    """

    peak_seconds: float
    traffic_seconds: float
    optimizer_seconds: float
    slow: float
    fast: float


def speed(shape: ModelShape, machine: Cluster, setting: ParallelSetting) -> Speed:
    """Return the training speed on A100 GPUs.

    The low estimate assumes that the utilization is low and that network traffic does not overlap with computation. The
    high estimate assumes that the utilization is high and that the overlap is complete.
    """
    model, recomputed = flops_per_token(shape, machine.sequence)
    tokens = machine.batch_size * machine.sequence
    per_token = model + (recomputed if setting.activation_checkpointing else 0)
    if machine.micro_batches(setting) > 1:
        per_token += additional_flops_per_token(shape, machine.sequence, setting.additional_pass)
    flops = per_token * tokens / machine.processes
    shards = machine.processes if setting.strategy == "fsdp" else 1
    optimizer_seconds = ADAM_TRAFFIC * shape.counted.trained / shards / MEMORY_BANDWIDTH
    sent = traffic(shape, machine.processes, setting, machine.micro_batches(setting))
    traffic_seconds = sum(sent) / machine.bandwidth
    peak = flops / PEAK_FLOPS
    slow = tokens / (peak / UTILIZATION[0] + traffic_seconds + optimizer_seconds)
    fast = tokens / (max(peak / UTILIZATION[1], traffic_seconds) + optimizer_seconds)
    return Speed(peak, traffic_seconds, optimizer_seconds, slow, fast)
