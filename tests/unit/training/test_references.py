"""Tests of the warning about a weak reference model."""

import json
import logging
from pathlib import Path

import pytest

from tests.conftest import Invoke
from wmtp.training.references import warn_of_weak_reference


@pytest.mark.parametrize(("share", "warns"), [(None, False), (0.5, False), (0.97, False), (0.494, True), (0.0, True)])
def test_only_a_reference_that_is_better_on_less_than_half_of_the_tokens_is_weak(
    share: float | None, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_weak_reference(share, "before training")
    assert bool(caplog.messages) is warns
    if warns:
        assert f"{100 * share:.0f} %" in caplog.text and "algo.reference=PATH" in caplog.text  # type: ignore[operator]


@pytest.mark.slow
def test_a_run_measures_its_reference_and_warns_if_it_is_weak(invoke: Invoke) -> None:
    """An untrained reference is as good as an untrained policy, which then overtakes it."""
    overrides = ("algo=rho1", "data.correct_ratio=0.5", "eval_interval=4", "optimizer.lr=1e-2")
    weak = invoke(
        *overrides, "pretrain.max_steps=1", "pretrain.optimizer.lr=1e-9", "max_steps=12", "hydra.run.dir=weak"
    )
    assert weak.code == 0 and "after training, the reference predicts only" in weak.err
    shares = [
        json.loads(line).get("val/reference_better") for line in Path("weak/metrics.jsonl").read_text().splitlines()
    ]
    shares = [share for share in shares if share is not None]
    assert len(shares) >= 3 and all(0 <= share <= 1 for share in shares) and shares[-1] < 0.5
    assert json.loads(Path("weak/summary.json").read_text())["last"]["val/reference_better"] == shares[-1]
    strong = invoke(
        *overrides, "pretrain.max_steps=30", "max_steps=1", "optimizer.lr=1e-9", "hydra.run.dir=strong",
        "pretrain.optimizer.lr=1e-2",
    )  # fmt: skip
    assert strong.code == 0 and "clean validation tokens" not in strong.err
