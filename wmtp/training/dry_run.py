"""A dry run, which prints the config and runs one update and one validation batch of every stage."""

import gc
import time
from pathlib import Path
from textwrap import fill

import numpy as np
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch.optim import Optimizer

from wmtp.algorithms.base import Algorithm
from wmtp.distributed.process_group import Processes
from wmtp.models.shapes import model_shape
from wmtp.objectives.mtp import MtpObjective
from wmtp.runtime.run_dir import PRETRAIN
from wmtp.runtime.standard_streams import announce
from wmtp.training.builders import (
    build_components,
    build_policy,
    build_reference,
    build_stage,
    build_stage_trainer,
    build_trainer,
)
from wmtp.training.estimate import GB, Machine, ParallelSetting, memory
from wmtp.training.stage_results import require_same_stage
from wmtp.training.trainer import Trainer


def dry_run(config: DictConfig, folder: Path, algorithm: Algorithm | None = None) -> None:
    """Print the config, and run one update and one validation batch of every stage.

    No checkpoint, metric or summary is written.

    Raises:
        InputError: the data, the reference model or the stage 1 that `pretrain.reuse` names cannot be used.
    """
    console = Console(markup=False, quiet=not Processes().is_main)
    console.print(OmegaConf.to_yaml(config, resolve=True), highlight=False)
    announce("reading the data …")
    components = build_components(config, algorithm)
    stage = build_stage(config, components)
    if stage is not None:
        if stage.reuse is not None:
            require_same_stage(stage.reuse, config)
        trainer = build_stage_trainer(config, folder / PRETRAIN, components, stage, with_columns=False)
        console.print(f"Stage 1, {type(stage).__name__}:", highlight=False)
        _run_one_update(console, trainer)
        del trainer
        gc.collect()
    if components.algorithm.reference is not None:
        build_reference(config, components, None)
    data = components.data
    if components.algorithm.needs_reference:  # placeholder losses, because computing them takes long
        data = data.with_columns(reference_losses=[np.zeros(len(s.samples.tokens), np.float32) for s in data.splits])
    model, objective = build_policy(config, components, None), MtpObjective(components.algorithm)
    _run_one_update(console, build_trainer(config, folder, components.hardware, data, model, objective))
    console.print("The config is valid; one update and one validation batch ran. Nothing was saved.")


def _run_one_update(console: Console, trainer: Trainer) -> None:
    console.print(describe_training(trainer), soft_wrap=True, highlight=False)
    started = time.perf_counter()
    update = trainer.train_update()
    seconds = time.perf_counter() - started
    trainer.validate(max_batches=1)
    for name, value in (update | trainer.last_validation).items():
        console.print(f"  {name:30} {value:.4g}", highlight=False)
    console.print(describe_cost(trainer, seconds), soft_wrap=True, highlight=False)


def describe_cost(trainer: Trainer, seconds: float) -> str:
    """Return a text with the expected memory and the expected total time of the run.

    The memory is estimated for batches that contain only the longest samples. The time is extrapolated from the first
    update, which took `seconds`.
    """
    hardware, plan, lengths = trainer.hardware, trainer.plan, trainer.data.train.samples.lengths
    setting = ParallelSetting(
        hardware.strategy, hardware.activation_checkpointing, hardware.reduce_each_micro_batch,
        min(plan.micro_batch_size, len(lengths)), hardware.precision, moments_per_parameter(trainer.optimizer),
    )  # fmt: skip
    machine = Machine(
        hardware.processes.size, sequence=int(lengths.max()), batch_size=plan.batch_size,
        device=hardware.device.type,
    )  # fmt: skip
    tokens = float(lengths.mean()) * min(plan.batch_size, len(lengths)) * plan.num_updates
    rate = trainer.position.tokens / seconds
    time_left = f"time: up to {format_duration(tokens / rate)} for {plan.num_updates:,} updates"
    first = f"the first took {format_duration(seconds)}, at {rate:,.0f} tokens/s"
    uses = format_memory(memory(model_shape(trainer.model), machine, setting), machine, setting)
    return "\n".join(
        fill(line, 80, subsequent_indent="  ", break_on_hyphens=False) for line in (uses, f"{time_left}; {first}")
    )


def describe_training(trainer: Trainer) -> str:
    """Return three lines of text, which describe the model with its hardware, the samples, and the planned updates."""
    model, data, plan = trainer.model, trainer.data, trainer.plan
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = "" if num_trained == model.num_parameters else f", {num_trained:,} of them trained"
    heads = f"{model.num_heads} heads" if model.num_heads > 1 else "1 head"
    hardware = trainer.hardware
    size = hardware.processes.size
    devices = f"{hardware.device.type}, {size} processes ({hardware.strategy})" if size > 1 else str(hardware.device)
    return (
        f"{model.num_parameters:,} parameters{frozen}, {heads}, on {devices}\n"
        f"{len(data.train):,} training and {len(data.validation):,} validation samples\n"
        f"{plan.num_updates:,} updates of {plan.batch_size} samples"
    )


def moments_per_parameter(optimizer: Optimizer) -> int:
    """Return the number of values that the optimizer stores for each parameter, for example 2 for Adam.

    The optimizer must have made its first step.
    """
    counts = [sum(getattr(x, "shape", None) == p.shape for x in state.values()) for p, state in optimizer.state.items()]
    return max(counts, default=0)


def format_memory(sizes: dict[str, float], machine: Machine, setting: ParallelSetting) -> str:
    """Return the result of the function `memory` as text, in MB or GB.

    Uses that need less than 0.05 of that unit are left out.
    """
    unit, name = (GB, "GB") if sizes["total"] >= GB else (1e6, "MB")
    uses = {use: f"{size / unit:,.1f}" for use, size in sizes.items() if use != "total"}
    uses = {use: size for use, size in uses.items() if size != "0.0"}
    if "gradients" in uses and machine.micro_batches(setting) == 1:
        uses["gradients"] += " (reuse activations)"
    batch = f"{setting.micro_batch_size} x {machine.sequence:,} tokens"
    uses_text = ", ".join(f"{use} {size}" for use, size in uses.items())
    return f"memory: about {sizes['total'] / unit:,.1f} {name} a process with {batch}: {uses_text}"


def format_duration(seconds: float) -> str:
    """Return a time as text with a suitable unit.

    >>> [format_duration(x) for x in (0.42, 59, 600, 86_000, 3_000_000)]
    ['0.4 s', '59 s', '10 min', '23.9 h', '34.7 days']
    """
    for size, name, decimals in ((86_400, "days", 1), (3_600, "h", 1), (60, "min", 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{decimals}f} {name}"
    return f"{seconds:.{0 if seconds >= 10 else 1}f} s"
