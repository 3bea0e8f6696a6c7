"""Tests of interrupted runs of one and two ranks: the resumed run equals an uninterrupted one, or it is refused."""

import json
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import DistributedSampler

from tests.commands.test_resume import trace
from tests.conftest import Invoke, compose_config
from tests.distributed.test_parallel import differences
from tests.support.ranks import Ranks
from tests.support.training import COMMON, STRATEGIES, metrics_of
from wmtp.algorithms.critic import Critic
from wmtp.data import dataset as dataset_module
from wmtp.data.collate import Batch
from wmtp.data.dataset import Dataset
from wmtp.data.sampler import epoch_batches
from wmtp.distributed.process_group import Processes
from wmtp.distributed.rng import generator_states, restore_generators
from wmtp.errors import InputError, InterruptedRun
from wmtp.objectives.base import PreparedBatch
from wmtp.objectives.mtp import MtpObjective
from wmtp.runtime.run_dir import JobProgress
from wmtp.training import trainer as trainer_module
from wmtp.training.early_stopping import EarlyStopping
from wmtp.training.run import Run
from wmtp.training.trainer import Trainer

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.slow]
HARDWARE = {"alone": ["hardware=cpu"], **STRATEGIES}


class Signal(NamedTuple):
    """A SIGTERM that one rank gets in the middle of the micro-batches of an update."""

    rank: int
    update: int


class Session(NamedTuple):
    """The record of one rank, from one start of a run to its end."""

    end: str
    """How the session ended: "finished", "interrupted …" or "refused: …"."""
    seen: list[tuple[int, tuple[str, ...]]]
    """The epoch and the record ids of each micro-batch."""


NO_RANK = Session("", [])
"""The session of the second rank of a run with one process."""
Mutation = Callable[[pytest.MonkeyPatch], None]


def run_session(
    folder: Path, overrides: Sequence[str], sigterm: Signal | None = None, mutation: str | None = None
) -> Session:
    """Start or resume a run, in this process or as a rank."""
    (folder / ".hydra").mkdir(exist_ok=True, parents=True)
    resume = [f"resume={folder}"] if (folder / "checkpoints").exists() else []
    rank, seen = Processes().rank, []
    original_batches, original_accumulate = Dataset.micro_batches, Trainer._accumulate_gradients

    def record_batches(self: Dataset, epoch: int, *arguments: Any) -> list[Batch]:
        batches = original_batches(self, epoch, *arguments)
        seen.extend((epoch, batch.record_ids) for batch in batches)
        return batches

    def accumulate_with_signal(self: Trainer, batches: list[Batch]) -> Any:
        if not isinstance(self.objective, MtpObjective):
            return original_accumulate(self, batches)
        update, original_loss = self.position.step + 1, self.objective.loss

        def loss(model: Any, prepared: PreparedBatch) -> Any:
            batch = prepared.batch
            if sigterm == (rank, update) and batch is batches[len(batches) // 2]:
                signal.raise_signal(signal.SIGTERM)
            total, sums = original_loss(model, prepared)
            broken_batch = "on_nonfinite=skip" in overrides and update == 3 and batch.number % 4 == 3
            return total * (float("nan") if broken_batch else 1.0), sums

        self.objective.loss = loss  # type: ignore[method-assign]
        try:
            return original_accumulate(self, batches)
        finally:
            del self.objective.loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dataset, "micro_batches", record_batches)
        patch.setattr(Trainer, "_accumulate_gradients", accumulate_with_signal)
        if mutation is not None:
            MUTATIONS[mutation](patch)
        try:
            Run(compose_config(*COMMON, *overrides, *resume), folder, JobProgress(), []).train()
        except InterruptedRun as interrupted:
            return Session(f"interrupted {interrupted.exit_code}", seen)
        except InputError as error:
            return Session(f"refused: {error}", seen)
    return Session("finished", seen)


def run_sessions(ranks: Ranks, where: str, *arguments: Any) -> list[Session]:
    """Return the session of this process, or the sessions of all ranks."""
    if where == "alone":
        return [run_session(*arguments)]
    return ranks(run_session, *arguments, timeout=60)


# Resume with bit-identical results

CRITIC_WITH_DROPOUT = [
    "algo=critic", "max_steps=12", "pretrain.max_steps=2", "pretrain.num_epochs=1", "model.dropout=0.1",
    "model.num_heads=2",
    "early_stopping=stability", "early_stopping.patience=99", "early_stopping.window=15",
    "early_stopping.threshold=1e9", "early_stopping.variance_max=1e9", "on_nonfinite=skip", "model.value_head_dim=8",
]  # fmt: skip
"""Overrides of a critic with dropout and every kind of saved state. Its third update is not finite, and is skipped."""


