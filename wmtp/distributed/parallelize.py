"""Data parallelism: a copy of the model on each rank (DDP), or a shard of every tensor (FSDP2)."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

Strategy = Literal["single", "ddp", "fsdp"]


def parallelize(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    strategy: Strategy,
    precision: Literal["fp32", "bf16"],
    keep_fp32: Sequence[nn.Module] = (),
) -> None:
    """Parallelize a model in place over the process group; the names of its parameters do not change.

    Afterwards all ranks must run each forward, and the first forward must compute gradients. Gradients are averaged
    over the ranks.

    Args:
        model: the model.
        blocks: modules that fsdp gathers one by one when they run, in bf16 if that is the `precision`.
        strategy: "ddp" or "fsdp"; "single" changes nothing.
        precision: the precision of the blocks under fsdp.
        keep_fp32: modules that fsdp gathers one by one without a cast. All other parameters are gathered once per
            forward, without a cast.
    """
    if strategy == "ddp":
        replicate(model)
    if strategy == "fsdp":
        # by default torch would choose the fastest device of the machine, even for a model on the CPU
        mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
        mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=mixed if precision == "bf16" else MixedPrecisionPolicy())
        for module in keep_fp32:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the loss uses the unembedding after the forward


def synchronize_gradients(model: nn.Module, now: bool) -> None:
    """Set whether the next backward reduces gradients over the ranks (`now`), or only accumulates them locally."""
    set_sync: Callable[[bool], None] | None = getattr(model, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(now)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Clip the gradients to a total norm over all ranks; return the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return full_tensor(norm).item()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor of a tensor that may be sharded; if it is, all ranks must call this."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full
