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
from wmtp.cli import resolve

CRITIC = ["algo=critic", "max_steps=2", "pretrain.num_epochs=0.5", "hydra.run.dir=run"]


def kinds(file: Path) -> dict[str, int]:
    """Return the number of calls of each kind, without hashes and without the composition of the defaults."""
    return dict(Counter(kind for _, kind, _ in read_calls(file) if kind not in ("hash", "defaults")))


def hashes(file: Path) -> list[int]:
    """Return how often each file of a checkpoint was hashed, for the files of the checkpoints that existed before."""
    return sorted(Counter(path for _, kind, path in read_calls(file) if kind == "hash" and "run/" in path).values())


@pytest.mark.slow
def test_train_and_evaluate_compose_check_and_build_once(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke(*CRITIC).code == 0
    for number, (command, arguments, expected) in enumerate(
        (
            ("train", ["resume=run", "max_steps=3"], {"composition": 1, "check": 2, "algorithm": 1}),
            ("evaluate", ["checkpoint=run"], {"composition": 1, "evaluation_check": 1}),
        )
    ):
        file = tmp_path / f"counts-{number}"
        with monkeypatch.context() as patch:
            count_calls(file, patch.setattr)
            outcome = invoke(*arguments, "sandbox=none" if command == "train" else "evaluation.limit=1", tiny=False,
                             command=command)  # fmt: skip
        assert outcome.code == 0, outcome.err
        assert kinds(file) == expected, command
    once = tmp_path / "counts-1"
    assert set(hashes(once)) == {1} and len(hashes(once)) >= 3, "each file of the evaluated checkpoint is hashed once"


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
