"""Tests that a resumed run equals an uninterrupted one bit for bit, and that this needs every part of the state."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY, Invoke, run_command
from wmtp.checkpoint import store as store_module
from wmtp.checkpoint.state import Snapshot
from wmtp.training import trainer as trainer_module
from wmtp.training.optim import LambdaLR

pytestmark = pytest.mark.xdist_group("resume")  # its tests share what one fixture makes

RUN = [
    "max_steps=20", "batch_size=4", "micro_batch_size=2", "model.dropout=0.1", "log_interval=1", "eval_interval=1",
    "save_interval=1", "checkpoint.keep_last=99", "optimizer.lr=3", "scheduler.warmup_ratio=0.9",
    "early_stopping=none",
]  # fmt: skip
"""Forty samples: ten updates make an epoch. The learning rate grows until, before step 7, validation gets worse."""
FEW_SAVES = "save_interval=null"
"""The save interval of a resumed run does not change its results."""


@pytest.fixture(scope="module")
def uninterrupted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of twenty updates with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_command(["tracking=none", f"cache_dir={cache}", *TINY, *RUN, "hydra.run.dir=run"], patch) == 0
    return folder / "run"


def start_over(uninterrupted: Path, name: str) -> Path:
    """Copy a run's folder into the current folder."""
    shutil.copytree(uninterrupted, name)
    return Path(name)


def cut_back(run: Path, step: int, name: str) -> Path:
    """Return a copy of a run's folder in the state after a crash, with `step` as the last checkpoint."""
    folder = start_over(run, name)
    for path in (folder / "checkpoints").glob("step_*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (folder / "summary.json").unlink()
    return folder


def trace(run: Path) -> dict[str, Any]:
    """Return everything that must be equal in a resumed and an uninterrupted run."""
    last = max((run / "checkpoints").glob("step_*"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    ignored = ("time", "train/tokens_per_second")
    return {
        "files": {path.name: path.read_bytes() for path in (*last.iterdir(), run / "checkpoints" / "best.json")},
        "metrics": [{name: value for name, value in line.items() if name not in ignored} for line in lines],
    }


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 10], ids=["mid-epoch", "epoch-end"])
def test_a_resumed_run_equals_an_uninterrupted_one(invoke: Invoke, uninterrupted: Path, step: int) -> None:
    resumed = cut_back(uninterrupted, step, "resumed")
    outcome = invoke(f"resume={resumed}", FEW_SAVES, tiny=False)
    assert outcome.code == 0, outcome.err
    assert f"/{resumed}/checkpoints/step_{step:08d}" in outcome.out
    assert trace(resumed) == trace(uninterrupted)
    assert json.loads((resumed / "status.json").read_text())["state"] == "FINISHED"


def _without_model(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer_module, "load_model", lambda *arguments: None)


def _without_optimizer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer_module, "restore_optimizer", lambda *arguments: None)


def _without_scheduler(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LambdaLR, "load_state_dict", lambda *arguments: None)


def _without_generators(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trainer_module, "restore_generators", lambda *arguments: None)


def _with_state(**changes: Any) -> Any:
    def change(patch: pytest.MonkeyPatch) -> None:
        def load(*arguments: Any, **options: Any) -> Snapshot:
            snapshot = store_module.load(*arguments, **options)
            for section, values in changes.items():
                snapshot.state[section] |= values
            return snapshot

        patch.setattr("wmtp.training.start.load", load)

    return change


MUTANTS = {
    "model": _without_model,
    "optimizer": _without_optimizer,
    "scheduler": _without_scheduler,
    "generators": _without_generators,
    "epoch": _with_state(position={"epoch": 0}),
    "batch_in_epoch": _with_state(position={"batch_in_epoch": 0}),
    "step": _with_state(position={"step": 16}),
    "tokens": _with_state(position={"tokens": 0}),
    "best validation": _with_state(validation={"best": {}}),
    "best step": _with_state(validation={"best_step": None}),
}


@pytest.mark.slow
def test_a_resume_without_any_part_of_the_state_gives_another_run(
    invoke: Invoke, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert json.loads((uninterrupted / "checkpoints" / "best.json").read_text())["step"] < 7
    for name, mutate in MUTANTS.items():
        resumed = cut_back(uninterrupted, 17, name.replace(" ", "-"))
        with monkeypatch.context() as patch:
            mutate(patch)
            outcome = invoke(f"resume={resumed}", FEW_SAVES, tiny=False)
        assert outcome.code == 0, f"{name}: {outcome.err}"
        assert trace(resumed) != trace(uninterrupted), f"{name}: the resumed run equals the uninterrupted run"


@pytest.mark.slow
def test_a_finished_run_can_be_resumed_with_the_same_or_a_longer_plan(invoke: Invoke, uninterrupted: Path) -> None:
    run = start_over(uninterrupted, "finished")
    assert invoke(f"resume={run}", tiny=False).code == 0
    assert trace(run) == trace(uninterrupted)
    assert json.loads((run / "status.json").read_text())["step"] == 20
    assert invoke(f"resume={run}", "max_steps=22", tiny=False).code == 0
    assert json.loads((run / "status.json").read_text())["step"] == 22


@pytest.mark.slow
def test_a_changed_setting_that_must_stay_the_same_is_reported_also_by_a_dry_run(
    invoke: Invoke, uninterrupted: Path
) -> None:
    run = start_over(uninterrupted, "changed")
    before = {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/**")}
    for change, message in (
        ("seed=1", "  seed: "),
        ("data.num_train=36", "  data: "),
        ("batch_size=8", "  batch_size: "),
        ("model.dim=32", "  model: "),
        ("optimizer.lr=1", "  optimizer: "),
        ("algo=critic", "its training has begun without a stage 1"),
        ("hydra.run.dir=other", "a resumed run keeps its folder"),
    ):
        for dry_run in ("false",) if change in ("seed=1", "batch_size=8", "model.dim=32") else ("true", "false"):
            outcome = invoke(f"resume={run}", "max_steps=30", change, f"dry_run={dry_run}", tiny=False)
            assert outcome.code == 2, (change, dry_run)
            assert message in outcome.err
    assert (run / "status.json").read_bytes() == (uninterrupted / "status.json").read_bytes()
    assert (run / "config.yaml").read_bytes() == (uninterrupted / "config.yaml").read_bytes()
    assert {path: path.stat().st_mtime_ns for path in run.glob("checkpoints/**")} == before
    assert invoke(f"resume={run}", FEW_SAVES, tiny=False).code == 0, "a refused resume changed the run"


@pytest.mark.slow
def test_a_dry_run_counts_the_updates_that_are_left(invoke: Invoke, uninterrupted: Path) -> None:
    run = start_over(uninterrupted, "copy")
    tried = invoke(f"resume={run}", "max_steps=26", "dry_run=true", tiny=False)
    assert "26 updates of 4 samples, 6 of them left" in tried.out and "for 6 updates; the first took" in tried.out
    done = invoke(f"resume={run}", "dry_run=true", tiny=False)
    assert "0 of them left" in done.out and "no update is left, so none ran" in done.out


@pytest.mark.slow
def test_the_previous_checkpoint_is_used_if_the_last_one_is_damaged(invoke: Invoke, uninterrupted: Path) -> None:
    resumed = cut_back(uninterrupted, 10, "resumed")
    model = resumed / "checkpoints" / "step_00000010" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-1])
    outcome = invoke(f"resume={resumed}", FEW_SAVES, tiny=False)
    assert "step_00000010 is damaged" in outcome.err and "step_00000009" in outcome.out
    assert trace(resumed) == trace(uninterrupted)
