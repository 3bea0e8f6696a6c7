"""Parallelize a model over the ranks, each of which trains on different data.

With DDP, each rank holds a copy of the model. With FSDP2, each rank holds a shard of every parameter.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

Strategy = Literal["single", "ddp", "fsdp"]


def parallelize(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    strategy: Strategy,
    precision: Literal["fp32", "bf16"],
    keep_fp32: Sequence[nn.Module] = (),
) -> None:
    """Parallelize a model in place over the ranks. The names of its parameters do not change.

    After this call, all ranks must run each forward pass together. The backward pass averages the gradients over the
    ranks.

    Args:
        model: the model to parallelize.
        blocks: modules of the model. With "fsdp", the parameters of each block are gathered when the block runs, and
            they are cast to bf16 if `precision` is "bf16".
        strategy: "ddp" or "fsdp". With "single", the function does nothing.
        precision: number format of the gathered parameters of the blocks. It matters only with "fsdp".
        keep_fp32: modules of the model. With "fsdp", the parameters of each of them are gathered when it runs, and stay
            fp32. The parameters of all other modules are gathered once per forward pass, and stay fp32, too.
    """
    if strategy == "ddp":
        replicate(model)
    if strategy == "fsdp":
        # by default torch would choose the fastest device of the machine, even for a model on the CPU
        mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
        # gradients are summed over micro-batches and ranks in fp32, even those of bf16 parameters
        kept = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
        mixed = replace(kept, param_dtype=torch.bfloat16)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=mixed if precision == "bf16" else kept)
        for module in keep_fp32:
            fully_shard(module, mesh=mesh, mp_policy=kept)
        # the loss uses the unembedding after the forward
        fully_shard(model, mesh=mesh, mp_policy=kept, reshard_after_forward=False)


def synchronize_gradients(model: nn.Module, now: bool) -> None:
    """Set whether the next backward pass averages the gradients over the ranks.

    If `now` is False, each rank only accumulates its own gradients.
    """
    set_sync: Callable[[bool], None] | None = getattr(model, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(now)
    for module in model.modules():
        if isinstance(module, FSDPModule) and not any(parameter.requires_grad for parameter in module.parameters()):
            # a frozen module may take no part in the forward pass; torch fails if such a module is to accumulate
            module.set_requires_gradient_sync(True)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down if their total norm exceeds `max_norm`. Return the total norm before the scaling.

    If the gradients are sharded, the total norm includes the shards of all ranks.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return full_tensor(norm).item()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the full tensor if `tensor` is sharded, else `tensor`. All ranks must call this for a sharded tensor."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full
