"""One run from its config to its end: its stages, resuming, trackers, samples, summary, status."""

import gc
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from safetensors.torch import save_file

from wmtp.checkpoint.state import Snapshot, Tensors
from wmtp.checkpoint.store import CheckpointStore, load
from wmtp.cli.runner import ending
from wmtp.config.defaults import changes
from wmtp.config.schema import stage_config
from wmtp.distributed.process_group import Processes
from wmtp.models.loading import MODEL_FOLDER, compose_source, load_weights
from wmtp.models.mtp import MtpModel
from wmtp.objectives.mtp import MtpObjective
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import ACCEPTED, PRETRAIN, RESUMES, Ending
from wmtp.tracking.base import Tracker
from wmtp.tracking.console import ConsoleTracker
from wmtp.tracking.jsonl import MetricsFile
from wmtp.training.builders import (
    Parts,
    compose_held_out,
    compose_parts,
    compose_policy,
    compose_reference,
    compose_stage,
    compose_stage_trainer,
    compose_trainer,
)
from wmtp.training.dry_run import described
from wmtp.training.provenance import identify, write_provenance
from wmtp.training.stage_results import read_result, require_unchanged, take_over, write_record, write_result
from wmtp.training.stages import Stage
from wmtp.training.summary import print_summary, write_summary
from wmtp.training.token_report import MEASURES, measure_tokens, weight_quality, write_token_report
from wmtp.training.trainer import Result, Trainer, interruption
from wmtp.training.uploads import Delivery, close, conclude, open_deliveries, pending

log = logging.getLogger(__name__)


