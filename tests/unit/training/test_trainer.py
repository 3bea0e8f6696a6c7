"""Tests of the training loop with fake data: equality with Hugging Face's Trainer, plan, checks and intervals."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
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
from tests.unit.models.test_mtp import as_llama
from wmtp.algorithms.base import Algorithm
from wmtp.algorithms.critic import Critic
from wmtp.algorithms.excess_loss import ExcessLoss
from wmtp.algorithms.uniform import Uniform
from wmtp.checkpoint.store import CheckpointStore, load
from wmtp.data.collate import IGNORED, Batch
from wmtp.distributed.device import Hardware
from wmtp.distributed.process_group import Processes
from wmtp.errors import TrainingError
from wmtp.models.mtp import MtpModel
from wmtp.objectives.base import Objective, PreparedBatch, metric_names
from wmtp.objectives.mtp import MtpObjective
from wmtp.ops.metric_sums import MetricSums
from wmtp.ops.shares import share_of
from wmtp.training.early_stopping import EarlyStopping
from wmtp.training.optim import constant, cosine, linear, parameter_groups
from wmtp.training.plan import Plan, Position
from wmtp.training.trainer import Trainer

ALONE = Processes()


class FakeData:
    """Random samples in a fixed order, for one epoch."""

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

    def micro_batches(
        self, epoch: int, update: int, batch_size: int, micro_batch_size: int, processes: Processes = ALONE
    ) -> list[Batch]:
        stop = min((update + 1) * batch_size, len(self.tokens))
        return [
            self.batch(i, min(i + micro_batch_size, stop)) for i in range(update * batch_size, stop, micro_batch_size)
        ]

    def num_tokens(self, epoch: int, update: int, batch_size: int) -> int:
        return sum(batch.num_tokens for batch in self.micro_batches(epoch, update, batch_size, batch_size))

    def validation_batches(self, batch_size: int, processes: Processes = ALONE) -> list[Batch]:
        return [self.batch(0, 2)]

    def validation_order(self, batch_size: int) -> list[list[int]]:
        return [[] for _ in self.validation_batches(batch_size)]


class VariableLengthData(FakeData):
    """Solutions of 0 to 11 tokens. All samples are also the validation split, in batches."""

    def __init__(self, num_samples: int) -> None:
        super().__init__(num_samples)
        lengths = torch.arange(num_samples)[:, None] * 5 % 12
        self.labels = torch.where(torch.arange(12)[None] >= 12 - lengths, self.tokens, IGNORED)

    def validation_batches(self, batch_size: int, processes: Processes = ALONE) -> list[Batch]:
        return self.micro_batches(0, 0, len(self.tokens), batch_size)


@dataclass
class RecordingTracker:
    """A tracker that keeps all logged metrics."""

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
    objective: Objective | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> Trainer:
    optimizer = optimizer or torch.optim.AdamW(parameter_groups(model), lr=lr, weight_decay=0.1)
    scheduler = linear(optimizer, plan.num_updates)
    return Trainer(
        model,
        objective or MtpObjective(Uniform()),
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

    class InOrderTrainer(HuggingFaceTrainer):
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
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 19)
    InOrderTrainer(model=llama, args=arguments, train_dataset=rows, optimizers=(optimizer, schedule)).train()

    recorder = RecordingTracker([])
    plan = Plan(80, num_epochs=1.0, batch_size=4)
    trainer_of(tmp_path, data, model, plan, log_interval=1).fit([recorder])
    ours = recorder.values("train/loss")
    assert len(ours) == len(exact) == 20
    assert max(abs(a - b) / b for a, b in zip(ours, exact, strict=True)) <= 1e-5

    control = RecordingTracker([])  # the control: without clipping, the losses differ
    trainer_of(tmp_path, data, tiny_model(num_heads=1), plan, log_interval=1, max_grad_norm=1e9).fit([control])
    assert max(abs(a - b) / b for a, b in zip(control.values("train/loss"), exact, strict=True)) > 1e-5


@pytest.mark.parametrize(
    ("epochs", "max_steps", "updates"), [(3.0, None, 33), (0.5, None, 6), (0.01, None, 1), (3.0, 7, 7), (1.0, 99, 11)]
)
def test_the_plan_counts_the_updates_that_will_run(epochs: float, max_steps: int | None, updates: int) -> None:
    assert Plan(103, num_epochs=epochs, max_steps=max_steps, batch_size=10).num_updates == updates


@pytest.mark.parametrize(
    ("settings", "stopped_at", "expected"),
    [
        ({"num_epochs": 3.0}, None, "num_epochs=6"),
        ({"num_epochs": 3.0, "max_steps": 100}, None, "num_epochs=6"),
        ({"num_epochs": 3.0, "max_steps": 10}, None, "max_steps=20"),
        ({"num_epochs": 3.0, "max_steps": 33}, None, "max_steps=66 num_epochs=6"),
        ({"num_epochs": 0.01}, None, "num_epochs=0.181818"),
        ({"num_epochs": 3.0}, 12, "early_stopping=none"),
        ({"num_epochs": 3.0}, 33, "early_stopping=none num_epochs=6"),
    ],
)
def test_the_suggested_overrides_make_more_updates(
    settings: dict[str, Any], stopped_at: int | None, expected: str
) -> None:
    """The control is max_steps alone, which makes no update if the run has ended by epochs."""
    plan = Plan(103, **settings, batch_size=10)
    step = stopped_at or plan.num_updates
    overrides = plan.longer_run_overrides(step, stopped_at is not None)
    assert overrides == expected
    given = dict(override.split("=") for override in overrides.split() if not override.startswith("early"))
    assert Plan(103, **settings | {key: float(value) for key, value in given.items()}, batch_size=10).num_updates > step
    assert Plan(103, num_epochs=3.0, max_steps=2 * 33, batch_size=10).num_updates == 33, "the control"


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9))
def test_positions_cover_every_update_of_every_epoch(samples: int, batch: int, micro: int) -> None:
    plan = Plan(samples, num_epochs=2.0, batch_size=batch, micro_batch_size=min(micro, batch))
    position, visited = Position(), []
    for _ in range(plan.num_updates):
        update = plan.update_in_epoch(position)
        visited.append((position.epoch, update))
        position = plan.next_position(position, min(batch, samples - update * batch))
    assert visited == [(epoch, update) for epoch in (0, 1) for update in range(plan.updates_per_epoch)]
    assert position == Position(plan.num_updates, 2, 0, 2 * samples)


def test_logging_validation_and_saving_happen_at_intervals_epoch_ends_and_the_end(tmp_path: Path) -> None:
    recorder = RecordingTracker([])
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
def test_a_non_finite_loss_or_gradient_stops_before_the_update(tmp_path: Path, where: str) -> None:
    model = tiny_model()
    trainer = trainer_of(tmp_path, FakeData(12), model, Plan(12, num_epochs=1.0, batch_size=4), log_interval=1)
    trainer.train_update()
    if where == "parameter":
        model.norm.weight.data[0] = float("nan")
    else:
        model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        TrainingError, match=r"(?s)update 2: .*\nNot finite: .*records: record-4, record-5, record-6, record-7"
    ):
        trainer.train_update()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)
    trainer.optimizer.step()  # the control: the refused update would change the parameters
    assert not torch.equal(model.embedding.weight, before["embedding.weight"])


def test_a_non_finite_validation_loss_is_never_the_best(tmp_path: Path) -> None:
    model = tiny_model()
    trainer = trainer_of(tmp_path, FakeData(12), model, Plan(12, batch_size=4))
    assert trainer.validate()
    best = trainer.best.metrics["val/loss"]
    model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="validation loss is nan"):
        trainer.validate()
    assert trainer.best.metrics["val/loss"] == best


@pytest.mark.parametrize("schedule", [constant, linear, cosine])
def test_schedules_warm_up_and_decay_to_the_final_ratio(schedule: Any) -> None:
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
    assert rates[19] == rates[20] == (1.0 if schedule is constant else 0.1)
    assert (rates[11] + rates[12]) / 2 == pytest.approx(1.0 if schedule is constant else 0.55)
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize("num_updates", [1, 2, 3, 10, 20, 100])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.08, 1.0])
def test_last_update_has_the_final_learning_rate(schedule: Any, num_updates: int, warmup_ratio: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, num_updates, warmup_ratio=warmup_ratio, final_ratio=0.05)
    rates = [scheduler.lr_lambdas[0](step) for step in range(num_updates)]
    assert rates[-1] == 0.05
    assert num_updates == 1 or max(rates) == 1.0


@pytest.mark.parametrize("schedule", [constant, linear, cosine])
@pytest.mark.parametrize(("ratio", "expected"), [(0.07, 7), (0.08, 8), (0.14, 14), (0.29, 29), (0.071, 8)])
def test_warm_up_has_the_exact_number_of_updates(schedule: Any, ratio: float, expected: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = schedule(optimizer, 100, warmup_ratio=ratio)
    rates = [scheduler.lr_lambdas[0](step) for step in range(100)]
    assert rates.index(1.0) == expected


def test_shares_are_exact_where_the_product_is_an_integer() -> None:
    products = [(share, total) for total in (10, 100, 1000, 70_000_000) for share in range(1, 101)]
    naive = [math.ceil(share / 100 * total) for share, total in products]
    exact = [-(-share * total // 100) for share, total in products]
    assert [share_of(total, share / 100) for share, total in products] == exact != naive


def test_norms_and_embeddings_do_not_decay() -> None:
    model = tiny_model()
    decayed, others = parameter_groups(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert others["weight_decay"] == 0.0
    assert all("norm" in names[id(p)] or names[id(p)].split(".")[0] == "embedding" for p in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


# Micro-batches


class DividesEachMicroBatch(MtpObjective):
    """An objective that divides each micro-batch by its own number of positions, as if all were equal."""

    def __init__(self, num_parts: int) -> None:
        super().__init__(Uniform())
        self.num_parts = num_parts

    def loss(self, model: MtpModel, prepared: PreparedBatch) -> tuple[torch.Tensor, MetricSums]:
        own = self.denominators(model, prepared.batch)
        denominators = {name: total.clamp(min=1) * self.num_parts for name, total in own.items()}
        return super().loss(model, replace(prepared, denominators=denominators))


def parameters_after(folder: Path, micro_batch_size: int, naive: bool = False) -> torch.Tensor:
    """Return all parameters after three updates of eight samples of different lengths."""
    model, plan = tiny_model(), Plan(24, num_epochs=1.0, batch_size=8, micro_batch_size=micro_batch_size)
    objective = DividesEachMicroBatch(8 // micro_batch_size) if naive else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    trainer = trainer_of(folder, VariableLengthData(24), model, plan, objective=objective, optimizer=optimizer)
    for _ in range(3):
        trainer.train_update()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.slow
def test_an_update_is_the_same_for_any_micro_batch_size(tmp_path: Path) -> None:
    one_batch, start = parameters_after(tmp_path, 8), torch.cat([p.flatten() for p in tiny_model().parameters()])
    assert (one_batch - start).norm() > 0.1
    for size in (2, 1):
        torch.testing.assert_close(parameters_after(tmp_path, size), one_batch, rtol=0, atol=1e-6)
        assert (parameters_after(tmp_path, size, naive=True) - one_batch).abs().max() > 1e-4
    torch.testing.assert_close(parameters_after(tmp_path, 8, naive=True), one_batch, rtol=0, atol=1e-6)


# Validation


def test_validation_uses_no_dropout_and_pools_the_sums_of_its_batches(tmp_path: Path) -> None:
    model, data = tiny_model(dropout=0.3), VariableLengthData(10)
    trainer = trainer_of(tmp_path, data, model, Plan(10, batch_size=5, micro_batch_size=3))
    assert trainer.validate()
    first = trainer.last_validation
    assert not trainer.validate(), "an equal loss counted as an improvement"
    assert trainer.last_validation == first

    objective, every = trainer.objective, data.batch(0, 10)
    one_batch = objective.metrics(objective.evaluate(model, every))
    assert first == pytest.approx({f"val/{name}": value for name, value in one_batch.items()}, rel=1e-5)
    parts = [objective.metrics(objective.evaluate(model, batch)) for batch in data.validation_batches(3)]
    assert sum(part["loss"] for part in parts) / len(parts) != pytest.approx(one_batch["loss"], rel=1e-4)

    model.train()
    dropped = [objective.metrics(objective.evaluate(model, every))["loss"] for _ in range(2)]
    assert dropped[0] != dropped[1] and one_batch["loss"] not in dropped


def test_validation_does_not_change_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = []
    for validates in (False, True):
        model = tiny_model(dropout=0.3)
        torch.manual_seed(3)
        trainer = trainer_of(tmp_path, VariableLengthData(16), model, Plan(16, batch_size=8, micro_batch_size=4))
        for _ in range(3):
            before = trainer.position
            trainer.train_update()
            assert trainer.position.step == before.step + 1
            position, generators = trainer.position, torch.get_rng_state()
            if validates:
                trainer.validate()
            assert trainer.position == position and torch.equal(torch.get_rng_state(), generators)
        ends.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))

    model = tiny_model(dropout=0.3)  # the control: validation leaves the model in eval mode
    torch.manual_seed(3)
    trainer = trainer_of(tmp_path, VariableLengthData(16), model, Plan(16, batch_size=8, micro_batch_size=4))
    model.eval()
    monkeypatch.setattr(model, "train", lambda mode=True: model)
    for _ in range(3):
        trainer.train_update()
    assert not all(torch.equal(one, other) for one, other in zip(ends[0], model.parameters(), strict=True))


# Early stopping


class GivenLosses(MtpObjective):
    """An objective with given validation losses; the last one is repeated."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__(Uniform())
        self.losses: Iterator[float] = iter(losses)
        self.last = math.nan

    def metrics(self, sums: MetricSums) -> dict[str, float]:
        values = super().metrics(sums)
        if "weight_mean" not in values:  # the objective is called for a validation
            self.last = next(self.losses, self.last)
            values["loss"] = self.last
        return values