def _generators_of_the_first(patch: pytest.MonkeyPatch) -> None:
    def restore(states: list[dict[str, str]], processes: Processes) -> None:
        restore_generators([states[0]] * len(states), processes)

    patch.setattr(trainer_module, "restore_generators", restore)


def _without_generators(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer_module, "restore_generators", lambda *arguments: None)


def _without_optimizer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer_module, "restore_optimizer", lambda *arguments: None)


def _without_state_of(kind: type) -> Mutation:
    return lambda patch: patch.setattr(kind, "load_state_dict", lambda *arguments: None)


def _with_state(**changes: Any) -> Mutation:
    def change(patch: pytest.MonkeyPatch) -> None:
        restore = Trainer.restore

        def changed(self: Trainer, snapshot: Any, *arguments: Any) -> Any:
            for section, values in changes.items():
                known = snapshot.state[section]
                snapshot.state[section] = known | values if isinstance(known, dict) else values
            return restore(self, snapshot, *arguments)

        patch.setattr(Trainer, "restore", changed)

    return change


def _same_order_every_epoch(patch: pytest.MonkeyPatch) -> None:
    def order(lengths: Any, batch_size: int, seed: int, epoch: int, groups: Any = None) -> list[list[int]]:
        return epoch_batches(lengths, batch_size, seed, 0, groups)

    patch.setattr(dataset_module, "epoch_batches", order)


STATE_MUTATIONS: dict[str, Mutation] = {
    "generators": _without_generators,
    "generators of each rank": _generators_of_the_first,
    "objective": _without_state_of(Critic),
    "early stopping": _without_state_of(EarlyStopping),
    "skipped updates": _with_state(skipped_updates=0),
}
MUTATIONS = STATE_MUTATIONS | {
    "optimizer": _without_optimizer,
    "epoch starts again": _with_state(position={"batch_in_epoch": 0}),
    "same order": _same_order_every_epoch,
}


OF_RANKS = ["generators of each rank"]
"""The mutations that only a run with two ranks shows. The others take less time in one process."""


@pytest.mark.parametrize("where", HARDWARE)
def test_a_run_interrupted_twice_equals_an_uninterrupted_one(
    ranks: Ranks, tmp_path: Path, cache: Path, where: str
) -> None:
    overrides = [f"cache_dir={cache}", *CRITIC_WITH_DROPOUT, *HARDWARE[where]]
    uninterrupted, interrupted_run = tmp_path / "uninterrupted", tmp_path / "interrupted_run"
    assert {one.end for one in run_sessions(ranks, where, uninterrupted, overrides)} == {"finished"}
    saved = {}
    for rank, update in [(1, 7), (0, 10)]:  # in the middle of an epoch, and in the last update of one
        sigterm = Signal(0 if where == "alone" else rank, update)
        assert {one.end for one in run_sessions(ranks, where, interrupted_run, overrides, sigterm)} == {
            "interrupted 143"
        }
        saved[update] = checkpoint(shutil.copytree(interrupted_run, tmp_path / f"interrupted at {update}"), update)
    assert {one.end for one in run_sessions(ranks, where, interrupted_run, overrides)} == {"finished"}
    assert trace(interrupted_run) == trace(uninterrupted)
    losses = [line["train/loss"] for line in metrics_of(interrupted_run) if "train/loss" in line]
    assert len(losses) == 12
    state = json.loads(checkpoint(interrupted_run, 12)["state.json"])
    assert state["skipped_updates"] == 1
    assert len(set(map(str, state["generators"]))) == (1 if where == "alone" else 2)

    mutations = {"alone": [name for name in STATE_MUTATIONS if name not in OF_RANKS], "ddp": OF_RANKS}
    for name in mutations.get(where, ()):
        folder = shutil.copytree(tmp_path / "interrupted at 7", tmp_path / name)
        run_sessions(ranks, where, folder, overrides, Signal(0, 10), name)
        assert checkpoint(folder, 10) != saved[10], f"control: the checkpoint must differ without {name}"


def checkpoint(run: Path, update: int) -> dict[str, bytes]:
    """Return the contents of the checkpoint files of an update."""
    return {path.name: path.read_bytes() for path in (run / "checkpoints" / f"step_{update:08d}").iterdir()}


# Use of every sample

SAMPLES = 103
UNEVEN_DATA = [f"data.num_train={SAMPLES}", "max_steps=28", "model.dropout=0", "num_validation_samples=0"]
"""Overrides with 13 updates per epoch; the last of them has 7 samples. The second epoch ends with update 26."""


