"""The training loop: the only one."""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from wmtp.annotations import Positive, PositiveFloat
from wmtp.checkpoint.state import Snapshot, detached, load_model, restore_optimizer, split_optimizer_state
from wmtp.checkpoint.store import CheckpointStore
from wmtp.data.collate import Batch
from wmtp.data.dataset import Dataset
from wmtp.early_stopping import EarlyStopping
from wmtp.errors import InputError, InterruptedRun, TrainingError
from wmtp.metrics import Sums
from wmtp.models.mtp import MtpModel
from wmtp.objectives.base import Objective
from wmtp.plan import Plan, Position
from wmtp.runtime.hardware import Hardware
from wmtp.runtime.seeding import generator_states, restore_generators
from wmtp.runtime.signals import DeferredSignals
from wmtp.tracking.base import Tracker


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
    ) -> None:
        """Intervals count updates. None validates only after each epoch, or saves only the best and the last."""
        self.model, self.objective, self.data, self.plan = model, objective, data, plan
        self.optimizer, self.scheduler = optimizer, scheduler
        self.checkpoints, self.hardware = checkpoints, hardware
        self.early_stopping, self.held_out = early_stopping, held_out
        self.max_grad_norm = max_grad_norm
        self.log_interval, self.eval_interval, self.save_interval = log_interval, eval_interval, save_interval
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
                epoch_ended = self.position.epoch > before.epoch

                if self.ended or self._due(self.log_interval):
                    self._log(metrics | self._throughput() | self.early_stopping.metrics())
                improved = (self.ended or epoch_ended or self._due(self.eval_interval)) and self.validate()
                if self.ended or improved or signals.received or self._due(self.save_interval):
                    self.save(improved)
                self.interrupted_by = signals.received
                if signals.received and not self.ended:
                    raise interruption(self)
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
        totals = torch.stack([self.objective.totals(self.model, batch) for batch in batches]).sum(dim=0)
        sums = Sums()
        self.model.train()
        for batch in batches:
            with self.hardware.autocast():
                loss, batch_sums = self.objective.loss(self.model, batch, totals)
            torch.autograd.backward(loss)
            sums.add(batch_sums)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        values = self.objective.metrics(sums)
        self._require_finite(values["loss"], norm.item(), batches)
        values |= {"grad_norm": norm.item(), "lr": float(self.scheduler.get_last_lr()[0])}
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.finish_update()

        num_tokens = sum(batch.num_tokens for batch in batches)
        self.position = self.plan.after(self.position, len(batches), num_tokens)
        self._seconds += time.perf_counter() - started
        self._tokens += num_tokens
        metrics = {f"train/{name}": value for name, value in values.items()}
        self.early_stopping.observe_update(norm.item(), values.get("value_variance"))
        self.early_stopping.observe_metrics(metrics)
        return metrics

    @torch.inference_mode()
    def validate(self, max_batches: int | None = None) -> bool:
        """Measure the validation split, or some batches of it; whether its loss is the best so far."""
        sums = Sums()
        self.model.eval()
        for batch in islice(self.data.validation_batches(self.plan.micro_batch_size), max_batches):
            with self.hardware.autocast():
                sums.add(self.objective.evaluate(self.model, batch.to(self.hardware.device)))
        if not sums.means:
            return False
        measured = self.objective.metrics(sums)
        if self.held_out is not None and max_batches is None:
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
            "generators": generator_states(),
            "objective": self.objective.state_dict(),
            "early_stopping": self.early_stopping.state_dict(),
            "validation": {"last": self.last_validation, "best_loss": self.best_loss, "best_step": self.best_step},
            "identity": self.identity(),
        }
        return Snapshot(detached(self.model.state_dict()), detached(optimizer_tensors), state)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on where a snapshot was taken.

        Raises:
            InputError: the data, the tokenizer or the batches are not those of the snapshot.
        """
        state, now = snapshot.state, self.identity()
        changed = [
            f"  {name}: {difference(old, now.get(name))}"
            for name, old in state["identity"].items()
            if now.get(name) != old
        ]
        if changed:
            raise InputError(
                "\n".join(["The run cannot be resumed, for what must stay the same has changed:", *changed])
            )
        self.position = Position(**state["position"])
        load_model(self.model, snapshot.model)
        restore_optimizer(self.model, self.optimizer, snapshot.optimizer, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        restore_generators(state["generators"])
        self.objective.load_state_dict(state["objective"])
        self.early_stopping.load_state_dict(state["early_stopping"])
        validation = state["validation"]
        self.last_validation = validation["last"]
        self.best_loss, self.best_step = validation["best_loss"], validation["best_step"]

    def identity(self) -> dict[str, Any]:
        """What decides which sample comes when; a resumed run must agree."""
        return {
            "data": self.data.fingerprint,
            "tokenizer": self.data.tokenizer.fingerprint,
            "objective": self.objective.name,
            "seed": self.data.seed,
            "batch_size": self.plan.batch_size,
            "micro_batch_size": self.plan.micro_batch_size,
            "model": self.model.settings
            | {name: list(parameter.shape) for name, parameter in self.model.named_parameters()},
            "optimizer": {
                "type": type(self.optimizer).__name__,
                # JSON has lists where torch has tuples
                **{key: list(v) if isinstance(v, tuple) else v for key, v in self.optimizer.defaults.items()},
            },
        }

    def _next_micro_batches(self) -> list[Batch]:
        update = self.plan.update_in_epoch(self.position)
        return self.data.micro_batches(self.position.epoch, update, self.plan.batch_size, self.plan.micro_batch_size)

    def _due(self, interval: int | None) -> bool:
        return interval is not None and self.position.step % interval == 0

    def _log(self, metrics: dict[str, float]) -> None:
        for tracker in self.trackers:
            tracker.log(self.position.step, self.position.epoch, metrics)

    def _throughput(self) -> dict[str, float]:
        rate = self._tokens / self._seconds
        self._seconds, self._tokens = 0.0, 0
        return {"train/tokens_per_second": rate}

    def _require_finite(self, loss: float, grad_norm: float, batches: list[Batch]) -> None:
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return
        records = ", ".join(record for batch in batches for record in batch.record_ids)
        raise TrainingError(
            f"update {self.position.step + 1}: the loss is {loss} and the gradient norm {grad_norm}; "
            f"the update was not made. Its records: {records}"
        )


def interruption(trainer: Trainer) -> InterruptedRun:
    """What to raise for a run that a signal ended after it saved an update."""
    assert trainer.interrupted_by is not None
    where = f"{trainer.checkpoints.folder}/step_{trainer.position.step:08d}"
    return InterruptedRun(
        trainer.interrupted_by, f"interrupted after update {trainer.position.step}, which is saved in {where}"
    )


def difference(old: object, new: object) -> str:
    """What changed, short enough for a line."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        return f"{len(keys)} entries differ, the first is {keys[0]}: was {old.get(keys[0])}, is now {new.get(keys[0])}"
    return f"was {old}, is now {new}"
