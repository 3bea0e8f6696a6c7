"""The result of a dry run for hardware that this machine lacks: memory and time, calculated without any update."""

import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from wmtp.algorithms.base import Algorithm
from wmtp.config.schema import build, stage_config
from wmtp.data.dataset import Dataset
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import wanted_device
from wmtp.models.loading import build_source
from wmtp.models.mtp import empty_model
from wmtp.models.shapes import ModelShape, model_shape
from wmtp.runtime.console import Console
from wmtp.training.builders import build_components
from wmtp.training.dry_run import (
    describe_stage,
    format_duration,
    format_memory,
    moments_per_parameter,
    wrap_lines,
)
from wmtp.training.estimate.memory import ParallelSetting, memory
from wmtp.training.estimate.speed import Cluster, speed
from wmtp.training.optim import try_optimizer
from wmtp.training.plan import Plan
from wmtp.training.stages import Stage
from wmtp.training.start import build_stage, build_stage_data
from wmtp.training.validate import lacking_hardware

LEAST_UPDATE_S = 0.1
"""Seconds per update below which the overhead of starting kernels, which is not calculated, determines the time."""
THIS_MACHINE = {"device": "cpu", "num_processes": 1, "strategy": "single"}
"""Settings of the group `hardware` with which the data are read."""


def estimate_run(config: DictConfig, algorithm: Algorithm | None = None) -> None:
    """Print the config, and the memory and the time of every stage, calculated from its model and its data.

    Models are built on the meta device, so a model needs no memory and no weights are read.

    Raises:
        InputError: the data cannot be used.
    """
    console = Console()
    console.print(OmegaConf.to_yaml(config, resolve=True), highlight=False)
    here = OmegaConf.merge(config, {"hardware": THIS_MACHINE})
    assert isinstance(here, DictConfig)
    components = build_components(here, algorithm)
    tokenizer, stage = components.tokenizer, build_stage(config, components)
    if stage is not None and stage.reuse is None:
        settings = stage_config(config)
        shape = planned_shape(settings, tokenizer, stage)
        text = describe_estimate(settings, build_stage_data(here, components, stage), shape, stage)
        console.print(f"Stage 1, {type(stage).__name__}:\n{text}", soft_wrap=True, highlight=False)
    part = components.algorithm
    shape = planned_shape(config, tokenizer, part)
    console.print(describe_estimate(config, components.data, shape, part), soft_wrap=True, highlight=False)
    lacking = lacking_hardware(config)
    assert lacking is not None
    console.print("The config is valid for other hardware; no update ran. Nothing was saved.", highlight=False)
    untried = "" if config.resume is None else " Whether the run can be resumed with this config was not checked."
    print(
        f"WARNING: hardware.{lacking[0]}={config.hardware[lacking[0]]}: {lacking[1]}. "
        f"Without dry_run=true, this command ends with exit code 2 here.{untried}",
        file=sys.stderr,
    )


def planned_shape(config: DictConfig, tokenizer: Tokenizer | None, part: Stage | Algorithm) -> ModelShape:
    """Return the sizes of the model of a config, without reading or creating its weights.

    Args:
        config: the config of the run or of stage 1.
        tokenizer: the tokenizer of a new model. A pretrained model needs none.
        part: stage 1, which may add modules and freeze parameters, or the algorithm of stage 2.
    """
    source = build_source(config.model, tokenizer, Path(config.cache_dir))
    model = empty_model(source.architecture(), source.lora, source.value_head_dim)
    with torch.device("meta"):
        if not isinstance(part, Algorithm):
            part.add_modules(model)
            part.freeze(model)
        elif part.needs_values:
            model.add_value_head(part.value)
    return model_shape(model)


def describe_estimate(config: DictConfig, data: Dataset, shape: ModelShape, part: Stage | Algorithm) -> str:
    """Return the description of a stage, with its memory and, for GPUs, its time.

    The memory is that of batches that contain only the longest samples. `part` is stage 1 or the algorithm of stage 2.
    """
    hardware, lengths = config.hardware, data.train.samples.lengths
    size, device = int(hardware.num_processes), wanted_device(hardware.device)
    plan: Plan = build(config, Plan, num_samples=len(data.train), num_processes=size)
    setting = ParallelSetting(
        hardware.strategy if size > 1 else "single", hardware.activation_checkpointing,
        hardware.reduce_each_micro_batch, min(plan.micro_batch_size, len(lengths)), hardware.precision,
        moments_per_parameter(try_optimizer(config.optimizer)),
        isinstance(part, Algorithm) and part.scales_heads_in_one_pass,
        part.additional_pass if isinstance(part, Algorithm) else "none",
    )  # fmt: skip
    machine = Cluster(size, int(lengths.max()), plan.batch_size, device)
    devices = f"{device}, {size} processes ({hardware.strategy})" if size > 1 else device
    uses = format_memory(memory(shape, machine, setting), machine, setting)
    time = "time: unknown before the first update there"
    if device == "cuda":
        found = speed(shape, machine, setting)
        # if only the value head is trained, later epochs read the cached states of the trunk
        epochs = 1.0 if shape.trains_values_only else plan.num_updates / plan.updates_per_epoch
        least, most = (format_duration(epochs * float(lengths.sum()) / rate) for rate in (found.fast, found.slow))
        time = f"time: {least} to {most} for {plan.num_updates:,} updates on A100 GPUs, calculated from FLOPs"
        if epochs * float(lengths.sum()) / found.fast < LEAST_UPDATE_S * plan.num_updates:
            time = "time: unknown, because this model is too small to keep A100 GPUs busy"
    return f"{describe_stage(shape, devices, data, plan)}\n{wrap_lines(uses, time)}"
