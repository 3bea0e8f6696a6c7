"""The loop against Hugging Face's Trainer, its plan, its gate and its intervals, built from fakes."""

import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainingArguments

from tests.conftest import tiny_model
from tests.test_models import as_llama
from wmtp.algorithms.uniform import Uniform
from wmtp.checkpoint.store import CheckpointStore
from wmtp.data.collate import IGNORED, Batch
from wmtp.early_stopping import EarlyStopping
from wmtp.errors import TrainingError
from wmtp.objectives.mtp import MtpObjective
from wmtp.optimization import constant, cosine, linear, parameter_groups
from wmtp.plan import Plan, Position
from wmtp.runtime.hardware import Hardware
from wmtp.trainer import Trainer


class FakeData:
    """Random samples in a fixed order, one epoch long."""

    fingerprint, seed, tokenizer = "fake", 0, SimpleNamespace(fingerprint="fake")

    def __init__(self, num_samples: int, length: int = 12) -> None:
        generator = torch.Generator().manual_seed(5)
        self.tokens = torch.randint(2, 512, (num_samples, length), generator=generator)
        self.labels = self.tokens.masked_fill(torch.rand(self.tokens.shape, generator=generator) < 0.3, IGNORED)

    def batch(self, start: int, stop: int) -> Batch:
        ids = tuple(f"record-{i}" for i in range(start, stop))
        tokens, ones = self.tokens[start:stop], torch.ones(stop - start)
        return Batch(
            tokens, self.labels[start:stop], ones, ones.bool(), torch.arange(start, stop), ids, tokens.numel()
        )  # fmt: skip

    def micro_batches(self, epoch: int, update: int, batch_size: int, micro_batch_size: int) -> list[Batch]:
        stop = min((update + 1) * batch_size, len(self.tokens))
        return [
            self.batch(i, min(i + micro_batch_size, stop)) for i in range(update * batch_size, stop, micro_batch_size)
        ]

    def validation_batches(self, batch_size: int) -> list[Batch]:
        return [self.batch(0, 2)]


@dataclass
class Recorder:
    """Keeps what it is told."""

    lines: list[tuple[int, dict[str, float]]]

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        self.lines.append((step, metrics))

    def close(self, state: str) -> None:
        pass

    def values(self, name: str) -> list[float]:
        return [metrics[name] for _, metrics in self.lines if name in metrics]


def trainer_of(
    folder: Path,
    data: Any,
    model: torch.nn.Module,
    plan: Plan,
    lr: float = 1e-3,
    early_stopping: EarlyStopping | None = None,
    **options: Any,
) -> Trainer:
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=lr, weight_decay=0.1)
    scheduler = linear(optimizer, plan.num_updates)
    return Trainer(
        model,
        MtpObjective(Uniform()),
        data,
        optimizer,
        scheduler,
        CheckpointStore(folder),
        Hardware(device="cpu"),
        plan,
        early_stopping or EarlyStopping(),
        **options,
    )


def test_one_head_with_uniform_weights_trains_as_hugging_faces_trainer(tmp_path: Path) -> None:
    data, model = FakeData(80), tiny_model(num_heads=1)
    llama = as_llama(model)

    exact: list[float] = []

    class InOrder(HuggingFaceTrainer):
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
            loss = super().training_step(*arguments, **options)
            exact.append(loss.item())
            return loss

    optimizer = torch.optim.AdamW(parameter_groups(llama), lr=1e-3, weight_decay=0.1)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1, max_grad_norm=1.0, use_cpu=True,
        report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": data.tokens[i], "labels": data.labels[i]} for i in range(80)]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    InOrder(model=llama, args=arguments, train_dataset=rows, optimizers=(optimizer, schedule)).train()

    recorder = Recorder([])
    plan = Plan(80, num_epochs=1.0, batch_size=4)
    trainer_of(tmp_path, data, model, plan, log_interval=1).fit([recorder])
    ours = recorder.values("train/loss")
    assert len(ours) == len(exact) == 20
    assert max(abs(a - b) / b for a, b in zip(ours, exact, strict=True)) <= 1e-5

    control = Recorder([])  # the same without clipping drifts away
    trainer_of(tmp_path, data, tiny_model(num_heads=1), plan, log_interval=1, max_grad_norm=1e9).fit([control])
    assert max(abs(a - b) / b for a, b in zip(control.values("train/loss"), exact, strict=True)) > 1e-5


