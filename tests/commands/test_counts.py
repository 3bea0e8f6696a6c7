"""Tests that a command composes, checks and builds once, and that it reads the chosen checkpoint once for its hash."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import Invoke
from tests.support.counting import count_calls, read_calls
from tests.support.launching import ROOT, TWO_PROCESSES
from wmtp.checkpoint.store import load
from wmtp.cli import resolve
from wmtp.models import loading

CRITIC = ["algo=critic", "max_steps=2", "pretrain.num_epochs=0.5", "hydra.run.dir=run"]


def kinds(file: Path) -> dict[str, int]:
    """Return the number of calls of each kind, without hashes and without the composition of the defaults."""
    return dict(Counter(kind for _, kind, _ in read_calls(file) if kind not in ("hash", "defaults")))


def hashes(file: Path) -> list[int]:
    """Return how often each file of a checkpoint was hashed, for the files of the checkpoints that existed before."""
    return sorted(Counter(path for _, kind, path in read_calls(file) if kind == "hash" and "run/" in path).values())


def counted(invoke: Invoke, file: Path, *arguments: str, command: str = "train") -> Path:
    """Run a command, count its calls in a file, and return the file."""
    with pytest.MonkeyPatch.context() as patch:
        count_calls(file, patch.setattr)
        outcome = invoke(*arguments, tiny=False, command=command)
    assert outcome.code == 0, outcome.err
    return file


@pytest.mark.slow
def test_train_and_evaluate_compose_check_build_and_hash_once(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control verifies the checkpoint again when its weights are loaded."""
    assert invoke(*CRITIC).code == 0
    resumed = counted(invoke, tmp_path / "resumed", "resume=run", "max_steps=3")
    assert kinds(resumed) == {"composition": 1, "check": 2, "algorithm": 1}
    evaluation = ["checkpoint=run", "evaluation.limit=1"]
    evaluated = counted(invoke, tmp_path / "evaluated", *evaluation, command="evaluate")
    assert kinds(evaluated) == {"composition": 1, "evaluation_check": 1}
    for file in (resumed, evaluated):
        assert set(hashes(file)) == {1} and len(hashes(file)) >= 3, "each file of the checkpoint is hashed once"
    monkeypatch.setattr(loading, "load", lambda path, **options: load(path, **options | {"verified": False}))
    again = counted(invoke, tmp_path / "again", *evaluation, "evaluation.seed=1", command="evaluate")
    assert max(hashes(again)) == 2


@pytest.mark.slow
def test_control_a_second_resolution_is_counted(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "counts"
    compose = resolve.compose
    monkeypatch.setattr(resolve, "compose", lambda *arguments: (compose(*arguments), compose(*arguments))[1])
    count_calls(file, monkeypatch.setattr)
    assert invoke("max_steps=1").code == 0
    assert kinds(file) == {"composition": 2, "check": 2}


@pytest.mark.slow
def test_a_run_with_two_processes_composes_and_checks_once(invoke: Invoke, tmp_path: Path, cache: Path) -> None:
    """A check of critic includes that of its stage 1. Each process builds its own algorithm, and one of them hashes."""
    assert invoke(*CRITIC, "micro_batch_size=2").code == 0
    file = tmp_path / "counts"
    command = [sys.executable, "-m", "tests.support.counting", "train", f"cache_dir={cache}", "tracking=none"]
    environment = {**os.environ, "COUNTS": str(file), "PYTHONPATH": str(ROOT)}
    arguments = ["resume=run", "max_steps=3", *TWO_PROCESSES]
    subprocess.run([*command, *arguments], cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert kinds(file) == {"composition": 1, "check": 2, "algorithm": 2}
    assert len({pid for pid, kind, _ in read_calls(file) if kind == "algorithm"}) == 2
    assert set(hashes(file)) == {1} and len({pid for pid, kind, _ in read_calls(file) if kind == "hash"}) == 1
