"""Parameter groups for the optimizers of torch, and learning-rate schedules."""

import math
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from wmtp.config.schema import build, locate, schema
from wmtp.field_types import Ratio


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
        raise ValueError("fixes the number of steps, but a run may be resumed for more; use scheduler=cosine or linear")
    scheduler: LRScheduler = build(node, optimizer=optimizer, num_updates=2)
    optimizer.step()
    scheduler.step()


def warmup_factor(step: int, num_updates: int, warmup_ratio: float) -> float | None:
    """Return the factor that multiplies the learning rate during warm-up, or None after warm-up.

    The factor grows linearly with `step`, the number of completed updates. It would reach 1 at the first update after
    warm-up.
    """
    warmup = math.ceil(warmup_ratio * num_updates)
    return (step + 1) / (warmup + 1) if step < warmup else None


def decay_progress(step: int, num_updates: int, warmup_ratio: float) -> float:
    """Return the completed fraction of the learning-rate decay: 0 at the end of warm-up, 1 after the last update."""
    warmup = math.ceil(warmup_ratio * num_updates)
    return min(1.0, (step - warmup) / max(1, num_updates - warmup))


def constant(optimizer: Optimizer, num_updates: int, *, warmup_ratio: Ratio = 0.0) -> LambdaLR:
    """Keep the learning rate constant after warm-up."""
    return LambdaLR(optimizer, lambda step: warmup_factor(step, num_updates, warmup_ratio) or 1.0)


def linear(optimizer: Optimizer, num_updates: int, *, warmup_ratio: Ratio = 0.0, final_ratio: Ratio = 0.0) -> LambdaLR:
    """Decay the learning rate linearly after warm-up.

    The learning rate falls from its full value to `final_ratio` times that value.
    """

    def _factor(step: int) -> float:
        """Return the factor of the learning rate at a step."""
        done = decay_progress(step, num_updates, warmup_ratio)
        return warmup_factor(step, num_updates, warmup_ratio) or final_ratio + (1 - final_ratio) * (1 - done)

    return LambdaLR(optimizer, _factor)


def cosine(optimizer: Optimizer, num_updates: int, *, warmup_ratio: Ratio = 0.0, final_ratio: Ratio = 0.0) -> LambdaLR:
    """Decay the learning rate along half a period of a cosine after warm-up.

    The learning rate falls from its full value to `final_ratio` times that value.
    """

    def _factor(step: int) -> float:
        """Return the factor of the learning rate at a step."""
        done = decay_progress(step, num_updates, warmup_ratio)
        shape = 0.5 * (1 + math.cos(math.pi * done))
        return warmup_factor(step, num_updates, warmup_ratio) or final_ratio + (1 - final_ratio) * shape

    return LambdaLR(optimizer, _factor)
