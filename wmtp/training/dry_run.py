"""A dry run, which prints the config and runs one update and one validation batch of every stage."""

import gc
import time
from pathlib import Path
from textwrap import fill

from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer

from wmtp.algorithms.base import Algorithm
from wmtp.checkpoint.store import CheckpointStore
from wmtp.data.dataset import Dataset
from wmtp.distributed.process_group import Processes
from wmtp.models.shapes import ModelShape, model_shape
from wmtp.objectives.mtp import MtpObjective
from wmtp.runtime.console import Console
from wmtp.runtime.run_dir import PRETRAIN
from wmtp.training.builders import (
    build_objective,
    build_policy,
    build_sample_evaluation,
    build_trainer,
)
from wmtp.training.estimate.memory import GB, Machine, ParallelSetting, memory
from wmtp.training.plan import Plan
from wmtp.training.references import METRIC, with_placeholder_losses
from wmtp.training.stage_results import read_stage_result
from wmtp.training.start import (
    NO_STAGE,
    build_stage,
    build_stage_trainer,
    find_stage_result,
    load_stage_model,
    read_components,
    restore_latest,
)
from wmtp.training.trainer import Trainer


def dry_run(config: DictConfig, folder: Path, algorithm: Algorithm | None = None) -> None:
    """Print the config, and run one update and one validation batch of every stage that is not finished.

    If the config names a run to resume, each stage starts from the latest checkpoint of that run. No checkpoint, metric
    or summary is written.

    Raises:
        InputError: the run cannot start or cannot be resumed with this config.
        SandboxUnavailable: the config names a sandbox that cannot be used.
    """
    console = Console(quiet=not Processes().is_main)
    console.print(OmegaConf.to_yaml(config, resolve=True), highlight=False)
    folder = folder if config.resume is None else Path(config.resume).absolute()
    components = read_components(config, folder, algorithm)
    stage = build_stage(config, components)
    stage_model = None
    if stage is None and config.pretrain is not None:
        console.print(NO_STAGE, highlight=False)
    if stage is not None:
        source = find_stage_result(folder, config, stage)
        if source is None:
            trainer = build_stage_trainer(config, folder / PRETRAIN, components, stage, with_columns=False)
            restore_latest(trainer, config, CheckpointStore(folder / PRETRAIN))
            console.print(f"Stage 1, {type(stage).__name__}:", highlight=False)
            _run_one_update(console, trainer)
            del trainer
            gc.collect()
        else:
            result = read_stage_result(Path(source))
            assert result is not None
            stage_model = load_stage_model(Path(source) / result["saved"], config, components, stage)
    data = components.data
    if components.algorithm.needs_reference:
        data = with_placeholder_losses(config, components, stage_model)
    if stage is None or not stage.trains_policy:
        stage_model = None
    model = build_policy(config, components, stage_model)
    objective = build_objective(config, components, data, stage)
    samples = build_sample_evaluation(config, folder, components)
    trainer = build_trainer(config, folder, components.hardware, data, model, objective, samples)
    restore_latest(trainer, config, CheckpointStore(folder))
    ran = _run_one_update(console, trainer)
    console.print(f"The config is valid; {ran}. Nothing was saved.", soft_wrap=True, highlight=False)


def _run_one_update(console: Console, trainer: Trainer) -> str:
    """Run one update and one validation batch, if there are any, and return a clause that says what ran."""
    console.print(describe_training(trainer), soft_wrap=True, highlight=False)
    if trainer.is_finished:
        return "no update is left, so none ran"
    step, tokens, started = trainer.position.step, trainer.position.tokens, time.perf_counter()
    metrics = trainer.train_update()
    seconds = time.perf_counter() - started
    has_validation = len(trainer.data.validation) > 0
    if has_validation:
        trainer.validate(max_batches=1)
        metrics |= trainer.last_validation
    objective = trainer.objective
    if isinstance(objective, MtpObjective) and objective.algorithm.needs_reference:
        metrics.pop(f"val/{METRIC}", None)
        console.print("  the weights are those for reference losses of 0, which are not computed", highlight=False)
    for name, value in metrics.items():
        console.print(f"  {name:30} {value:.4g}", highlight=False)
    rate = (trainer.position.tokens - tokens) / seconds
    console.print(
        describe_cost(trainer, trainer.plan.num_updates - step, seconds, rate), soft_wrap=True, highlight=False
    )
    return (
        "one update and one validation batch ran"
        if has_validation
        else "one update ran (there are no validation samples)"
    )


