"""One run from its config to its end: its stages, resuming, trackers, samples, summary, status."""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from safetensors.torch import save_file

from wmtp.checkpoint.store import load
from wmtp.command import ending
from wmtp.compose import Parts, compose_model, compose_parts, compose_stage, compose_trainer, load_model_from
from wmtp.config import build, stage_config
from wmtp.errors import WmtpError
from wmtp.generation.samples import write_samples
from wmtp.models.mtp import MtpModel
from wmtp.objectives.mtp import MtpObjective
from wmtp.runtime.files import encode_json, replace_atomically
from wmtp.runtime.folder import ACCEPTED, RunStatus
from wmtp.runtime.seeding import seed_torch
from wmtp.stages import Stage
from wmtp.summary import print_summary, write_summary
from wmtp.tracking.base import State, Tracker
from wmtp.tracking.console import ConsoleTracker
from wmtp.tracking.jsonl import MetricsFile
from wmtp.trainer import Result, Trainer
from wmtp.weight_quality import weight_quality

log = logging.getLogger(__name__)
STAGE_RESULT = Path("pretrain") / "result.json"


class Run:
    """A run in its folder: the stage before, if there is one, and the training."""

    def __init__(self, config: DictConfig, folder: Path, status: RunStatus) -> None:
        self.config, self.folder, self.status = config, folder, status
        self.resolved = OmegaConf.to_yaml(config, resolve=True)
        self.console = Console(markup=False)
        self.remote: list[Tracker] = []
        self.accepted = False

    def train(self) -> float | None:
        """Train to the end and leave everything in the folder; returns the last validation loss."""
        try:
            trainer, stage_result = self._prepare()
            result = self._fit(trainer, self.folder)
            summary = self._summarise(trainer, result, stage_result)
        except BaseException as error:
            for problem in close(self.remote, ending(error)[1]):
                log.warning("%s", problem)
            raise
        problems = close(self.remote, "FINISHED")
        uri = getattr(self.remote[0], "uri", None) if self.remote else None
        print_summary(self.console, self.folder, summary, uri)
        self.status.stop_reason = result.stop_reason
        if problems:
            raise problems[0]
        return result.final_loss

    def _prepare(self) -> tuple[Trainer, dict[str, Any] | None]:
        """The trainer at the position to go on from, after the stage before; and that stage's result."""
        parts = compose_parts(self.config)
        stage = compose_stage_options(self.config, parts)
        stage_model, stage_result = (None, None) if stage is None else self._stage(stage, parts)
        model, reference = compose_policy(self.config, parts, stage, stage_model)
        if reference is not None:
            self._say("reading the reference's losses, or computing them …")
            parts.columns.attach_reference_losses(reference, parts.data)
        objective = MtpObjective(parts.algorithm)
        trainer = compose_trainer(self.config, self.folder, parts.hardware, parts.data, model, objective)
        if self.config.resume is not None and trainer.checkpoints.any():
            self._restore(trainer)
        self._accept()
        self._say(f"{described(trainer)}\nThe run lies in {self.folder}")
        return trainer, stage_result

    def _stage(self, stage: Stage, parts: Parts) -> tuple[MtpModel, dict[str, Any]]:
        """The model of the stage before: trained now, trained before, or taken over from another run."""
        source = self.folder if stage.reuse is None else stage.reuse
        if stage.reuse is not None or (self.folder / STAGE_RESULT).exists():
            result: dict[str, Any] = read_stage_result(source)
            checkpoint = source / str(result["saved"])
            return load_model_from(checkpoint, parts), result | {"saved": str(checkpoint)}
        trainer = compose_stage(self.config, self.folder, parts, stage)
        if self.config.resume is not None and trainer.checkpoints.any():
            self._restore(trainer)
        self._accept()
        self._say(f"The stage before the training, {type(stage).__name__}:\n{described(trainer)}")
        fitted = self._fit(trainer, self.folder / "pretrain")
        for split in (trainer.data.train, trainer.data.validation):
            split.hidden_states = None  # the training that follows has no use for them
        saved = trainer.checkpoints.best() or trainer.checkpoints.latest()
        model = load_model_from(saved, parts, trainer.model)
        if stage.save_value_head:
            assert model.value_head is not None
            save_file(model.value_head.state_dict(), self.folder / "pretrain" / "value_head.safetensors")
        outcome = asdict(fitted) | {"saved": str(saved.relative_to(self.folder))}
        replace_atomically(self.folder / STAGE_RESULT, encode_json(outcome))
        return model, outcome

    def _fit(self, trainer: Trainer, folder: Path) -> Result:
        """Train one stage, and write its metrics to its folder."""
        folder.mkdir(exist_ok=True)
        plan, step = trainer.plan, trainer.position.step
        trackers: list[Tracker] = [
            MetricsFile(folder, step),
            ConsoleTracker(self.console, plan.num_updates, plan.updates_per_epoch, step),
        ]
        try:
            result = trainer.fit([*trackers, *self.remote])
            if result.stop_reason is not None:
                self._say(f"stopped early after update {result.total_steps}: {result.stop_reason}")
            return result
        finally:
            self.status.step = trainer.position.step
            for problem in close(trackers, "RUNNING"):
                log.warning("%s", problem)

    def _restore(self, trainer: Trainer) -> None:
        """Go on from the latest checkpoint."""
        checkpoint = trainer.checkpoints.latest()
        trainer.restore(load(checkpoint))
        if trainer.best_step is not None and trainer.best_loss is not None:  # a crash can leave a later mark
            trainer.checkpoints.mark_best(trainer.best_step, trainer.best_loss)
        self._say(f"resuming from {checkpoint}")

    def _accept(self) -> None:
        """Nothing speaks against this run, or against going on with it: record its config, open the tracker."""
        if self.accepted:
            return
        self.accepted = True
        replace_atomically(self.folder / "config.yaml", self.resolved.encode())
        replace_atomically(self.folder / ACCEPTED, encode_json(list(HydraConfig.get().overrides.task)))
        if self.config.pretrain is not None:
            (self.folder / "pretrain").mkdir(exist_ok=True)
            stage_settings = OmegaConf.to_yaml(stage_config(self.config), resolve=True)
            replace_atomically(self.folder / "pretrain" / "config.yaml", stage_settings.encode())
        if self.config.tracking is not None:
            name = self.config.run_name or self.folder.name
            tags = {str(key): str(value) for key, value in self.config.tags.items()}
            parameters = flattened(self.config)
            self.remote.append(
                build(self.config.tracking, folder=self.folder, run_name=name, parameters=parameters, tags=tags)
            )

    def _summarise(self, trainer: Trainer, result: Result, stage_result: dict[str, Any] | None) -> dict[str, Any]:
        """samples.jsonl, summary.json and what they need."""
        objective = trainer.objective
        assert isinstance(objective, MtpObjective)
        if self.config.num_samples:
            write_samples(self.folder, trainer.model, trainer.data, result.total_steps, self.config.num_samples)
        extras = {
            "config_hash": hashlib.sha256(self.resolved.encode()).hexdigest(),
            "pretrain": stage_result,
            "weights": weight_quality(objective, trainer.model, trainer.data, trainer.hardware),
        }
        return write_summary(self.folder, trainer, result, extras)

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)


