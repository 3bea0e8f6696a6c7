"""A training run from its config to its results: both stages, resuming, trackers, samples, summary and report."""

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
from safetensors.torch import save

from wmtp.algorithms.base import Algorithm
from wmtp.checkpoint.state import Snapshot, Tensors
from wmtp.checkpoint.store import CheckpointStore, load
from wmtp.cli.runner import exit_state
from wmtp.config.defaults import changed_keys
from wmtp.config.schema import stage_config
from wmtp.config.trust import remember
from wmtp.data.dataset import Dataset
from wmtp.distributed.process_group import Processes
from wmtp.errors import InterruptedRun
from wmtp.evaluation.token_report import TOKEN_METRICS, measure_tokens, weight_quality, write_token_report
from wmtp.models.loading import MODEL_FOLDER, build_source
from wmtp.models.mtp import MtpModel
from wmtp.objectives.mtp import MtpObjective
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.console import Console
from wmtp.runtime.run_dir import PRETRAIN, RESUMES, SAVED_OVERRIDES, JobProgress
from wmtp.runtime.standard_streams import announce
from wmtp.tracking.base import Tracker
from wmtp.tracking.console import ConsoleTracker
from wmtp.tracking.jsonl import MetricsFile
from wmtp.tracking.mlflow import MlflowTracker
from wmtp.training.builders import (
    Components,
    build_objective,
    build_policy,
    build_sample_evaluation,
    build_trainer,
)
from wmtp.training.dry_run import describe_training
from wmtp.training.provenance import write_provenance, write_run_id
from wmtp.training.references import METRIC, measure_reference, warn_of_weak_reference, with_reference_losses
from wmtp.training.stage_results import (
    copy_stage,
    read_stage_result,
    write_stage_config,
    write_stage_result,
)
from wmtp.training.stages import Stage
from wmtp.training.start import (
    NO_STAGE,
    build_stage,
    build_stage_trainer,
    find_stage_result,
    load_stage_model,
    read_components,
    restore_latest,
)
from wmtp.training.summary import print_summary, write_summary
from wmtp.training.trainer import Result, Trainer, interruption_error
from wmtp.training.uploads import Uploader, close_all, close_trackers, open_uploaders, pending_error

log = logging.getLogger(__name__)