def stopping_run(folder: Path, losses: list[float]) -> Trainer:
    plan = Plan(40, num_epochs=3.0, batch_size=4)
    return trainer_of(
        folder, FakeData(40), tiny_model(), plan, early_stopping=EarlyStopping(patience=2, min_delta=0.1),
        objective=GivenLosses(losses), eval_interval=2, log_interval=3,
    )  # fmt: skip


class GivenPassRates:
    """An evaluation of samples with given pass rates; a validation without one graded no sample."""

    def __init__(self, *rates: float | None) -> None:
        self.rates = iter(rates)

    def validate(self, model: Any, step: int) -> dict[str, float]:
        rate = next(self.rates)
        return {} if rate is None else {"pass_rate": rate}


def test_the_monitored_pass_rate_chooses_the_best_checkpoint_also_after_a_resume(tmp_path: Path) -> None:
    def run(num_updates: int, *rates: float | None) -> Trainer:
        return trainer_of(
            tmp_path, FakeData(40), tiny_model(), Plan(40, num_epochs=3.0, max_steps=num_updates, batch_size=4),
            early_stopping=EarlyStopping(monitor="val/pass_rate", patience=9), objective=GivenLosses([5.0, 4.0, 3.0]),
            sample_evaluation=GivenPassRates(*rates), eval_interval=2,
        )  # fmt: skip

    first = run(8, 0.25, 0.75, None, 0.5)
    result = first.fit()
    assert (result.best_step, result.best_loss, result.final_loss) == (4, 4.0, 3.0)
    marked = json.loads((tmp_path / "checkpoints" / "best.json").read_text())
    assert marked == {"folder": "step_00000004", "step": 4, "val/loss": 4.0, "val/pass_rate": 0.75}
    second = run(14, 0.75, 0.75, 0.75)
    second.restore(first.snapshot())
    assert second.fit().best_step == 14, "of equal pass rates, the lowest loss is the best"
    never = run(2, None)
    with pytest.raises(TrainingError, match="monitor=val/pass_rate: is never measured; choose one of val/canonical_"):
        never.fit()


