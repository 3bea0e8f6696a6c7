"""The training loop: the only one."""

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

from wmtp.checkpoint.state import Snapshot, load_model, restore_optimizer, split_optimizer_state
from wmtp.checkpoint.store import CheckpointStore
from wmtp.data.collate import Batch
from wmtp.data.dataset import Dataset
from wmtp.distributed.device import Hardware
from wmtp.distributed.parallelize import clip_gradients, synchronise_gradients
from wmtp.distributed.rng import generator_states, restore_generators
from wmtp.errors import InterruptedRun, TrainingError
from wmtp.field_types import Positive, PositiveFloat
from wmtp.models.mtp import MtpModel
from wmtp.objectives.base import Objective
from wmtp.ops.metric_sums import Sums, in_order
from wmtp.runtime.signals import DeferredSignals
from wmtp.tracking.base import Tracker
from wmtp.training.early_stopping import EarlyStopping
from wmtp.training.nonfinite import Action, FiniteGate
from wmtp.training.plan import Plan, Position
from wmtp.training.resume_check import declared_changes, identity


class HeldOut(Protocol):
    """What is asked of the model at every validation besides its losses."""

    def validate(self, model: MtpModel, step: int) -> dict[str, float]:
        """Measure the model as it is after an update."""


@dataclass
class Result:
    """How a run ended. Losses are of the last and the best validation, or None without one."""

    total_steps: int
    total_tokens: int
    final_loss: float | None
    best_loss: float | None
    best_step: int | None
    early_stopped: bool = False
    stop_reason: str | None = None