class Run:
    """A training run with its folder. It consists of stage 1, which is optional, and stage 2."""

    def __init__(
        self,
        config: DictConfig,
        folder: Path,
        progress: JobProgress,
        overrides: Sequence[str],
        algorithm: Algorithm | None = None,
    ) -> None:
        """Create a run.

        Args:
            config: the config of the run.
            folder: the folder of the run.
            progress: the object in which the last step and the reason for an early stop are stored.
            overrides: the overrides of the config, including those that a resumed run has saved.
            algorithm: the algorithm of the config, if the check of the config has built it in this process.
        """
        self.config, self.folder, self.progress, self.overrides = config, folder, progress, list(overrides)
        self.algorithm = algorithm
        self.processes = Processes()
        self.resolved = OmegaConf.to_yaml(config, resolve=True)
        self.console = Console(quiet=not self.processes.is_main)
        self.uploaders: list[Uploader] = []
        self.stage_result: dict[str, Any] | None = None
        self.is_recorded = False
        self.stores: list[CheckpointStore] = []
        """The checkpoint stores of the stages, in the order in which the stages were trained."""

    def train(self) -> float | None:
        """Train all stages, write the results to the run's folder, and return the last validation loss.

        All ranks must call this method. Only the main process prints and sends metrics to trackers.

        Raises:
            PendingError: the training succeeded, but some data was not uploaded to S3 or to the tracking server.
        """
        try:
            trainer = self._prepare()
            result = self._fit(trainer, self.folder)
            extras = self._final_results(trainer, result)
            summary = self.processes.run_on_main(lambda: write_summary(self.folder, trainer, result, extras))
            self._write_report("FINISHED", 0)
        except BaseException as error:
            code, state = exit_state(error)
            if self.processes.is_main:  # before the uploads are closed, so that the log and the report are uploaded
                log.info("the run ended with state %s", state, exc_info=error)
                self.progress.logged = error
                self._write_report(state, code, str(error) or type(error).__name__)
            try:
                for upload_error in close_all(self.uploaders, state):
                    log.warning("%s", upload_error)
            except InterruptedRun as interruption:  # it ends the uploads, but it is not how the run ended
                log.warning("%s during the last uploads; python -m wmtp.sync sends the rest", interruption)
            raise
        upload_errors = close_all(self.uploaders, "FINISHED")
        for store in self.stores:
            store.prune()
        if self.processes.is_main:
            longer = trainer.plan.longer_run_overrides(result.total_steps, result.early_stopped)
            print_summary(self.console, self.folder, summary, longer)
        self.progress.stop_reason = result.stop_reason
        if upload_errors:
            raise pending_error(upload_errors)
        return result.final_loss

    def _prepare(self) -> Trainer:
        """Train or load stage 1, and return the trainer of stage 2.

        If the run is resumed, the trainer starts from the state in the latest checkpoint.
        """
        self._print(f"Run folder: {self.folder}")
        components = read_components(self.config, self.folder, self.algorithm)
        stage = build_stage(self.config, components)
        if stage is None and self.config.pretrain is not None:
            self._print(NO_STAGE)
        announce("building the model …")
        model, data = self._prepare_policy(stage, components)
        self.sample_evaluation = build_sample_evaluation(self.config, self.folder, components)
        objective = build_objective(self.config, components, data, stage)
        trainer = build_trainer(
            self.config, self.folder, components.hardware, data, model, objective, self.sample_evaluation
        )
        self._restore(trainer)
        self.sample_evaluation.drop_after(trainer.position.step)
        if components.algorithm.needs_better_reference and trainer.position.step == 0:
            share = measure_reference(trainer)
            if share is not None:
                self._print(f"before training, the reference is better on {share:.1%} of the clean validation tokens")
            warn_of_weak_reference(share, "before training")
        self._record_start(components, data)
        if stage is not None:
            self._print("Stage 2, the training:")
        self._print(describe_training(trainer))
        return trainer

    def _prepare_policy(self, stage: Stage | None, components: Components) -> tuple[MtpModel, Dataset]:
        """Return the model and the data of stage 2.

        If the algorithm needs a reference model, its losses become a column of the data, and it is then removed from
        memory.
        """
        data = components.data
        stage_model = None if stage is None else self._stage_1_model(stage, components)
        if components.algorithm.needs_reference:
            self._print("loading the reference losses from the cache, or computing them …")
            data = with_reference_losses(self.config, components, stage_model)
        if stage is None or not stage.trains_policy:
            stage_model = None
        return build_policy(self.config, components, stage_model), data

    def _stage_1_model(self, stage: Stage, components: Components) -> MtpModel:
        """Return the trained model of stage 1.

        Stage 1 is trained or copied from another run, unless the run's folder already contains its result.
        """
        source = self.processes.run_on_main(lambda: find_stage_result(self.folder, self.config, stage))
        if source is None:
            self._train_stage_1(stage, components)
            gc.collect()  # a parallelized model is in a reference cycle; free it before the next model is built
        elif source != str(self.folder):
            self.processes.run_on_main(lambda: copy_stage(Path(source), self.folder, self.config))
        self.stage_result = self.processes.run_on_main(lambda: read_stage_result(self.folder))
        assert self.stage_result is not None
        saved = self.folder / self.stage_result["saved"]
        self._print(f"Model of stage 1: {saved}")
        return load_stage_model(saved, self.config, components, stage)

    def _train_stage_1(self, stage: Stage, components: Components) -> None:
        """Train stage 1 to its end, and write its result to the run's folder.

        Raises:
            InterruptedRun: a signal was received during stage 1.
        """
        folder = self.folder / PRETRAIN
        trainer = build_stage_trainer(self.config, folder, components, stage)
        self._restore(trainer)
        self._record_start(components, components.data)
        self.processes.run_on_main(lambda: write_stage_config(self.folder, self.config))
        self.processes.run_on_main(lambda: self._save_model_files(stage_config(self.config), folder, components))
        self._print(f"Stage 1, {type(stage).__name__}:\n{describe_training(trainer)}")
        result = self._fit(trainer, folder)
        if result.stop_reason is not None:
            self._print(f"stopped early after update {result.total_steps}: {result.stop_reason}")
        saved = trainer.checkpoints.best() or trainer.checkpoints.latest()
        if stage.saves_value_head:
            head = value_head_tensors(load(saved, optimizer=False, verified=True))  # just written: skip verification
            self.processes.run_on_main(lambda: replace_atomically(folder / "value_head.safetensors", save(head)))
        record = asdict(result) | {"saved": str(saved.relative_to(self.folder))}
        self.processes.run_on_main(lambda: write_stage_result(self.folder, record))
        if trainer.interrupted_by is not None:
            raise interruption_error(trainer)

    def _fit(self, trainer: Trainer, folder: Path) -> Result:
        """Train one stage, write its metrics to its folder, and return its result."""
        plan, step = trainer.plan, trainer.position.step
        self.stores.append(trainer.checkpoints)
        trackers: list[Tracker] = []
        if self.processes.is_main:
            trackers = [
                MetricsFile(folder, step),
                ConsoleTracker(self.console, plan.num_updates, plan.updates_per_epoch, step),
            ]
        try:
            return trainer.fit([*trackers, *(u for u in self.uploaders if isinstance(u, MlflowTracker))])
        finally:
            self.progress.step = trainer.position.step
            for error in close_trackers(trackers, "RUNNING"):
                log.warning("%s", error)

    def _restore(self, trainer: Trainer) -> None:
        """Load the latest checkpoint of a stage into its trainer.

        Do nothing if the run is not resumed or if the stage has no checkpoint.
        """
        restored = restore_latest(trainer, self.config, trainer.checkpoints)
        if restored is None:
            return
        checkpoint, changes = restored
        self.processes.run_on_main(lambda: self._record_resume(checkpoint, changes))
        trainer.mark_best()  # a crash can leave a later best.json
        self._print(f"resuming from {checkpoint}")

    def _record_start(self, components: Components, data: Dataset) -> None:
        """Write the config and other facts about the run and its data to its folder, and start the uploads.

        This method is called when all checks have passed. Only the first call has an effect.
        """
        if not self.processes.is_main or self.is_recorded:
            return
        self.is_recorded = True
        replace_atomically(self.folder / "config.yaml", self.resolved.encode())
        replace_atomically(self.folder / SAVED_OVERRIDES, encode_json(self.overrides))
        self._save_model_files(self.config, self.folder, components)
        write_run_id(self.folder, OmegaConf.select(self.config, "checkpoint.s3.url"))
        write_provenance(self.folder, self.overrides, changed_keys(self.config, "train"), data)
        remember(self.config)
        self.uploaders = open_uploaders(self.config, self.folder, self.console, is_training=True)

    def _save_model_files(self, config: DictConfig, folder: Path, components: Components) -> None:
        """Write files to `folder` that describe the pretrained model of a config.

        If `config` names no pretrained model, nothing is written.
        """
        source = build_source(config.model, components.tokenizer, Path(config.cache_dir))
        for name, content in source.files_to_save().items():
            (folder / MODEL_FOLDER).mkdir(exist_ok=True)
            replace_atomically(folder / MODEL_FOLDER / name, content)

    def _record_resume(self, checkpoint: Path, changes: dict[str, str]) -> None:
        """Append a line about the resumed run to the file `RESUMES`.

        The line contains the checkpoint, the number of processes and the settings that have changed.
        """
        line = {"checkpoint": str(checkpoint.relative_to(self.folder)), "processes": self.processes.size}
        with (self.folder / RESUMES).open("a") as file:
            file.write(json.dumps({"time": time.time(), **line, "declared_changes": changes}) + "\n")
        for name, change in changes.items():
            log.warning("changed since the checkpoint, as declared by resume_override: %s: %s", name, change)

    def _final_results(self, trainer: Trainer, result: Result) -> dict[str, Any]:
        """Measure the final model, and return those entries of summary.json that the trainer cannot provide."""
        announce("measuring the final model …")
        objective, data = trainer.objective, trainer.data
        assert isinstance(objective, MtpObjective)
        if objective.history is not None:
            data = data.with_training_as_validation()  # only these tokens have weights from a previous epoch
        if objective.algorithm.needs_better_reference:
            warn_of_weak_reference(trainer.last_validation.get(f"val/{METRIC}"), "after training")
        measured = measure_tokens(objective, trainer.model, data, trainer.hardware)
        self.processes.run_on_main(lambda: write_token_report(self.folder, measured, data, result.total_steps))
        return {
            **self._pass_rates(trainer, result),
            "config_hash": hashlib.sha256(self.resolved.encode()).hexdigest(),
            "pretrain": self.stage_result,
            "peak_memory_bytes": int(self.processes.max(trainer.hardware.peak_memory())[0]),
            "weights": weight_quality(measured[:, TOKEN_METRICS.index("unclipped_weight")], data),
        }

    def _write_report(self, state: str, exit_code: int, error: str | None = None) -> None:
        """Write report.html if the option `report` is true.

        An error is only logged, because the run is valid without a report.
        """
        if not (self.config.report and self.processes.is_main and self.is_recorded):
            return
        from wmtp.report.run_report import write_run_report  # imports matplotlib, which takes a second

        now = datetime.now().astimezone().isoformat(timespec="seconds")
        status = {"state": state, "exit_code": exit_code, "error": error, "step": self.progress.step, "ended": now}
        try:
            write_run_report(self.folder, status)
        except Exception as error:
            log.warning("report.html could not be written: %s: %s", type(error).__name__, error, exc_info=True)

    def _pass_rates(self, trainer: Trainer, result: Result) -> dict[str, Any]:
        with trainer.hardware.autocast():
            return self.sample_evaluation.evaluate_test(trainer.model, result.total_steps)

    def _print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True, highlight=False)


def value_head_tensors(snapshot: Snapshot) -> Tensors:
    """Return the tensors of the value head by name. The prefix `value_head.` is removed from the names."""
    prefix = "value_head."
    return {name.removeprefix(prefix): x for name, x in snapshot.model.items() if name.startswith(prefix)}