def test_a_converged_run_stops_saves_and_makes_no_update_when_resumed(tmp_path: Path) -> None:
    recorder, trainer = RecordingTracker([]), stopping_run(tmp_path, [5.0, 4.0, 4.5, 3.95, 3.0])
    result = trainer.fit([recorder])
    assert result.early_stopped and result.total_steps == 8
    assert result.stop_reason is not None and result.stop_reason.startswith("converged: val/loss")
    assert (result.final_loss, result.best_loss, result.best_step) == (3.95, 3.95, 8)
    assert recorder.values("val/loss") == [5.0, 4.0, 4.5, 3.95]
    assert recorder.values("early_stopping/counter")[-1] == 2.0
    assert trainer.checkpoints.latest().name == "step_00000008"

    resumed = stopping_run(tmp_path, [1.0])
    resumed.restore(load(trainer.checkpoints.latest()))
    again = RecordingTracker([])
    assert resumed.fit([again]) == result
    assert again.lines == []

    forgetful, snapshot = stopping_run(tmp_path, [1.0]), load(trainer.checkpoints.latest())
    snapshot.state["validation"] |= {"last": {}}
    forgetful.restore(snapshot)
    assert forgetful.fit() == replace(result, final_loss=None)  # the control: the last validation is lost

    forgetful, snapshot = stopping_run(tmp_path, [1.0]), load(trainer.checkpoints.latest())
    snapshot.state["early_stopping"] |= {"reason": None, "counter": 0}
    forgetful.restore(snapshot)
    assert forgetful.fit().total_steps > 8  # the control: the stopper's state is lost


