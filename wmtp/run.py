"""One run from its built trainer to its end: resuming, trackers, samples, summary, status."""

import hashlib
import logging
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from wmtp.checkpoint.store import load
from wmtp.command import ending
from wmtp.config import build
from wmtp.errors import WmtpError
from wmtp.generation.samples import write_samples
from wmtp.runtime.files import encode_json, replace_atomically
from wmtp.runtime.folder import ACCEPTED, RunStatus
from wmtp.summary import print_summary, write_summary
from wmtp.tracking.base import State, Tracker
from wmtp.tracking.console import ConsoleTracker
from wmtp.tracking.jsonl import MetricsFile
from wmtp.trainer import Trainer

log = logging.getLogger(__name__)


def run(config: DictConfig, trainer: Trainer, folder: Path, status: RunStatus) -> float | None:
    """Train to the end and leave everything in the run's folder; returns the last validation loss."""
    console = Console(markup=False)
    resolved = OmegaConf.to_yaml(config, resolve=True)
    if config.resume is not None:
        checkpoint = trainer.checkpoints.latest()
        trainer.restore(load(checkpoint))
        if trainer.best_step is not None and trainer.best_loss is not None:  # a crash can leave a later mark
            trainer.checkpoints.mark_best(trainer.best_step, trainer.best_loss)
        console.print(f"resuming from {checkpoint}", soft_wrap=True, highlight=False)
    replace_atomically(folder / "config.yaml", resolved.encode())
    replace_atomically(folder / ACCEPTED, encode_json(list(HydraConfig.get().overrides.task)))
    plan, position = trainer.plan, trainer.position
    console.print(f"{described(trainer)}\nThe run lies in {folder}", soft_wrap=True, highlight=False)

    trackers: list[Tracker] = [
        MetricsFile(folder, position.step),
        ConsoleTracker(console, plan.num_updates, plan.updates_per_epoch, position.step),
    ]
    uri = None
    if config.tracking is not None:
        name = config.run_name or folder.name
        tags = {str(key): str(value) for key, value in config.tags.items()}
        remote = build(config.tracking, folder=folder, run_name=name, parameters=flattened(config), tags=tags)
        trackers.append(remote)
        uri = remote.uri
    try:
        result = trainer.fit(trackers)
        if config.num_samples:
            write_samples(folder, trainer.model, trainer.data, result.total_steps, config.num_samples)
        config_hash = hashlib.sha256(resolved.encode()).hexdigest()
        summary = write_summary(folder, trainer, result, config_hash)
    except BaseException as error:
        for problem in close(trackers, ending(error)[1]):
            log.warning("%s", problem)
        raise
    finally:
        status.step = trainer.position.step
    problems = close(trackers, "FINISHED")
    print_summary(console, folder, summary, uri)
    if problems:
        raise problems[0]
    return result.final_loss


def rehearse(config: DictConfig, trainer: Trainer) -> None:
    """Print what would be trained, and try one update and one validation batch."""
    console = Console(markup=False)
    console.print(OmegaConf.to_yaml(config, resolve=True), highlight=False)
    console.print(described(trainer), soft_wrap=True, highlight=False)
    update = trainer.train_update()
    trainer.validate(max_batches=1)
    for name, value in (update | trainer.last_validation).items():
        console.print(f"  {name:24} {value:.4g}", highlight=False)
    console.print("The config is sound; one update and one validation batch ran. Nothing was kept.")


def described(trainer: Trainer) -> str:
    """The model's size, the data and the planned updates, in words."""
    model, data, plan = trainer.model, trainer.data, trainer.plan
    return (
        f"{model.num_parameters:,} parameters, {model.num_heads} heads, on {trainer.hardware.device}\n"
        f"{len(data.train):,} training and {len(data.validation):,} validation samples\n"
        f"{plan.num_updates:,} updates of {plan.batch_size} samples"
    )


def flattened(config: DictConfig) -> dict[str, Any]:
    """The config as one level of dotted keys."""
    flat: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                add(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            flat[prefix] = value

    add("", OmegaConf.to_container(config, resolve=True))
    return flat


def close(trackers: list[Tracker], state: State) -> list[Exception]:
    """Close every tracker; what went wrong with any of them is returned, so that all have their turn."""
    problems: list[Exception] = []
    for tracker in trackers:
        try:
            tracker.close(state)
        except (WmtpError, OSError) as problem:
            problems.append(problem)
    return problems
