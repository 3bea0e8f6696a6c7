"""Training for tests, in one process or as ranks of a process group: complete runs, or only the trainer of stage 2."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.conftest import TINY, compose_config
from wmtp.distributed.parallelize import full_tensor
from wmtp.runtime.run_dir import JobProgress
from wmtp.training.builders import build_components, build_objective, build_policy, build_trainer
from wmtp.training.run import Run
from wmtp.training.trainer import Trainer

COMMON = [
    *TINY, "tracking=none", "batch_size=8", "micro_batch_size=2", "max_steps=20", "log_interval=1",
    "early_stopping=none", "num_samples=0", "hardware=cpu", "model.num_heads=2",
]  # fmt: skip
"""Overrides of a small run. An epoch of 40 samples has five updates of four micro-batches."""
STRATEGIES = {"ddp": ["hardware=cpux2"], "fsdp": ["hardware=cpux2", "hardware.strategy=fsdp"]}
"""Overrides for two processes, by strategy."""


def train_run(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Train in this process, alone or as a rank, and return the parsed lines of metrics.jsonl."""
    (folder / ".hydra").mkdir(exist_ok=True, parents=True)
    Run(compose_config(*COMMON, *overrides), folder, JobProgress(), []).train()
    return metrics_of(folder)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Return the parsed lines of a run's metrics.jsonl, without time and throughput."""
    ignored = ("time", "train/tokens_per_second")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ignored} for line in lines]


def make_trainer(folder: Path, *overrides: str) -> Trainer:
    """Return a trainer in this process, alone or as a rank.

    If the algorithm needs reference losses, they are 2 at each token.
    """
    config = compose_config(*COMMON, *overrides)
    components = build_components(config)
    data = components.data
    if components.algorithm.needs_reference:
        losses = [
            np.full((len(split.samples.tokens), len(components.algorithm.references)), 2.0, np.float32)
            for split in data.splits
        ]
        data = data.with_columns(reference_losses=losses)
    model = build_policy(config, components, None)
    objective = build_objective(config, components, data)
    return build_trainer(config, folder, components.hardware, data, model, objective)


def parameters(model: torch.nn.Module) -> torch.Tensor:
    """Return all parameters in one vector. If they are sharded, all ranks must call this."""
    return torch.cat([full_tensor(parameter.detach()).flatten() for parameter in model.parameters()])


def gradients(model: torch.nn.Module) -> torch.Tensor:
    """Return all gradients in one vector, with zeros for missing ones."""
    parameters = list(model.parameters())
    tensors = [full_tensor((p if p.grad is None else p.grad).detach()).flatten() for p in parameters]
    return torch.cat([tensor * (p.grad is not None) for tensor, p in zip(tensors, parameters, strict=True)])


def digest(tensor: torch.Tensor) -> str:
    """Return a hash of the tensor's bits."""
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