@pytest.mark.slow
def test_a_run_that_keeps_improving_reaches_the_end_of_its_plan(tmp_path: Path) -> None:
    result = stopping_run(tmp_path, [5.0 - 0.2 * i for i in range(20)]).fit()
    assert (result.early_stopped, result.stop_reason, result.total_steps) == (False, None, 30)


class ZeroGradients(MtpObjective):
    """An objective whose gradients are zero before update `until` and unchanged from then on."""

    def __init__(self, until: int) -> None:
        super().__init__(Uniform())
        self.until, self.update = until, 0

    def loss(self, model: MtpModel, prepared: PreparedBatch) -> tuple[torch.Tensor, MetricSums]:
        loss, sums = super().loss(model, prepared)
        return loss * float(self.update >= self.until), sums

    def finish_update(self) -> None:
        self.update += 1

    def state_dict(self) -> dict[str, Any]:
        return {"update": self.update}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update = state["update"]


def unstable_run(folder: Path, ratio: float = 0.7) -> Trainer:
    stopping = EarlyStopping(window=10, threshold=1e-6, ratio=ratio)
    plan = Plan(40, num_epochs=3.0, batch_size=4, micro_batch_size=2)
    return trainer_of(
        folder, FakeData(40), tiny_model(), plan, early_stopping=stopping, objective=ZeroGradients(5), save_interval=8
    )