class Trainer:
    """Trains a model for an objective; knows epochs, updates, validation, saving and resuming."""

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
        held_out: HeldOut | None = None,
        *,
        max_grad_norm: PositiveFloat = 1.0,
        log_interval: Positive = 10,
        eval_interval: Positive | None = None,
        save_interval: Positive | None = None,
        on_nonfinite: Action = "stop",
        max_skipped_updates: Positive = 10,
    ) -> None:
        """Intervals count updates. None validates only after each epoch, or saves only the best and the last."""
        self.model, self.objective, self.data, self.plan = model, objective, data, plan
        self.optimizer, self.scheduler = optimizer, scheduler
        self.checkpoints, self.hardware, self.processes = checkpoints, hardware, hardware.processes
        self.early_stopping, self.held_out = early_stopping, held_out
        self.max_grad_norm = max_grad_norm
        self.log_interval, self.eval_interval, self.save_interval = log_interval, eval_interval, save_interval
        self.gate = FiniteGate(on_nonfinite, max_skipped_updates, self.processes)
        self.trackers: Sequence[Tracker] = ()
        self.position = Position()
        self.last_validation: dict[str, float] = {}
        self.best_loss: float | None = None
        self.best_step: int | None = None
        self.interrupted_by: int | None = None
        self._seconds, self._tokens = 0.0, 0

    def fit(self, trackers: Sequence[Tracker] = ()) -> Result:
        """Train from the current position to the planned end, and tell the trackers.

        Raises:
            TrainingError: a loss or gradient is not finite; the update it came at was not made.
            InterruptedRun: a signal came; the update was finished and saved. If it was the last one anyway,
                nothing is raised, and `interrupted_by` names the signal.
        """
        self.trackers = trackers
        with DeferredSignals() as signals:
            while not self.ended:
                before, metrics = self.position, self.train_update()
                self._agree(signals)
                epoch_ended = self.position.epoch > before.epoch

                if self.ended or self._due(self.log_interval):
                    self._log(metrics | self._throughput() | self.early_stopping.metrics())
                improved = False
                if self.ended or epoch_ended or self._due(self.eval_interval):
                    improved = self.validate()
                    self._agree(signals)
                if self.ended or improved or self.interrupted_by or self._due(self.save_interval):
                    self.save(improved)
                if self.interrupted_by and not self.ended:
                    raise interruption(self)
            self._agree(signals)
        return Result(
            self.position.step,
            self.position.tokens,
            self.last_validation.get("val/loss"),
            self.best_loss,
            self.best_step,
            self.early_stopping.reason is not None,
            self.early_stopping.reason,
        )

    @property
    def ended(self) -> bool:
        """Whether the plan is done, or was stopped early."""
        return self.position.step >= self.plan.num_updates or self.early_stopping.reason is not None

    def train_update(self) -> dict[str, float]:
        """Make one update: every micro-batch's gradient, then one step of the optimizer."""
        started = time.perf_counter()
        batches = [batch.to(self.hardware.device) for batch in self._next_micro_batches()]
        own = self._gradients(batches)
        norm = clip_gradients(self.model, self.max_grad_norm)
        values = self.objective.metrics(own.reduced(self.processes))
        values |= {"grad_norm": norm, "lr": float(self.scheduler.get_last_lr()[0])}
        if self.gate.passes(self.position.step + 1, values["loss"], norm, own, batches):
            self.optimizer.step()
            self.objective.finish_update(self.processes)
        else:
            self.objective.forget_update()
            values["skipped_updates"] = float(self.gate.num_skipped)
        with warnings.catch_warnings():  # a first update that was skipped is no step out of order
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)

        update = self.plan.update_in_epoch(self.position)
        num_tokens = self.data.num_tokens(self.position.epoch, update, self.plan.batch_size)
        self.position = self.plan.after(self.position, num_tokens)
        self._seconds += time.perf_counter() - started
        self._tokens += num_tokens
        metrics = {f"train/{name}": value for name, value in values.items()}
        self.early_stopping.observe_update(norm, values.get("value_variance"))
        self.early_stopping.observe_metrics(metrics)
        return metrics

    def _gradients(self, batches: list[Batch]) -> Sums:
        """Leave the gradient of the update's loss in the parameters; what this process measured on the way."""
        parts = torch.stack([self.objective.totals(self.model, batch) for batch in batches]).sum(dim=0)
        totals = self.processes.sum(parts)
        self.objective.check(totals)
        sums = Sums()
        self.model.train()
        for number, batch in enumerate(batches, start=1):
            synchronise_gradients(self.model, number == len(batches) or self.hardware.reduce_each_micro_batch)
            with self.hardware.autocast():
                loss, batch_sums = self.objective.loss(self.model, batch, totals)
            # gradients become the mean over processes, the loss is their sum
            torch.autograd.backward(loss * self.processes.size)
            sums.add(batch_sums)
        return sums

    @torch.no_grad()
    def validate(self, max_batches: int | None = None) -> bool:
        """Measure the validation split, or some batches of it; whether its loss is the best so far."""
        measured_batches = []
        self.model.eval()
        micro_batch_size = self.plan.micro_batch_size
        for batch in islice(self.data.validation_batches(micro_batch_size, self.processes), max_batches):
            with self.hardware.autocast():
                measured_batches.append(self.objective.evaluate(self.model, batch.to(self.hardware.device)))
        if not measured_batches:
            return False
        num_batches = len(self.data.validation_order(micro_batch_size))
        measured = self.objective.metrics(in_order(measured_batches, num_batches, self.processes))
        if self.held_out is not None and max_batches is None:
            with self.hardware.autocast():
                measured |= self.held_out.validate(self.model, self.position.step)
        values = {f"val/{name}": value for name, value in measured.items()}
        self.last_validation = values
        self.early_stopping.observe_metrics(values)
        self._log(values | self.early_stopping.metrics())
        loss = values["val/loss"]
        if not math.isfinite(loss):
            raise TrainingError(f"after update {self.position.step}, the validation loss is {loss}")
        improved = self.best_loss is None or loss < self.best_loss
        if improved:
            self.best_loss, self.best_step = loss, self.position.step
        return improved

    def save(self, is_best: bool) -> None:
        """Write a checkpoint of this position."""
        self.checkpoints.save(self.position.step, self.snapshot())
        if is_best:
            assert self.best_loss is not None
            self.checkpoints.mark_best(self.position.step, self.best_loss)

    def snapshot(self) -> Snapshot:
        """Everything that a run needs to go on as if it had never stopped."""
        optimizer_tensors, optimizer_state = split_optimizer_state(self.model, self.optimizer)
        state = {
            "position": asdict(self.position),
            "optimizer": optimizer_state,
            "scheduler": self.scheduler.state_dict(),
            "generators": self.processes.gather(generator_states()),
            "objective": self.objective.state_dict(),
            "early_stopping": self.early_stopping.state_dict(),
            "validation": {"last": self.last_validation, "best_loss": self.best_loss, "best_step": self.best_step},
            "skipped_updates": self.gate.num_skipped,
            "identity": self._identity(),
        }
        return Snapshot(self.model.stored(), optimizer_tensors, state)

    def restore(self, snapshot: Snapshot, declared: Sequence[str] = ()) -> dict[str, str]:
        """Go on where a snapshot was taken; returns what was `declared` to have changed since, and has.

        Raises:
            InputError: the data, the tokenizer, the batches or something else are not those of the snapshot.
        """
        state = snapshot.state
        self.plan = self.plan.resumed(state["identity"]["micro_batch_size"])
        changes = declared_changes(state["identity"], self._identity(), declared)
        self.position = self.plan.converted(Position(**state["position"]), state["identity"]["micro_batch_size"])
        load_model(self.model, snapshot.model, self.model.base)
        restore_optimizer(self.model, self.optimizer, snapshot.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        restore_generators(state["generators"], self.processes)
        self.gate.num_skipped = state["skipped_updates"]
        self.objective.load_state_dict(state["objective"])
        self.early_stopping.load_state_dict(state["early_stopping"])
        validation = state["validation"]
        self.last_validation = validation["last"]
        self.best_loss, self.best_step = validation["best_loss"], validation["best_step"]
        return changes

    def _identity(self) -> dict[str, Any]:
        return identity(self.data, self.objective, self.plan, self.model, self.optimizer)

    def _agree(self, signals: DeferredSignals) -> None:
        """Let a signal to one process be one to all, and a reason to stop of one be that of all."""
        size, reason = self.processes.size, self.early_stopping.reason
        signal, first = self.processes.largest(signals.received or 0, size - self.processes.rank if reason else 0)
        self.interrupted_by = int(signal) or None
        if first:
            self.early_stopping.stop(self.processes.gather(reason)[size - int(first)])

    def _next_micro_batches(self) -> list[Batch]:
        update = self.plan.update_in_epoch(self.position)
        sizes = self.plan.batch_size, self.plan.micro_batch_size
        return self.data.micro_batches(self.position.epoch, update, *sizes, self.processes)

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.position.step % interval == 0

    def _log(self, metrics: dict[str, float]) -> None:
        metrics = metrics | {"tokens": float(self.position.tokens)}
        for tracker in self.trackers:
            tracker.log(self.position.step, self.position.epoch, metrics)

    def _throughput(self) -> dict[str, float]:
        rate = self._tokens / self._seconds
        self._seconds, self._tokens = 0.0, 0
        return {"train/tokens_per_second": rate}


def interruption(trainer: Trainer) -> InterruptedRun:
    """What to raise for a run that a signal ended after it saved an update."""
    assert trainer.interrupted_by is not None
    where = f"{trainer.checkpoints.folder}/step_{trainer.position.step:08d}"
    return InterruptedRun(
        trainer.interrupted_by, f"interrupted after update {trainer.position.step}, which is saved in {where}"
    )
