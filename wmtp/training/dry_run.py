"""A dry run: what would be trained, in words, and one update and one validation batch of every stage."""

import gc
import time
from pathlib import Path

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from wmtp.distributed.process_group import Processes
from wmtp.models.shapes import layout_of
from wmtp.objectives.mtp import MtpObjective
from wmtp.runtime.run_dir import PRETRAIN
from wmtp.training.builders import (
    compose_parts,
    compose_policy,
    compose_reference,
    compose_stage,
    compose_stage_trainer,
    compose_trainer,
)
from wmtp.training.estimate import Machine, Setting, duration, estimate, in_words, moments, name_of, wrapped
from wmtp.training.stage_results import require_same_stage
from wmtp.training.trainer import Trainer


def rehearse(config: DictConfig, folder: Path) -> None:
    """Print what would be trained, and try one update and one validation batch of every stage."""
    console = Console(markup=False, quiet=not Processes().is_main)
    console.print(OmegaConf.to_yaml(config, resolve=True), highlight=False)
    parts = compose_parts(config)
    stage = compose_stage(config, parts)
    if stage is not None:
        if stage.reuse is not None:
            require_same_stage(stage.reuse, config)
        trainer = compose_stage_trainer(config, folder / PRETRAIN, parts, stage, with_columns=False)
        console.print("The stage before the training:", highlight=False)
        _try(console, trainer)
        del trainer
        gc.collect()
    if parts.algorithm.reference is not None:
        compose_reference(config, parts, None)
    if parts.algorithm.needs_reference:  # its losses are not worth computing here: any number will do
        for split in (parts.data.train, parts.data.validation):
            split.reference_losses = np.zeros(len(split.samples.tokens), np.float32)
    model, objective = compose_policy(config, parts, None), MtpObjective(parts.algorithm)
    _try(console, compose_trainer(config, folder, parts.hardware, parts.data, model, objective))
    console.print("The config is sound; one update and one validation batch ran. Nothing was kept.")


def _try(console: Console, trainer: Trainer) -> None:
    console.print(described(trainer), soft_wrap=True, highlight=False)
    started = time.perf_counter()
    update = trainer.train_update()
    seconds = time.perf_counter() - started
    trainer.validate(max_batches=1)
    for name, value in (update | trainer.last_validation).items():
        console.print(f"  {name:30} {value:.4g}", highlight=False)
    console.print(expected(trainer, seconds), soft_wrap=True, highlight=False)


def expected(trainer: Trainer, seconds: float) -> str:
    """In words, what the training will take: memory with its longest samples, time as its first update took."""
    hardware, plan, lengths = trainer.hardware, trainer.plan, trainer.data.train.samples.lengths
    setting = Setting(
        hardware.strategy, hardware.activation_checkpointing, hardware.reduce_each_micro_batch,
        min(plan.micro_batch_size, len(lengths)), hardware.precision, moments(trainer.optimizer),
    )  # fmt: skip
    machine = Machine(
        hardware.processes.size, sequence=int(lengths.max()), batch_size=plan.batch_size,
        device=hardware.device.type, name=name_of(hardware.device),
    )  # fmt: skip
    tokens = float(lengths.mean()) * min(plan.batch_size, len(lengths)) * plan.num_updates
    rate = trainer.position.tokens / seconds
    time_left = f"time: up to {duration(tokens / rate)} for {plan.num_updates:,} updates"
    first = f"the first took {duration(seconds)}, at {rate:,.0f} tokens/s"
    memory = in_words(estimate(layout_of(trainer.model), machine, setting), machine, setting)
    return memory + "\n" + wrapped([f"{time_left}; {first}"])


def described(trainer: Trainer) -> str:
    """The model's size, the data and the planned updates, in words."""
    model, data, plan = trainer.model, trainer.data, trainer.plan
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = "" if trained == model.num_parameters else f", {trained:,} of them trained"
    heads = f"{model.num_heads} heads" if model.num_heads > 1 else "1 head"
    hardware = trainer.hardware
    size = hardware.processes.size
    where = f"{hardware.device.type}, {size} processes ({hardware.strategy})" if size > 1 else str(hardware.device)
    return (
        f"{model.num_parameters:,} parameters{frozen}, {heads}, on {where}\n"
        f"{len(data.train):,} training and {len(data.validation):,} validation samples\n"
        f"{plan.num_updates:,} updates of {plan.batch_size} samples"
    )