@pytest.mark.slow
def test_seven_large_gradients_among_the_last_ten_stop_the_run_also_after_a_resume(tmp_path: Path) -> None:
    expected = "unstable: 7 of the last 10 gradient norms exceeded 1e-06"
    uninterrupted = unstable_run(tmp_path)
    result = uninterrupted.fit()
    assert (result.total_steps, result.stop_reason) == (12, expected)
    assert uninterrupted.checkpoints.latest().name == "step_00000012"
    assert unstable_run(tmp_path, ratio=0.8).fit().total_steps == 13

    for cut in (3, 8):
        trainer = unstable_run(tmp_path / str(cut))
        for _ in range(cut):
            trainer.train_update()
        trainer.save(is_best=False)
        snapshot = load(trainer.checkpoints.latest())
        resumed = unstable_run(tmp_path / str(cut))
        resumed.restore(snapshot)
        result = resumed.fit()
        assert (result.total_steps, result.stop_reason) == (12, expected)

    snapshot.state["early_stopping"]["exceeded"] = []  # the control: an empty window
    forgetful = unstable_run(tmp_path)
    forgetful.restore(snapshot)
    assert forgetful.fit().total_steps == 8 + 10


@pytest.mark.parametrize("algorithm", [Critic(), Uniform()])
def test_constant_values_stop_a_run_with_a_value_head(tmp_path: Path, algorithm: Algorithm) -> None:
    model = tiny_model()
    if algorithm.needs_values:
        model.add_value_head()
    result = trainer_of(
        tmp_path, FakeData(12), model, Plan(12, num_epochs=1.0, batch_size=4),
        objective=MtpObjective(algorithm), early_stopping=EarlyStopping(variance_min=1e-9),
    ).fit()  # fmt: skip
    reason = "out of range: value variance 0 < 1e-09" if algorithm.needs_values else None
    assert (result.total_steps, result.stop_reason) == (1 if reason else 3, reason)


# Metrics


class DataWithReferences(FakeData):
    """Fake data in which every token's reference loss is 2."""

    def batch(self, start: int, stop: int) -> Batch:
        batch = super().batch(start, stop)
        return Batch(**vars(batch) | {"reference_losses": torch.full((*batch.tokens.shape, 1), 2.0)})


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("algorithm", [Uniform(), Critic(), ExcessLoss()])
def test_logged_metrics_are_those_that_can_be_monitored(tmp_path: Path, algorithm: Algorithm, num_heads: int) -> None:
    recorder, model = RecordingTracker([]), tiny_model(num_heads)
    if algorithm.needs_values:
        model.add_value_head()
    trainer_of(
        tmp_path, DataWithReferences(8), model, Plan(8, num_epochs=1.0, batch_size=4), log_interval=1,
        objective=MtpObjective(algorithm), early_stopping=EarlyStopping(patience=9, window=1, variance_min=0.0),
    ).fit([recorder])  # fmt: skip
    logged = {name for _, metrics in recorder.lines for name in metrics}
    names = metric_names(num_heads, values=algorithm.needs_values)
    beside = {name for name in logged if name.startswith("early_stopping/")} | {"train/tokens_per_second", "tokens"}
    beside |= {"val/reference_better"} if algorithm.needs_better_reference else set()  # neither direction is better
    assert len(set(names)) == len(names)
    assert logged - beside == set(names)
    assert logged != set(names)
    assert set(names) != set(metric_names(num_heads, values=not algorithm.needs_values))
    assert json.dumps([metrics for _, metrics in recorder.lines], allow_nan=False)