def records_by_epoch(given: Sequence[Session]) -> dict[int, list[str]]:
    """Return the records that all ranks used in each epoch; those of one rank are in order."""
    found: dict[int, list[str]] = {}
    for one in [*given[::2], *given[1::2]]:
        for epoch, records in one.seen:
            found.setdefault(epoch, []).extend(records)
    return found


def check_every_sample_is_used_once(given: Sequence[Session]) -> None:
    first, second, third = (records_by_epoch(given).get(epoch, []) for epoch in range(3))
    counts = Counter(first)
    missing, repeated = SAMPLES - len(counts), sum(count - 1 for count in counts.values())
    assert (missing, repeated) == (0, 0)
    assert Counter(second) == counts and len(third) == 2 * 8
    assert first != second, "the second epoch has a new order"


def run_with_interruptions(
    ranks: Ranks,
    where: str,
    folder: Path,
    overrides: Sequence[str],
    signals: Sequence[Signal],
    mutation: str | None = None,
) -> list[Session]:
    """Run with interruptions by signals, and resume after each of them. Return two sessions for each start."""
    given: list[Session] = []
    for sigterm in (*signals, None):
        found = run_sessions(ranks, where, folder, [*overrides, *HARDWARE[where]], sigterm, mutation)
        given += [*found, *([NO_RANK] * (2 - len(found)))]
    return given


def test_every_sample_is_used_once_despite_interruptions(ranks: Ranks, tmp_path: Path, cache: Path) -> None:
    overrides = [f"cache_dir={cache}", *UNEVEN_DATA]
    in_last_update_of_epoch = Signal(0, 13)
    signals = [Signal(1, 5), in_last_update_of_epoch, Signal(1, 20)]
    given = run_with_interruptions(ranks, "ddp", tmp_path / "run", overrides, signals)
    assert [one.end for one in given] == ["interrupted 143"] * 6 + ["finished"] * 2
    check_every_sample_is_used_once(given)
    for mutation, needed in (("same order", []), ("epoch starts again", [Signal(0, 5)])):  # one process takes less time
        control = run_with_interruptions(ranks, "alone", tmp_path / mutation, overrides, needed, mutation)
        with pytest.raises(AssertionError, match="new order" if mutation == "same order" else None):
            check_every_sample_is_used_once(control)

    samplers = [DistributedSampler(range(SAMPLES), num_replicas=2, rank=rank) for rank in (0, 1)]
    orders = [list(sampler) for sampler in samplers]
    assert len(orders[0] + orders[1]) == SAMPLES + 1, (
        "torch's sampler repeats one sample, so that all ranks have equally many"
    )
    assert [list(sampler) for sampler in samplers] == orders, "its order changes only with `set_epoch`"


# Changed numbers of processes and changed settings


@pytest.mark.parametrize(
    ("before", "after"), [("ddp", "alone"), ("alone", "fsdp"), pytest.param("fsdp", "ddp", marks=pytest.mark.deep)]
)
def test_another_number_of_ranks_resumes_with_the_same_samples(
    ranks: Ranks, tmp_path: Path, cache: Path, before: str, after: str
) -> None:
    overrides = [f"cache_dir={cache}", *UNEVEN_DATA]
    uninterrupted, run = tmp_path / "uninterrupted", tmp_path / "run"
    run_session(uninterrupted, [*overrides, *HARDWARE["alone"]])
    first = run_sessions(ranks, before, run, [*overrides, *HARDWARE[before]], Signal(0, 9))
    control = shutil.copytree(run, tmp_path / "control")
    second = run_sessions(ranks, after, run, [*overrides, *HARDWARE[after]])
    check_every_sample_is_used_once([*[*first, NO_RANK][:2], *[*second, NO_RANK][:2]])
    found = differences(metrics_of(uninterrupted), metrics_of(run))
    assert max(value for name, value in found.items() if name.endswith("loss")) <= 1e-6, found
    if after == "alone":
        run_session(control, [*overrides, *HARDWARE[after]], Signal(0, 11), "optimizer")
        found = differences(metrics_of(uninterrupted)[:11], metrics_of(control))
        assert found["train/loss"] > 1e-6 and found["train/lr"] == 0.0, "control: the state of the optimizer is lost"
    (resume,) = [json.loads(line) for line in (run / "resumes.jsonl").read_text().splitlines()]
    assert resume["processes"] == (1 if after == "alone" else 2) and not resume["declared_changes"]


def draw_after_restore(states: list[dict[str, str]], seed: int) -> list[float]:
    """Seed the generator with `seed`, restore saved states of ranks, and return random numbers drawn afterwards."""
    torch.manual_seed(seed)
    restore_generators(states, Processes())
    return torch.rand(3).tolist()