class Run:
    """A run in its folder: the stage before, if there is one, and the training."""

    def __init__(self, config: DictConfig, folder: Path, ending: Ending, overrides: Sequence[str]) -> None:
        """`overrides` are what the user typed; `ending` is told how far the run came."""
        config = with_absolute_path(config)
        self.config, self.folder, self.ending, self.overrides = config, folder, ending, list(overrides)
        self.processes = Processes()
        self.resolved = OmegaConf.to_yaml(config, resolve=True)
        self.console = Console(markup=False, quiet=not self.processes.is_main)
        self.deliveries: list[Delivery] = []
        self.stage_result: dict[str, Any] | None = None
        self.is_accepted = False
        self.stores: list[CheckpointStore] = []
        """Where the checkpoints of each stage are, from the first one on."""

    def train(self) -> float | None:
        """Train to the end and leave everything in the folder; returns the last validation loss.

        All processes do the same, but only the first prints, tracks and writes.
        """
        try:
            trainer = self._prepare()
            result = self._fit(trainer, self.folder)
            extras = self._conclude(trainer, result)
            summary = self.processes.from_main(lambda: write_summary(self.folder, trainer, result, extras))
            self._draw("FINISHED", 0)
        except BaseException as error:
            code, state = ending(error)
            if self.processes.is_main:  # now, since the log and the pictures are among what is delivered
                log.info("it ended: %s", state, exc_info=error)
                self.ending.logged = error
                self._draw(state, code, str(error) or type(error).__name__)
            for problem in conclude(self.deliveries, state):
                log.warning("%s", problem)
            raise
        problems = conclude(self.deliveries, "FINISHED")
        for store in self.stores:
            store.prune()
        if self.processes.is_main:
            print_summary(self.console, self.folder, summary, longer(self.config, result))
        self.ending.stop_reason = result.stop_reason
        if problems:
            raise pending(problems)
        return result.final_loss

    def _prepare(self) -> Trainer:
        """The trainer of the training, at the position to go on from, after the stage before."""
        self._say(f"The run lies in {self.folder}")
        parts = compose_parts(self.config)
        stage = compose_stage(self.config, parts)
        model = self._policy(stage, parts)
        self.held_out = compose_held_out(self.config, self.folder, parts)
        objective = MtpObjective(parts.algorithm)
        trainer = compose_trainer(self.config, self.folder, parts.hardware, parts.data, model, objective, self.held_out)
        self._restore(trainer)
        self.held_out.forget_after(trainer.position.step)
        self._accept(parts)
        if stage is not None:
            self._say("The training:")
        self._say(described(trainer))
        return trainer

    def _policy(self, stage: Stage | None, parts: Parts) -> MtpModel:
        """The model to be trained. The reference, if there is one, is done for when its losses are known."""
        stage_model = None if stage is None else self._stage_model(stage, parts)
        reference = compose_reference(self.config, parts, stage_model)
        if reference is not None:
            self._say("reading the reference's losses, or computing them …")
            parts.columns.attach_reference_losses(reference, parts.data)
        del reference
        if stage is None or not stage.trains_policy:
            stage_model = None
        return compose_policy(self.config, parts, stage_model)

    def _stage_model(self, stage: Stage, parts: Parts) -> MtpModel:
        """The model that the stage before leaves: trained now or earlier, or taken over from another run."""
        self.processes.together(lambda: require_unchanged(self.folder, self.config))
        if self.processes.from_main(lambda: read_result(self.folder)) is None:
            if stage.reuse is None:
                self._train_stage(stage, parts)
                gc.collect()  # a model that processes share refers to itself, and would lie beside the next one
            else:
                reused = stage.reuse
                self.processes.from_main(lambda: take_over(reused, self.folder, self.config))
        self.stage_result = self.processes.from_main(lambda: read_result(self.folder))
        assert self.stage_result is not None
        saved = self.folder / self.stage_result["saved"]
        self._say(f"the stage before the training left {saved}")
        source = compose_source(stage_config(self.config).model, parts.tokenizer, Path(self.config.cache_dir))
        model = source.blank()
        if stage.trains_policy:
            model.add_value_head()
        return load_weights(saved, model, parts.tokenizer, parts.hardware)

    def _train_stage(self, stage: Stage, parts: Parts) -> None:
        """Run the stage before to its end, and record what it leaves."""
        folder = self.folder / PRETRAIN
        trainer = compose_stage_trainer(self.config, folder, parts, stage)
        self._restore(trainer)
        self._accept(parts)
        self.processes.from_main(lambda: write_record(self.folder, self.config))
        self.processes.from_main(lambda: self._keep_model(stage_config(self.config), folder, parts))
        self._say(f"The stage before the training, {type(stage).__name__}:\n{described(trainer)}")
        result = self._fit(trainer, folder)
        if result.stop_reason is not None:
            self._say(f"stopped early after update {result.total_steps}: {result.stop_reason}")
        for split in (trainer.data.train, trainer.data.validation):
            split.hidden_states = None  # the training that follows has no use for them
        saved = trainer.checkpoints.best() or trainer.checkpoints.latest()
        if stage.saves_value_head:
            head = value_head_of(load(saved, optimizer=False, verified=True))  # this process has just written it
            self.processes.from_main(lambda: save_file(head, folder / "value_head.safetensors"))
        record = asdict(result) | {"saved": str(saved.relative_to(self.folder))}
        self.processes.from_main(lambda: write_result(self.folder, record))
        if trainer.interrupted_by is not None:
            raise interruption(trainer)

    def _fit(self, trainer: Trainer, folder: Path) -> Result:
        """Train one stage, and write its metrics to its folder."""
        plan, step = trainer.plan, trainer.position.step
        self.stores.append(trainer.checkpoints)
        trackers: list[Tracker] = []
        if self.processes.is_main:
            trackers = [
                MetricsFile(folder, step),
                ConsoleTracker(self.console, plan.num_updates, plan.updates_per_epoch, step),
            ]
        try:
            return trainer.fit([*trackers, *self.deliveries])
        finally:
            self.ending.step = trainer.position.step
            for problem in close(trackers, "RUNNING"):
                log.warning("%s", problem)

    def _restore(self, trainer: Trainer) -> None:
        """Go on from the latest checkpoint, if this is a resumed run that has one."""
        if self.config.resume is None or not trainer.checkpoints.any():
            return
        checkpoint = trainer.checkpoints.latest()
        snapshot = load(checkpoint, dict(trainer.model.named_parameters()), verified=True)
        changes = trainer.restore(snapshot, self.config.resume_override)
        self.processes.from_main(lambda: self._record_resume(checkpoint, changes))
        if trainer.best_step is not None and trainer.best_loss is not None:  # a crash can leave a later mark
            trainer.checkpoints.mark_best(trainer.best_step, trainer.best_loss)
        self._say(f"resuming from {checkpoint}")

    def _accept(self, parts: Parts) -> None:
        """Nothing speaks against this run, or against going on with it: record what it is, begin to deliver it."""
        if not self.processes.is_main or self.is_accepted:
            return
        self.is_accepted = True
        replace_atomically(self.folder / "config.yaml", self.resolved.encode())
        replace_atomically(self.folder / ACCEPTED, encode_json(self.overrides))
        self._keep_model(self.config, self.folder, parts)
        identify(self.folder, self.config.checkpoint.get("remote"))
        write_provenance(self.folder, self.overrides, changes(self.config, "train"), parts.data)
        self.deliveries = open_deliveries(self.config, self.folder, self.console, is_training=True)

    def _keep_model(self, config: DictConfig, folder: Path, parts: Parts) -> None:
        """Put what describes a pretrained model beside the config that names it."""
        source = compose_source(config.model, parts.tokenizer, Path(config.cache_dir))
        for name, content in source.files().items():
            (folder / MODEL_FOLDER).mkdir(exist_ok=True)
            replace_atomically(folder / MODEL_FOLDER / name, content)

    def _record_resume(self, checkpoint: Path, changes: dict[str, str]) -> None:
        """Append to the run's record where it goes on, in how many processes, and what was declared to change."""
        line = {"checkpoint": str(checkpoint.relative_to(self.folder)), "processes": self.processes.size}
        with (self.folder / RESUMES).open("a") as file:
            file.write(json.dumps({"time": time.time(), **line, "declared_changes": changes}) + "\n")
        for name, change in changes.items():
            log.warning("declared to have changed: %s: %s", name, change)

    def _conclude(self, trainer: Trainer, result: Result) -> dict[str, Any]:
        """The last samples, and what the summary says besides what the trainer knows."""
        objective, data = trainer.objective, trainer.data
        assert isinstance(objective, MtpObjective)
        measured = measure_tokens(objective, trainer.model, data, trainer.hardware)
        self.processes.from_main(lambda: write_token_report(self.folder, measured, data, result.total_steps))
        return {
            "pass@1": self._pass_rate(trainer, result),
            "config_hash": hashlib.sha256(self.resolved.encode()).hexdigest(),
            "pretrain": self.stage_result,
            "peak_memory_bytes": int(self.processes.largest(trainer.hardware.peak_memory())[0]),
            "weights": weight_quality(measured[:, MEASURES.index("weight")], data),
        }

    def _draw(self, state: str, exit_code: int, error: str | None = None) -> None:
        """Write report.html, if it is wanted; a run is none the worse without."""
        if not (self.config.report and self.processes.is_main and self.is_accepted):
            return
        from wmtp.report.run_report import write_run_page  # imports matplotlib, which takes a second

        now = datetime.now().astimezone().isoformat(timespec="seconds")
        about = {"state": state, "exit_code": exit_code, "error": error, "step": self.ending.step, "ended": now}
        try:
            write_run_page(self.folder, about)
        except Exception as error:
            log.warning("report.html could not be written: %s: %s", type(error).__name__, error, exc_info=True)

    def _pass_rate(self, trainer: Trainer, result: Result) -> dict[str, Any] | None:
        with trainer.hardware.autocast():
            return self.held_out.conclude(trainer.model, result.total_steps)

    def _say(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)


def with_absolute_path(config: DictConfig) -> DictConfig:
    """The config with the folder of a pretrained model as it is found from anywhere."""
    path = config.model.get("path")
    if path is None:
        return config
    config = config.copy()
    config.model.path = str(Path(path).absolute())
    return config


def value_head_of(snapshot: Snapshot) -> Tensors:
    """The tensors of the value head, by the names that they have in it."""
    prefix = "value_head."
    return {name.removeprefix(prefix): x for name, x in snapshot.model.items() if name.startswith(prefix)}


def longer(config: DictConfig, result: Result) -> str:
    """An override that makes a resumed run go on."""
    if result.stop_reason is not None:
        return "early_stopping=none"
    return f"max_steps={2 * config.max_steps}" if config.max_steps else f"num_epochs={2 * config.num_epochs:g}"
