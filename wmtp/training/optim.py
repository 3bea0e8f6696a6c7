"""Parameter groups for the optimizers of torch, and learning-rate schedules."""

import math
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from wmtp.config.schema import build, schema
from wmtp.config.targets import locate
from wmtp.field_types import Ratio
from wmtp.ops.shares import share_of


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return the trainable parameters in groups for an optimizer.

    Weight decay is 0 for norms, biases and embeddings. For all other parameters, the optimizer's weight decay applies.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def try_optimizer(node: DictConfig) -> Optimizer:
    """Build an optimizer for a matrix and a vector, and return it after its first step.

    Raises:
        Exception: torch refuses an option or the parameters.
    """
    layer = nn.Linear(2, 2)
    optimizer: Optimizer = build(node, params=parameter_groups(layer))
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return optimizer


def try_scheduler(node: DictConfig, optimizer: Optimizer) -> None:
    """Build a scheduler for an optimizer of `try_optimizer`, and make its first step.

    Raises:
        ValueError: the scheduler has a fixed number of steps.
        Exception: torch refuses an option, or the scheduler needs arguments that the trainer does not have.
    """
    if "total_steps" in schema(locate(str(node["_target_"]))):
        problem = "has a fixed number of updates, but a run may be resumed for more"
        raise ValueError(f"{problem}; use scheduler=cosine or linear")
    scheduler: LRScheduler = build(node, optimizer=optimizer, num_updates=2)
    optimizer.step()
    scheduler.step()


def constant(optimizer: Optimizer, num_updates: int, *, warmup_ratio: Ratio = 0.0) -> LambdaLR:
    """Keep the learning rate constant after warm-up."""
    warmup = share_of(num_updates, warmup_ratio)
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup + 1)))


def linear(optimizer: Optimizer, num_updates: int, *, warmup_ratio: Ratio = 0.0, final_ratio: Ratio = 0.0) -> LambdaLR:
    """Decay the learning rate linearly after warm-up.

    The learning rate falls from its full value to `final_ratio` times that value, which the last update uses.
    """
    return decay(optimizer, num_updates, warmup_ratio, final_ratio, lambda done: 1 - done)


def cosine(optimizer: Optimizer, num_updates: int, *, warmup_ratio: Ratio = 0.0, final_ratio: Ratio = 0.0) -> LambdaLR:
    """Decay the learning rate along half a period of a cosine after warm-up.

    The learning rate falls from its full value to `final_ratio` times that value, which the last update uses.
    """
    return decay(optimizer, num_updates, warmup_ratio, final_ratio, lambda done: 0.5 * (1 + math.cos(math.pi * done)))


def decay(
    optimizer: Optimizer, num_updates: int, warmup_ratio: float, final_ratio: float, shape: Callable[[float], float]
) -> LambdaLR:
    """Return a schedule with linear warm-up to the full learning rate and a decay to `final_ratio` times that rate.

    The warm-up leaves at least two updates, one with the full learning rate and the last one with the final one. A
    single update has the final one. `shape` maps the progress of the decay to the factor without `final_ratio`; it is
    1 for 0, which is the first update after warm-up, and 0 for 1, which is the last update.
    """
    warmup, last = min(share_of(num_updates, warmup_ratio), max(0, num_updates - 2)), num_updates - 1

    def _factor(step: int) -> float:
        """Return the factor of the learning rate after `step` updates."""
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = 1 - max(0, last - step) / max(1, last - warmup)
        return final_ratio + (1 - final_ratio) * shape(progress)

    return LambdaLR(optimizer, _factor)
