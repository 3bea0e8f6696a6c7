"""The training loop, which both stages use."""

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wmtp.checkpoint.state import (
    Snapshot,
    load_model,
    restore_optimizer,
    split_objective_state,
    split_optimizer_state,
)
from wmtp.checkpoint.store import CheckpointStore
from wmtp.data.collate import Batch
from wmtp.data.dataset import Dataset
from wmtp.distributed.device import Hardware
from wmtp.distributed.parallelize import clip_gradients, synchronize_gradients
from wmtp.distributed.rng import generator_states, restore_generators
from wmtp.errors import InterruptedRun, TrainingError
from wmtp.field_types import Positive, PositiveFloat
from wmtp.models.mtp import MtpModel
from wmtp.objectives.base import Objective
from wmtp.ops.metric_sums import MetricSums, sum_in_order
from wmtp.runtime.signals import DeferredSignals
from wmtp.tracking.base import Tracker
from wmtp.training.early_stopping import BestValidation, EarlyStopping
from wmtp.training.nonfinite import Action, FiniteCheck
from wmtp.training.plan import Plan, Position
from wmtp.training.resume_check import declared_changes, training_identity


class SampleEvaluator(Protocol):
    """The interface of an evaluation that runs at every validation, after the losses have been measured."""

    def validate(self, model: MtpModel, step: int) -> dict[str, float]:
        """Return the metrics of the model after update number `step`."""


@dataclass
class Result:
    """The result of a training stage.

    `final_loss` is the loss of the last validation, and `best_loss` is the validation loss of the best checkpoint. Both
    are None if there was no validation.
    """

    total_steps: int
    total_tokens: int
    final_loss: float | None
    best_loss: float | None
    best_step: int | None
    early_stopped: bool = False
    stop_reason: str | None = None