def test_another_number_of_ranks_draws_new_dropout_on_each_rank(ranks: Ranks) -> None:
    torch.manual_seed(7)
    state = generator_states()
    first, second = ranks(draw_after_restore, [state], 1)
    assert ranks(draw_after_restore, [state], 2) == [first, second], "the numbers depend only on the saved state"
    assert first != second
    torch.manual_seed(8)
    assert ranks(draw_after_restore, [generator_states()], 1)[0] != first
    alone = draw_after_restore([state, state], 1)
    assert draw_after_restore([state, state], 2) == alone != torch.rand(3).tolist()
    control = draw_after_restore([state], 1), draw_after_restore([state], 2)
    assert control[0] == control[1] != first, "the same number of ranks continues the generator"


def test_a_declared_change_of_the_micro_batch_size_keeps_the_samples(tmp_path: Path, cache: Path) -> None:
    overrides = [f"cache_dir={cache}", *UNEVEN_DATA]
    first = run_session(tmp_path, overrides, Signal(0, 9))
    second = run_session(tmp_path, [*overrides, "micro_batch_size=4", "resume_override=[micro_batch_size]"])
    check_every_sample_is_used_once([first, NO_RANK, second, NO_RANK])
    (resume,) = [json.loads(line) for line in (tmp_path / "resumes.jsonl").read_text().splitlines()]
    assert resume["declared_changes"] == {"micro_batch_size": "was 2, is now 4"}


def test_changes_that_affect_the_samples_must_be_declared(ranks: Ranks, tmp_path: Path, cache: Path) -> None:
    overrides = [f"cache_dir={cache}", "model.dropout=0", "eval_interval=99"]
    run = tmp_path / "run"
    ranks(run_session, run, [*overrides, *STRATEGIES["ddp"]], Signal(0, 3), timeout=60)
    lines = metrics_of(run)
    changes = {
        "seed": "seed=1", "batch_size": "batch_size=4", "data": "data.num_train=36",
        "micro_batch_size": "micro_batch_size=4", "model": "model.hidden_dim=64", "optimizer": "optimizer.lr=1",
    }  # fmt: skip
    for name, change in changes.items():
        for one in ranks(run_session, run, [*overrides, *STRATEGIES["ddp"], change], timeout=60):
            assert one.end.startswith("refused: ") and f"\n  {name}: " in one.end and one.seen == []
            declarable = name not in ("batch_size", "model")
            assert (f"resume_override=[{name}]" in one.end) is declarable
    # if it is not set, micro_batch_size depends on the number of ranks; a resumed run keeps its value
    fewer, more, default_size = tmp_path / "fewer", tmp_path / "more", [*overrides, "micro_batch_size=null"]
    ranks(run_session, fewer, [*default_size, *STRATEGIES["ddp"]], Signal(0, 3), timeout=60)
    alone = run_session(fewer, [*default_size, *HARDWARE["alone"]])
    assert alone.seen and max(len(records) for _, records in alone.seen) == 4
    run_session(more, [*default_size, *HARDWARE["alone"]], Signal(0, 3))  # refused if a rank would have no samples
    for one in ranks(run_session, more, [*default_size, *STRATEGIES["ddp"]], timeout=60):
        assert "\n  micro_batch_size: was 8, is now 4" in one.end and one.seen == []
    assert metrics_of(run) == lines and not (run / "resumes.jsonl").exists()

    declared = [*overrides, "seed=1", "resume_override=[seed]", *STRATEGIES["ddp"]]
    assert [one.end for one in ranks(run_session, run, declared, Signal(0, 5), timeout=60)] == ["interrupted 143"] * 2
    (resume,) = [json.loads(line) for line in (run / "resumes.jsonl").read_text().splitlines()]
    assert resume["declared_changes"] == {"seed": "was 0, is now 1"}
    assert resume["checkpoint"] == "checkpoints/step_00000003" and resume["processes"] == 2
    (refusal,) = {one.end for one in ranks(run_session, run, [*overrides, *STRATEGIES["ddp"]], timeout=60)}
    assert "\n  seed: was 1, is now 0" in refusal, "the declared seed is now the seed of the run"


def test_keys_that_a_checkpoint_depends_on_cannot_be_declared(invoke: Invoke) -> None:
    assert invoke("max_steps=1", "num_samples=0", "hydra.run.dir=run").code == 0
    lines = Path("run/metrics.jsonl").read_text()
    for name in ("batch_size", "tokenizer", "model"):
        refused = invoke("resume=run", f"resume_override=[{name}]", "batch_size=4", "max_steps=2", tiny=False)
        assert refused.code == 2 and "resume_override" in refused.err and "'micro_batch_size'" in refused.err
    assert Path("run/metrics.jsonl").read_text() == lines
