"""Trainings for tests, alone and as the ranks of a group: whole runs, or trainers without a stage before."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.conftest import TINY, composed
from wmtp.distributed.parallelize import whole
from wmtp.objectives.mtp import MtpObjective
from wmtp.runtime.run_dir import Ending
from wmtp.training.builders import compose_model, compose_parts, compose_trainer
from wmtp.training.run import Run
from wmtp.training.trainer import Trainer

COMMON = [
    *TINY, "tracking=none", "batch_size=8", "micro_batch_size=2", "max_steps=20", "log_interval=1",
    "early_stopping=none", "num_samples=0", "hardware=cpu",
]  # fmt: skip
"""Forty samples: five updates of four micro-batches make an epoch."""
BOTH = {"ddp": ["hardware=cpux2"], "fsdp": ["hardware=cpux2", "hardware.strategy=fsdp"]}


def trained(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train here, alone or as a rank; the lines of metrics.jsonl."""
    (folder / ".hydra").mkdir(exist_ok=True, parents=True)
    Run(composed(*COMMON, *overrides), folder, Ending(), []).train()
    return metrics_of(folder)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without the time."""
    ignored = ("time", "train/tokens_per_second")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ignored} for line in lines]


def trainer_in(folder: Path, *overrides: str) -> Trainer:
    """A trainer here, alone or as a rank. An algorithm that needs a reference gets one that loses 2 at each token."""
    config = composed(*COMMON, *overrides)
    parts = compose_parts(config)
    if parts.algorithm.needs_reference:
        for split in (parts.data.train, parts.data.validation):
            split.reference_losses = np.full(len(split.samples.tokens), 2.0, np.float32)
    model = compose_model(config, parts, values=parts.algorithm.needs_values)
    return compose_trainer(config, folder, parts.hardware, parts.data, model, MtpObjective(parts.algorithm))


def parameters(model: torch.nn.Module) -> torch.Tensor:
    """All parameters in a row, also where processes hold parts of them; then all must ask."""
    return torch.cat([whole(parameter.detach()).flatten() for parameter in model.parameters()])


def gradients(model: torch.nn.Module) -> torch.Tensor:
    """All gradients in a row; where there is none, zeros."""
    rows = [p if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat(
        [whole(row.detach()).flatten() * (p.grad is not None) for row, p in zip(rows, model.parameters(), strict=True)]
    )


def digest(tensor: torch.Tensor) -> str:
    """A hash of every bit."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