def read_stage_result(folder: Path) -> dict[str, Any]:
    """The result of a run's stage before the training."""
    path = folder / STAGE_RESULT
    if not path.exists():
        raise WmtpError(f"{path}: is missing; pretrain.reuse names the folder of a run whose stage was finished")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def compose_stage_options(config: DictConfig, parts: Parts) -> Stage | None:
    """The stage before the training; a reference that was named needs none."""
    if config.pretrain is None or parts.algorithm.reference is not None:
        return None
    stage: Stage = build(config.pretrain)
    return stage


def compose_policy(
    config: DictConfig, parts: Parts, stage: Stage | None, stage_model: MtpModel | None
) -> tuple[MtpModel, MtpModel | None]:
    """The model to be trained, and the frozen reference if the algorithm needs one."""
    algorithm, reference = parts.algorithm, None
    if algorithm.needs_reference:
        given = stage_model if algorithm.reference is None else load_model_from(algorithm.reference, parts)
        assert given is not None
        reference = given.eval().requires_grad_(False)
    if stage is not None and stage.trains_policy and stage_model is not None:
        model = stage_model.requires_grad_(True)
        if not algorithm.needs_values:
            model.value_head = None
        seed_torch(config.seed)  # a run that finds its stage done draws the same dropout
        return model, reference
    return compose_model(config, parts, values=algorithm.needs_values), reference


def rehearse(config: DictConfig, folder: Path) -> None:
    """Print what would be trained, and try one update and one validation batch of every stage."""
    console = Console(markup=False)
    console.print(OmegaConf.to_yaml(config, resolve=True), highlight=False)
    parts = compose_parts(config)
    stage, stage_model = compose_stage_options(config, parts), None
    if stage is not None:
        trainer = compose_stage(config, folder, parts, stage)
        console.print("The stage before the training:", highlight=False)
        _try(console, trainer)
        stage_model = trainer.model
    model, reference = compose_policy(config, parts, stage, stage_model)
    if reference is not None:  # its losses are not worth computing here: any number will do
        for split in (parts.data.train, parts.data.validation):
            split.reference_losses = np.zeros(len(split.samples.tokens), np.float32)
    objective = MtpObjective(parts.algorithm)
    _try(console, compose_trainer(config, folder, parts.hardware, parts.data, model, objective))
    console.print("The config is sound; one update and one validation batch ran. Nothing was kept.")


def _try(console: Console, trainer: Trainer) -> None:
    console.print(described(trainer), soft_wrap=True, highlight=False)
    update = trainer.train_update()
    trainer.validate(max_batches=1)
    for name, value in (update | trainer.last_validation).items():
        console.print(f"  {name:30} {value:.4g}", highlight=False)


def described(trainer: Trainer) -> str:
    """The model's size, the data and the planned updates, in words."""
    model, data, plan = trainer.model, trainer.data, trainer.plan
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = "" if trained == model.num_parameters else f", {trained:,} of them trained"
    return (
        f"{model.num_parameters:,} parameters{frozen}, {model.num_heads} heads, on {trainer.hardware.device}\n"
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
