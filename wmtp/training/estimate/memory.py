"""Estimate of the memory that a training run needs, in bytes.

docs/scaling.md and docs/presets.md list the sources of the numbers.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from wmtp.algorithms.base import AdditionalPass
from wmtp.models.shapes import ModelShape
from wmtp.ops import cross_entropy

GB = 1e9
BACKWARD_WORK = 1.07
"""Peak memory of a block's backward pass, divided by the memory that autograd keeps from the block's forward pass.

Measured on a CPU.
"""


class ParallelSetting(NamedTuple):
    """The parallel strategy, the precision of matrix products, and the size of the optimizer's state.

    `moments` is the number of values that the optimizer stores for each parameter. `scales_heads_in_one_pass` and
    `additional_pass` are properties of the algorithm.
    """

    strategy: str
    activation_checkpointing: bool
    reduce_each_micro_batch: bool
    micro_batch_size: int
    precision: str = "bf16"
    moments: int = 2
    scales_heads_in_one_pass: bool = False
    additional_pass: AdditionalPass = "none"


@dataclass(frozen=True)
class Machine:
    """The number of processes, the type of their devices, and the size of an update.

    `sequence` is the number of tokens per sample. `batch_size` is the number of samples per update.
    """

    processes: int
    sequence: int = 2048
    batch_size: int = 256
    device: str = "cuda"

    def micro_batches(self, setting: ParallelSetting) -> int:
        """Return the number of forward passes that each process makes in an update."""
        return -(-self.batch_size // (self.processes * setting.micro_batch_size))


def product_bytes(shape: ModelShape, setting: ParallelSetting) -> int:
    """Return the size of one element of the result of a matrix product, in bytes."""
    return min(shape.number_bytes, 2 if setting.precision == "bf16" else 4)


def has_fused_norm(shape: ModelShape, machine: Machine) -> bool:
    """Return whether one kernel computes a whole normalization layer (norm).

    If one kernel computes the norm, autograd keeps the norm's input and one or two numbers per token. On CPU, on MPS
    and in models of transformers, several kernels compute an RMSNorm. In this case, autograd also keeps the scaled
    input, which the gradient of the norm's weight needs.
    """
    return shape.kind == "gpt2" or (shape.kind == "wmtp" and machine.device == "cuda")


def normed_bytes(shape: ModelShape, machine: Machine, setting: ParallelSetting) -> int:
    """Return the size of one element of the result of a norm, in bytes.

    On CUDA, autocast runs the norms of torch in fp32.
    """
    is_raised = setting.precision == "bf16" and machine.device == "cuda" and has_fused_norm(shape, machine)
    return 4 if is_raised else shape.number_bytes


def kept_input_bytes(shape: ModelShape, machine: Machine, setting: ParallelSetting) -> int:
    """Return the size of one element of the norm input that autograd keeps, in bytes.

    If several kernels compute the norm, the first of them converts the input to fp32, and autograd keeps the result.
    """
    return normed_bytes(shape, machine, setting) if has_fused_norm(shape, machine) else 4


def norm_bytes(shape: ModelShape, machine: Machine, setting: ParallelSetting, frozen: bool = False) -> int:
    """Return the bytes per token that autograd keeps for the gradient of a norm.

    The result of the norm is not included, because it is counted for the layers that use it as their input. If `frozen`
    is true, the norm's weight needs no gradient.
    """
    scaled = 0
    if not has_fused_norm(shape, machine) and not frozen:
        scaled = 4 if shape.kind == "wmtp" else shape.number_bytes
    return (kept_input_bytes(shape, machine, setting) + scaled) * shape.dim + (8 if shape.kind == "gpt2" else 4)


def block_bytes(shape: ModelShape, machine: Machine, setting: ParallelSetting, frozen: bool = False) -> int:
    """Return the bytes per token that autograd keeps for the gradient of a block.

    If `frozen` is true, the weights of the block are frozen and only its adapters are trained.

    For each matrix that multiplies the normalized state, autocast makes a
    separate copy of that state. For attention, autograd keeps the queries, the keys, the values and the result, and for
    each head the logarithm of a sum in fp32. If several heads share a key, the attention of wmtp makes a copy of the
    key for each of these heads. For SwiGLU, autograd keeps the gate before and after its activation function, the
    factor that is multiplied by the gate, and the product. The GELU of GPT-2 consists of several kernels, for which
    autograd keeps five tensors. On CUDA, autocast converts three of these tensors to fp32.
    """
    dim, size, is_gpt2 = shape.dim, product_bytes(shape, setting), shape.kind == "gpt2"
    is_cast = size < normed_bytes(shape, machine, setting)
    keys = shape.query_dim if shape.kind == "wmtp" else shape.kv_dim
    feed_forward = 4 * size
    if is_gpt2:
        feed_forward = 16 if setting.precision == "bf16" and machine.device == "cuda" else 5 * size
    kept = 2 * norm_bytes(shape, machine, setting, frozen) + (5 if is_cast and not is_gpt2 else 2) * size * dim
    kept += 2 * size * (shape.query_dim + keys) + 4 * shape.num_attention_heads + feed_forward * shape.hidden_dim
    if shape.kind == "qwen3":  # queries and keys are normalized too
        kept += (4 + (0 if frozen else size)) * (shape.query_dim + shape.kv_dim)
    if shape.has_dropout:
        kept += 2 * (1 if machine.device == "cuda" else size) * dim
    if machine.device == "mps" or (shape.has_dropout and machine.device == "cpu"):  # attention is several kernels there
        kept += (3 if shape.has_dropout else 1) * 4 * shape.num_attention_heads * machine.sequence
    return kept + ((shape.adapter_rank or 0) * size * (4 if is_gpt2 else 7) if frozen else 0)


def value_bytes(shape: ModelShape, machine: Machine, setting: ParallelSetting) -> int:
    """Return the bytes per token that autograd keeps for the gradient of the value head.

    For the norm of a value head, which is in fp32, autograd keeps the scaled input. For the kind "state", it also keeps
    the inputs of the matrices and of the activation function. For the kind "action", it keeps the token ids, their
    vectors, and the states that are multiplied by these. The block of the kind "block" is in fp32. If the states before
    the norm are not in fp32, autograd also keeps a copy of them in fp32, except if only the value head is trained.
    """
    if shape.value_dim is None:
        return 0
    kept = 12 * shape.dim + 8 if shape.value_kind == "action" else 8 * (shape.dim + shape.value_dim)
    if shape.value_kind == "block":
        kept += block_bytes(replace(shape, number_bytes=4), machine, setting)
    return kept + (4 * shape.dim if shape.number_bytes < 4 and not shape.trains_values_only else 0)


def activation_bytes(shape: ModelShape, machine: Machine, setting: ParallelSetting) -> int:
    """Return the bytes per token that autograd keeps between the forward pass and the backward pass.

    With activation checkpointing, autograd keeps only the inputs of the blocks. All heads have the same input, which is
    counted once. For the last norm, autograd keeps the states of all heads, which are the input of this norm. For heads
    that are residual layers, autograd keeps the results of their matrices. These heads share one input, unless autocast
    makes a copy of it for each head.
    """
    values = value_bytes(shape, machine, setting)
    if shape.trains_values_only:
        return values
    heads, is_frozen = shape.num_head_blocks, shape.adapter_rank is not None
    stream_bytes = shape.number_bytes * shape.dim
    outputs = heads * norm_bytes(shape, machine, setting, is_frozen) + values
    if num_residual := shape.num_heads - heads:
        size, normed = product_bytes(shape, setting), normed_bytes(shape, machine, setting)
        outputs += (num_residual * size + (num_residual * size if size < normed else normed)) * shape.dim
    if setting.activation_checkpointing:
        return shape.num_layers * stream_bytes + outputs
    is_shared = kept_input_bytes(shape, machine, setting) == shape.number_bytes  # no separate copy for each head
    blocks = shape.num_trunk_blocks * block_bytes(shape, machine, setting, is_frozen)
    blocks += heads * block_bytes(shape, machine, setting) - (heads - 1) * (stream_bytes if is_shared else 0)
    return blocks + outputs


def all_logits_bytes(shape: ModelShape, tokens: int) -> int:
    """Return the memory that the loss would need if it were not computed in chunks, in bytes.

    This memory contains the logits of all heads in fp32, and the gradient of these logits.
    """
    return 2 * 4 * shape.num_heads * shape.vocab_size * tokens


def chunk_bytes(machine: Machine) -> int:
    """Return the maximum size of the logits in one chunk of the loss, in bytes."""
    return cross_entropy.GPU_CHUNK_BYTES if machine.device == "cuda" else cross_entropy.CHUNK_BYTES


def loss_bytes(shape: ModelShape, machine: Machine, setting: ParallelSetting, tokens: int) -> float:
    """Return the memory that the loss needs, in bytes. The loss is computed in chunks.

    This memory contains the states of the heads and their gradient, the gradient of the unembedding in fp32, copies of
    the unembedding and of the gradient of one chunk in bf16, and one chunk of logits. If each head is scaled at the end
    of a pass, each has its own gradient of the unembedding.
    """
    if shape.trains_values_only:
        return 0.0
    is_trained, size = shape.adapter_rank is None, product_bytes(shape, setting)
    states = 2 * normed_bytes(shape, machine, setting) * shape.num_heads * shape.dim * tokens
    summed = max(4, shape.number_bytes)
    unembedding = size if size < shape.number_bytes else 0
    if is_trained:
        one_pass = setting.scales_heads_in_one_pass and machine.micro_batches(setting) == 1
        unembedding += summed * (shape.num_heads if one_pass else 1) + (size if size < summed else 0)
    copies = 1.0
    if size == 2:
        copies = 1.5 if machine.device == "cuda" else 2.5  # other devices divide in fp32 first, then cast to bf16
    chunk = min(chunk_bytes(machine), all_logits_bytes(shape, tokens) // 2)
    return states + unembedding * shape.vocabulary_parameters + copies * chunk


def work_bytes(shape: ModelShape, machine: Machine, setting: ParallelSetting, tokens: int) -> float:
    """Return the memory of temporary buffers, in bytes.

    The buffers contain gathered or converted parameters, gradients that are being reduced, and temporary results of the
    backward pass of one block.
    """
    size, kept, number = product_bytes(shape, setting), block_bytes(shape, machine, setting), shape.number_bytes
    already_counted = number * shape.dim if setting.activation_checkpointing else kept
    backward = 0.0 if shape.trains_values_only else (BACKWARD_WORK * kept - already_counted) * tokens
    if setting.strategy != "fsdp":
        # autocast's copies of the matrices are kept until the backward
        cast_copies = 2 * shape.counted.parameters if size < number else 0
        buckets = shape.counted.trained_bytes if setting.strategy == "ddp" else 0
        return cast_copies + buckets + backward
    gathered = 2 * 2 * size * shape.block_parameters  # two blocks and the buffers they are gathered into
    vocabulary = shape.num_vocabulary_matrices * number * shape.vocabulary_parameters
    if shape.trains_values_only:
        return gathered + vocabulary
    reduction = (size + 2 * 4) * shape.block_parameters  # a gradient and two fp32 buffers to reduce it
    embedding = number * shape.vocabulary_parameters if shape.adapter_rank is None else 0  # its gradient
    return gathered + reduction + vocabulary + embedding + backward


def memory(shape: ModelShape, machine: Machine, setting: ParallelSetting) -> dict[str, float]:
    """Return the number of bytes that one process needs for each use of memory, for example for gradients.

    The key `total` contains the peak memory. If an update has only one forward pass, the peak is less than the sum over
    all uses, because activations are freed while gradients are allocated.
    """
    tokens, counts = setting.micro_batch_size * machine.sequence, shape.counted
    shards = machine.processes if setting.strategy == "fsdp" else 1
    gradients, accumulates = counts.trained_bytes / shards, machine.micro_batches(setting) > 1
    if shards > 1 and accumulates and not setting.reduce_each_micro_batch:
        gradients = 4.0 * counts.trained  # they are summed in fp32
    uses = {
        "parameters": counts.parameter_bytes / shards,
        "gradients": gradients,
        "optimizer": setting.moments * counts.trained_bytes / shards,
        "activations": float(activation_bytes(shape, machine, setting) * tokens),
        "loss": loss_bytes(shape, machine, setting, tokens),
        "work": work_bytes(shape, machine, setting, tokens),
    }
    state, forward = uses["parameters"] + uses["optimizer"], uses["activations"] + uses["loss"]
    peak = gradients + forward if accumulates else max(gradients, forward)
    # AdamW (foreach) keeps the square roots in a separate list
    square_roots = counts.trained_bytes / shards if machine.device == "cuda" else 0.0
    return uses | {"total": state + max(peak + uses["work"], counts.trained_bytes / shards + square_roots)}