class Trainer:
    """The training loop of a stage, with logging, validation, early stopping, checkpoints and resuming."""

    def __init__(
        self,
        model: MtpModel,
        objective: Objective,
        data: Dataset,
        optimizer: Optimizer,
        scheduler: LRScheduler,
        checkpoints: CheckpointStore,
        hardware: Hardware,
        plan: Plan,
        early_stopping: EarlyStopping,
        sample_evaluation: SampleEvaluator | None = None,
        *,
        max_grad_norm: PositiveFloat = 1.0,
        log_interval: Positive = 10,
        eval_interval: Positive | None = None,
        save_interval: Positive | None = None,
        on_nonfinite: Action = "stop",
        max_skipped_updates: Positive = 10,
    ) -> None:
        """Create a trainer. The arguments that end with `_interval` are numbers of updates.

        If `eval_interval` is None, validation runs only after each epoch and after the last update. If `save_interval`
        is None, only the best and the last state are saved.
        """
        self.model, self.objective, self.data, self.plan = model, objective, data, plan
        self.optimizer, self.scheduler = optimizer, scheduler
        self.checkpoints, self.hardware, self.processes = checkpoints, hardware, hardware.processes
        self.early_stopping, self.sample_evaluation = early_stopping, sample_evaluation
        self.max_grad_norm = max_grad_norm
        self.log_interval, self.eval_interval, self.save_interval = log_interval, eval_interval, save_interval
        self.finite_check = FiniteCheck(on_nonfinite, max_skipped_updates, self.processes)
        self.trackers: Sequence[Tracker] = ()
        self.position = Position()
        self.last_validation: dict[str, float] = {}
        self.best = BestValidation(early_stopping.best_metric)
        self.interrupted_by: int | None = None
        self._seconds, self._tokens = 0.0, 0

    def fit(self, trackers: Sequence[Tracker] = ()) -> Result:
        """Train from the current position to the end of the plan, and log metrics to the trackers.

        Raises:
            TrainingError: the loss or the gradient of an update was not finite, and the update was not applied.
            InterruptedRun: a signal was received. The current update was completed and saved first. If that update
                ended the stage, no error is raised, and the attribute `interrupted_by` contains the signal.
        """
        self.trackers = trackers
        with DeferredSignals() as signals:
            while not self.is_finished:
                metrics = self.train_update()
                self._synchronize(signals)
                if self._should_log():
                    self._log(metrics | self._throughput() | self.early_stopping.metrics())
                improved = False
                if self._should_validate():
                    improved = self.validate()
                    self._synchronize(signals)
                if improved or self._should_save():
                    self.save(is_best=improved)
                if self.interrupted_by and not self.is_finished:
                    raise interruption_error(self)
            self._synchronize(signals)
        return Result(
            self.position.step,
            self.position.tokens,
            self.last_validation.get("val/loss"),
            self.best.metrics.get("val/loss"),
            self.best.step,
            self.early_stopping.reason is not None,
            self.early_stopping.reason,
        )

    @property
    def is_finished(self) -> bool:
        """True once all planned updates are done or the run was stopped early."""
        return self.position.step >= self.plan.num_updates or self.early_stopping.reason is not None

    def train_update(self) -> dict[str, float]:
        """Run one update: accumulate the gradients of its micro-batches and make the optimizer step.

        Returns:
            The metrics `train/*` of the update, computed over all ranks.

        Raises:
            TrainingError: the update has no target, or its loss or gradient is not finite (see `FiniteCheck`).
        """
        started = time.perf_counter()
        batches = [batch.to(self.hardware.device) for batch in self._next_micro_batches()]
        sums = self._accumulate_gradients(batches)
        grad_norm = clip_gradients(self.model, self.max_grad_norm)
        values = self.objective.metrics(sums.reduced(self.processes))
        values |= {"grad_norm": grad_norm, "lr": float(self.scheduler.get_last_lr()[0])}
        if self.finite_check.passes(self.position.step + 1, values["loss"], grad_norm, sums, batches):
            self.optimizer.step()
            self.objective.finish_update()
        else:
            values["skipped_updates"] = float(self.finite_check.num_skipped)
        self._step_scheduler()
        self.optimizer.zero_grad(set_to_none=True)
        self._tokens += self._advance()
        self._seconds += time.perf_counter() - started
        metrics = {f"train/{name}": value for name, value in values.items()}
        self.early_stopping.observe_update(grad_norm, values.get("value_variance"))
        self.early_stopping.observe_metrics(metrics)
        return metrics

    def _accumulate_gradients(self, batches: list[Batch]) -> MetricSums:
        """Run the forward and backward passes of an update, and return this rank's metric sums.

        The gradients of all micro-batches are summed in the parameters.
        """
        sums = MetricSums()
        self.model.train()
        with self.hardware.autocast():
            prepared_batches = self.objective.prepare(self.model, batches, self.processes)
        for number, prepared in enumerate(prepared_batches, start=1):
            synchronize_gradients(self.model, number == len(batches) or self.hardware.reduce_each_micro_batch)
            with self.hardware.autocast():
                loss, batch_sums = self.objective.loss(self.model, prepared)
            # torch averages gradients over ranks, but the loss of the update is the sum over ranks
            torch.autograd.backward(loss * self.processes.size)
            sums.add(batch_sums)
        return sums

    def _step_scheduler(self) -> None:
        with warnings.catch_warnings():  # torch warns if the first update was skipped; the order of steps is correct
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def _advance(self) -> int:
        """Advance the position by one update, and return the number of tokens of that update."""
        update = self.plan.update_in_epoch(self.position)
        num_tokens = self.data.num_tokens(self.position.epoch, update, self.plan.batch_size)
        self.position = self.plan.next_position(self.position, num_tokens)
        return num_tokens

    @torch.no_grad()
    def validate(self, max_batches: int | None = None) -> bool:
        """Measure the model on the validation split, and log the metrics.

        If `max_batches` is set, only the first `max_batches` batches are used.

        Returns:
            Whether the metric that chooses the best checkpoint is the best so far; False if there is no validation
            split.

        Raises:
            TrainingError: the validation loss is not finite, or the metric that chooses the best checkpoint has never
                been measured.
        """
        measured = self.measure_validation(max_batches)
        if measured is None:
            return False
        if self.sample_evaluation is not None and max_batches is None:
            with self.hardware.autocast():
                measured |= self.sample_evaluation.validate(self.model, self.position.step)
        values = {f"val/{name}": value for name, value in measured.items()}
        self.last_validation = values
        self.early_stopping.observe_metrics(values)
        self._log(values | self.early_stopping.metrics())
        loss = values["val/loss"]
        if not math.isfinite(loss):
            raise TrainingError(f"after update {self.position.step}, the validation loss is {loss}")
        return max_batches is None and self.best.observe(self.position.step, values)

    @torch.no_grad()
    def measure_validation(self, max_batches: int | None = None) -> dict[str, float] | None:
        """Return the metrics of the objective on the validation split, or None if it has no batch.

        All ranks must call this method. If `max_batches` is set, only the first `max_batches` batches are used.
        """
        measured_batches = []
        self.model.eval()
        micro_batch_size = self.plan.micro_batch_size
        for batch in islice(self.data.validation_batches(micro_batch_size, self.processes), max_batches):
            with self.hardware.autocast():
                measured_batches.append(self.objective.evaluate(self.model, batch.to(self.hardware.device)))
        if not measured_batches:
            return None
        num_batches = len(self.data.validation_order(micro_batch_size))
        return self.objective.metrics(sum_in_order(measured_batches, num_batches, self.processes))

    def save(self, is_best: bool) -> None:
        """Write a checkpoint of the current state. If `is_best` is true, mark it as the best checkpoint."""
        self.checkpoints.save(self.position.step, self.snapshot())
        if is_best:
            self.mark_best()

    def mark_best(self) -> None:
        """Mark the checkpoint of the best validation as the best checkpoint. Do nothing if there was no validation."""
        if self.best.step is not None:
            self.checkpoints.mark_best(self.best.step, self.best.summary())

    def snapshot(self) -> Snapshot:
        """Return the complete training state.

        A run that is resumed from this state continues exactly as it would without an interruption.
        """
        optimizer_tensors, optimizer_state = split_optimizer_state(self.model, self.optimizer)
        objective_tensors, objective_state = split_objective_state(self.objective.state_dict())
        state = {
            "position": asdict(self.position),
            "optimizer": optimizer_state,
            "scheduler": self.scheduler.state_dict(),
            "generators": self.processes.gather(generator_states()),
            "objective": objective_state,
            "early_stopping": self.early_stopping.state_dict(),
            "validation": {"last": self.last_validation, **self.best.state_dict()},
            "skipped_updates": self.finite_check.num_skipped,
            "identity": self._identity(),
        }
        return Snapshot(self.model.checkpoint_tensors(), optimizer_tensors | objective_tensors, state)

    def restore(self, snapshot: Snapshot, declared: Sequence[str] = ()) -> dict[str, str]:
        """Load the training state of a snapshot.

        Args:
            snapshot: the state to load.
            declared: names of the settings that are allowed to differ from those in the snapshot (`resume_override`).

        Returns:
            A description of the change for each setting that differs.

        Raises:
            InputError: the data, the tokenizer, the batch size or another setting differs from that in the snapshot,
                and `declared` does not contain it.
        """
        state = snapshot.state
        self.plan = self.plan.for_resume(state["identity"]["micro_batch_size"])
        changes = declared_changes(state["identity"], self._identity(), declared)
        self.position = self.plan.convert_position(Position(**state["position"]), state["identity"]["micro_batch_size"])
        load_model(self.model, snapshot.model, self.model.base_names)
        restore_optimizer(self.model, self.optimizer, snapshot.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        restore_generators(state["generators"], self.processes)
        self.finite_check.num_skipped = state["skipped_updates"]
        if "objective" not in changes:  # otherwise it is the state of another algorithm
            self.objective.load_state_dict(snapshot.objective_state())
        self.early_stopping.load_state_dict(state["early_stopping"])
        validation = state["validation"]
        self.last_validation = validation["last"]
        self.best.load_state_dict(validation)
        return changes

    def _identity(self) -> dict[str, Any]:
        return training_identity(self.data, self.objective, self.plan, self.model, self.optimizer)

    def _synchronize(self, signals: DeferredSignals) -> None:
        """Share received signals and the decision to stop early between all processes."""
        size, reason = self.processes.size, self.early_stopping.reason
        # the largest value identifies the lowest rank that has a reason to stop
        signal, stopping = self.processes.max(signals.received or 0, size - self.processes.rank if reason else 0)
        self.interrupted_by = int(signal) or None
        if stopping:
            self.early_stopping.stop(self.processes.gather(reason)[size - int(stopping)])

    def _next_micro_batches(self) -> list[Batch]:
        update = self.plan.update_in_epoch(self.position)
        sizes = self.plan.batch_size, self.plan.micro_batch_size
        return self.data.micro_batches(self.position.epoch, update, *sizes, self.processes)

    def _should_log(self) -> bool:
        return self.is_finished or self._is_due(self.log_interval)

    def _should_validate(self) -> bool:
        epoch_ended = self.position.batch_in_epoch == 0  # true only between epochs, after at least one update
        return self.is_finished or epoch_ended or self._is_due(self.eval_interval)

    def _should_save(self) -> bool:
        return self.is_finished or self.interrupted_by is not None or self._is_due(self.save_interval)

    def _is_due(self, interval: int | None) -> bool:
        return interval is not None and self.position.step % interval == 0

    def _log(self, metrics: dict[str, float]) -> None:
        metrics = metrics | {"tokens": float(self.position.tokens)}
        for tracker in self.trackers:
            tracker.log(self.position.step, self.position.epoch, metrics)

    def _throughput(self) -> dict[str, float]:
        rate = self._tokens / self._seconds
        self._seconds, self._tokens = 0.0, 0
        return {"train/tokens_per_second": rate}


def interruption_error(trainer: Trainer) -> InterruptedRun:
    """Return the error to raise if a signal has ended the run. Its message names the checkpoint of the last update."""
    assert trainer.interrupted_by is not None
    checkpoint = f"{trainer.checkpoints.folder}/step_{trainer.position.step:08d}"
    return InterruptedRun(
        trainer.interrupted_by, f"interrupted after update {trainer.position.step}, which is saved in {checkpoint}"
    )