def describe_cost(trainer: Trainer, num_updates: int, seconds: float, rate: float) -> str:
    """Return a text with the expected memory and the expected time of the next `num_updates` updates.

    The memory is estimated for batches that contain only the longest samples. The time is extrapolated from the first
    update, which took `seconds` at `rate` tokens per second.
    """
    hardware, plan, lengths = trainer.hardware, trainer.plan, trainer.data.train.samples.lengths
    objective = trainer.objective
    setting = ParallelSetting(
        hardware.strategy, hardware.activation_checkpointing, hardware.reduce_each_micro_batch,
        min(plan.micro_batch_size, len(lengths)), hardware.precision, moments_per_parameter(trainer.optimizer),
        isinstance(objective, MtpObjective) and objective.algorithm.scales_heads_in_one_pass,
    )  # fmt: skip
    machine = Machine(
        hardware.processes.size, sequence=int(lengths.max()), batch_size=plan.batch_size,
        device=hardware.device.type,
    )  # fmt: skip
    tokens = float(lengths.mean()) * min(plan.batch_size, len(lengths)) * num_updates
    time_left = f"time: up to {format_duration(tokens / rate)} for {num_updates:,} updates"
    first = f"the first took {format_duration(seconds)}, at {rate:,.0f} tokens/s"
    uses = format_memory(memory(model_shape(trainer.model), machine, setting), machine, setting)
    return wrap_lines(uses, f"{time_left}; {first}")


def wrap_lines(*lines: str) -> str:
    """Return lines of text, each of which is wrapped at 80 characters."""
    return "\n".join(fill(line, 80, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def describe_training(trainer: Trainer) -> str:
    """Return lines of text, which describe the model with its hardware, the samples, and the planned updates."""
    hardware, plan, step = trainer.hardware, trainer.plan, trainer.position.step
    size = hardware.processes.size
    devices = f"{hardware.device.type}, {size} processes ({hardware.strategy})" if size > 1 else str(hardware.device)
    left = f", {max(0, plan.num_updates - step):,} of them left" if step else ""
    text = describe_stage(model_shape(trainer.model), devices, trainer.data, plan) + left
    history = trainer.objective.history if isinstance(trainer.objective, MtpObjective) else None
    if history is not None and plan.num_updates <= plan.updates_per_epoch:
        text += "\nall weights are 1, because there is no second epoch: increase num_epochs"
    return text


def describe_stage(shape: ModelShape, devices: str, data: Dataset, plan: Plan) -> str:
    """Return lines of text, which describe a model on devices, the samples, and the planned updates.

    If the tokens have labels, one of the lines contains their shares.
    """
    counts = shape.counted
    frozen = "" if counts.trained == counts.parameters else f", {counts.trained:,} of them trained"
    heads = f"{shape.num_heads} heads" if shape.num_heads > 1 else "1 head"
    labels = f"{describe_labels(data.label_shares)}\n" if data.label_shares else ""
    return (
        f"{counts.parameters:,} parameters{frozen}, {heads}, on {devices}\n"
        f"{describe_samples(data)}\n{labels}"
        f"{plan.num_updates:,} updates of {plan.batch_size} samples"
    )


def describe_samples(data: Dataset) -> str:
    """Return a line with the numbers of samples and test problems, and with what is not measured if there are none."""
    num_problems = len({record.task_id for record in data.test})
    text = (
        f"{len(data.train):,} training and {len(data.validation):,} validation samples, {num_problems:,} test problems"
    )
    missing = ["no val/loss and no best checkpoint"] if not len(data.validation) else []
    missing += ["no pass@1"] if not num_problems else []
    return f"{text}: {', '.join(missing)}" if missing else text


def describe_labels(shares: dict[str, float]) -> str:
    """Return a line with the shares of the labels among the tokens of the training solutions (see `label_shares`).

    >>> describe_labels({"noise": 0.7148, "decisive_correct": 0.0212, "decisive_incorrect": 0.0039, "other": 0.2601})
    'tokens of solutions: 71.5 % noise, 2.1 % decisive in correct and 0.4 % in incorrect ones, 26.0 % other'
    """
    noise, correct, incorrect, other = (
        f"{100 * shares[name]:.1f} %" for name in ("noise", "decisive_correct", "decisive_incorrect", "other")
    )
    decisive = f"{correct} decisive in correct and {incorrect} in incorrect ones"
    return f"tokens of solutions: {noise} noise, {decisive}, {other} other"


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
