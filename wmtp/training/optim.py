"""Parameter groups for any of torch's optimizers, and learning-rate schedules."""

import math
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from wmtp.field_types import Ratio


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """What trains: matrices decay as the optimizer is told; norms, biases and embeddings never do."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    others = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def warmed_up(step: int, num_updates: int, warmup_ratio: float) -> float | None:
    """The factor during warm-up, which reaches 1 with the first update after it; None afterwards."""
    warmup = math.ceil(warmup_ratio * num_updates)
    return (step + 1) / (warmup + 1) if step < warmup else None


def decay_progress(step: int, num_updates: int, warmup_ratio: float) -> float:
    """How much of the decay is done: 0 at the end of warm-up, 1 after the last update."""
    warmup = math.ceil(warmup_ratio * num_updates)
    return min(1.0, (step - warmup) / max(1, num_updates - warmup))


def constant(optimizer: Optimizer, num_updates: int, *, warmup_ratio: Ratio = 0.0) -> LambdaLR:
    """The same learning rate from the end of warm-up on."""
    return LambdaLR(optimizer, lambda step: warmed_up(step, num_updates, warmup_ratio) or 1.0)


def linear(optimizer: Optimizer, num_updates: int, *, warmup_ratio: Ratio = 0.0, final_ratio: Ratio = 0.0) -> LambdaLR:
    """A straight line from the full learning rate down to `final_ratio` of it."""

    def factor(step: int) -> float:
        done = decay_progress(step, num_updates, warmup_ratio)
        return warmed_up(step, num_updates, warmup_ratio) or final_ratio + (1 - final_ratio) * (1 - done)

    return LambdaLR(optimizer, factor)


def cosine(optimizer: Optimizer, num_updates: int, *, warmup_ratio: Ratio = 0.0, final_ratio: Ratio = 0.0) -> LambdaLR:
    """Half a cosine from the full learning rate down to `final_ratio` of it."""

    def factor(step: int) -> float:
        done = decay_progress(step, num_updates, warmup_ratio)
        shape = 0.5 * (1 + math.cos(math.pi * done))
        return warmed_up(step, num_updates, warmup_ratio) or final_ratio + (1 - final_ratio) * shape

    return LambdaLR(optimizer, factor)