@pytest.mark.parametrize(
    ("epochs", "max_steps", "updates"), [(3.0, None, 33), (0.5, None, 6), (0.01, None, 1), (3.0, 7, 7), (1.0, 99, 11)]
)
def test_the_plan_counts_the_updates_that_will_run(epochs: float, max_steps: int | None, updates: int) -> None:
    assert Plan(103, num_epochs=epochs, max_steps=max_steps, batch_size=10).num_updates == updates


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_positions_walk_through_every_update_of_every_epoch(samples: int, batch: int, micro: int) -> None:
    plan = Plan(samples, num_epochs=2.0, batch_size=batch, micro_batch_size=min(micro, batch))
    position, seen = Position(), []
    for _ in range(plan.num_updates):
        update = plan.update_in_epoch(position)
        seen.append((position.epoch, update))
        size = min(batch, samples - update * batch)
        position = plan.after(position, math.ceil(size / plan.micro_batch_size), size)
    assert seen == [(epoch, update) for epoch in (0, 1) for update in range(plan.updates_per_epoch)]
    assert position == Position(plan.num_updates, 2, 0, 2 * samples)


def test_intervals_epoch_ends_and_the_end_decide_what_happens_when(tmp_path: Path) -> None:
    recorder = Recorder([])
    plan = Plan(20, num_epochs=1.6, batch_size=4)
    trainer = trainer_of(
        tmp_path, FakeData(20), tiny_model(), plan, log_interval=2, eval_interval=3, save_interval=7, lr=0.0
    )
    result = trainer.fit([recorder])
    trained = [step for step, metrics in recorder.lines if "train/loss" in metrics]
    validated = [step for step, metrics in recorder.lines if "val/loss" in metrics]
    assert (trained, validated) == ([2, 4, 6, 8], [3, 5, 6, 8])
    assert result.best_step == 3 and result.total_steps == 8
    assert [p.name[-1] for p in sorted(trainer.checkpoints.folder.glob("step_*"))] == ["3", "7", "8"]


@pytest.mark.parametrize("where", ["parameter", "gradient"])
def test_what_is_not_finite_stops_before_the_update(tmp_path: Path, where: str) -> None:
    model = tiny_model()
    trainer = trainer_of(tmp_path, FakeData(12), model, Plan(12, num_epochs=1.0, batch_size=4), log_interval=1)
    trainer.train_update()
    if where == "parameter":
        model.norm.weight.data[0] = float("nan")
    else:
        model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"update 2: .*record-4, record-5, record-6, record-7"):
        trainer.train_update()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    trainer.optimizer.step()  # the control: the update that was kept from happening
    assert not torch.equal(model.embedding.weight, before["embedding.weight"])


def test_a_loss_that_is_not_finite_is_never_the_best(tmp_path: Path) -> None:
    model = tiny_model()
    trainer = trainer_of(tmp_path, FakeData(12), model, Plan(12, batch_size=4))
    assert trainer.validate()
    best = trainer.best_loss
    model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="validation loss is nan"):
        trainer.validate()
    assert trainer.best_loss == best


@pytest.mark.parametrize("schedule", [constant, linear, cosine])
def test_schedules_warm_up_and_end_where_they_should(schedule: Any) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    ending = {} if schedule is constant else {"final_ratio": 0.1}
    scheduler = schedule(optimizer, 20, warmup_ratio=0.2, **ending)
    rates = []
    for _ in range(21):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[20] == pytest.approx(1.0 if schedule is constant else 0.1)
    assert rates[12] == pytest.approx(1.0 if schedule is constant else 0.55)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_norms_and_embeddings_do_not_decay() -> None:
    model = tiny_model()
    decayed, others = parameter_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert others["weight_decay"] == 0.0
    assert all("norm" in names[id(p)] or names[id(p)].split(".")[0] == "embedding" for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))
