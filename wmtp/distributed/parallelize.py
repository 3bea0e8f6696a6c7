"""One model in several processes: a copy in each (DDP), or a part of every tensor in each (FSDP2)."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

Strategy = Literal["single", "ddp", "fsdp"]


def parallelise(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    strategy: Strategy,
    precision: Literal["fp32", "bf16"],
    exact: Sequence[nn.Module] = (),
) -> None:
    """Let the processes of the group train one model together; it stays the object and the names that it was.

    From now on all of them must make its forwards, and the first one with gradients.

    Gradients become the mean over the processes. Under fsdp each of `blocks` is gathered when it runs, in bf16 if
    that is the `precision`, each of `exact` as it is; what lies outside of them once per forward, as it is.
    """
    if strategy == "ddp":
        replicate(model)
    if strategy == "fsdp":
        # torch's own choice is the machine's fastest device, also for a model on the CPU
        mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
        low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=low if precision == "bf16" else MixedPrecisionPolicy())
        for module in exact:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)  # the loss uses the unembedding after the forward


def synchronise_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward ends with gradients of all processes, or adds to this one's own."""
    set_sync: Callable[[bool], None] | None = getattr(model, "set_requires_gradient_sync", None)
    if set_sync is not None:
        set_sync(now)


def clip_gradients(model: nn.Module, max_norm: float) -> float:
    """Scale the gradients down to a norm over all processes; the norm that they had."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return whole(norm).item()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that processes may hold parts of; then every process must ask for it."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full
