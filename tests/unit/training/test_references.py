"""Tests of the warning about a weak reference model."""

import json
import logging
import re
from pathlib import Path

import pytest

from tests.conftest import Invoke, compose_config
from wmtp.training.references import warn_of_weak_reference
from wmtp.training.validate import check_training


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
    before = re.search(r"before training, the reference is better on ([0-9.]+)% of the clean", strong.out)
    assert before is not None and float(before[1]) > 50
    tried = invoke(*overrides, "dry_run=true")
    assert "reference_better" not in tried.out and "reference losses of 0" in tried.out


@pytest.mark.slow
def test_cleaning_compares_a_named_reference_with_the_policy_before_training(invoke: Invoke) -> None:
    assert invoke("algo=baseline", "max_steps=2", "hydra.run.dir=reference").code == 0
    done = invoke("algo=cleaning", "algo.reference=reference", "max_steps=2", "hydra.run.dir=cleaned")
    assert done.code == 0, done.err
    assert not (Path("cleaned") / "pretrain").exists()
    assert "There is no stage 1, because algo.reference selects the reference." in done.out


@pytest.mark.parametrize(
    ("overrides", "key", "problem"),
    [
        (["algo=implicit_reward", "pretrain=none"], "pretrain", "pretrain=implicit_reward"),
        (["algo=implicit_reward", "pretrain=rho1"], "pretrain", "pretrain=implicit_reward"),
        (["algo=rho1", "pretrain=contrast"], "pretrain", "pretrain=rho1"),
        (["algo=contrast", "pretrain=none"], "pretrain", "pretrain=contrast"),
        (["algo=cleaning", "pretrain=implicit_reward"], "pretrain", "pretrain=rho1"),
        (["algo=baseline", "pretrain=contrast"], "pretrain", "set pretrain=none"),
        (["algo=implicit_reward", "pretrain.model.num_heads=4"], "pretrain.model.num_heads", "must be 1"),
        (["algo=implicit_reward", "data.reward_model=."], "pretrain.data.reward_model", "not limited"),
        (["algo=rho1"], "", ""),
    ],
)
def test_a_weighting_accepts_only_a_stage_1_that_it_can_use(overrides: list[str], key: str, problem: str) -> None:
    issues = check_training(compose_config(*overrides)).issues
    assert [issue for issue in issues if issue.key == key and problem in issue.problem] or not key
    assert bool(issues) == bool(key)


@pytest.mark.slow
def test_a_stage_1_with_another_loss_or_start_is_not_reused(invoke: Invoke) -> None:
    short = ("pretrain.max_steps=1", "max_steps=1")
    assert invoke("algo=critic", "algo.value=state", *short, "pretrain.loss=reward", "hydra.run.dir=squared").code == 0
    other = invoke("algo=critic", "algo.value=state", *short, "pretrain.reuse=squared")
    assert other.code == 2 and "pretrain.loss: reward in that run, cross_entropy in this run" in other.err
    same = invoke("algo=critic", "algo.value=state", *short, "pretrain.reuse=squared", "pretrain.loss=reward")
    assert same.code == 0, same.err
    assert invoke("algo=cleaning", *short, "seed=1", "hydra.run.dir=cleaned").code == 0
    assert invoke("algo=rho1", *short, "seed=2", "pretrain.reuse=cleaned").code == 0, "rho1 uses no start"
    other = invoke("algo=cleaning", *short, "seed=2", "pretrain.reuse=cleaned")
    assert other.code == 2 and "seed: 1 in that run, 2 in this run" in other.err


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["contrast", "critic"])
def test_a_stage_1_that_compares_solutions_needs_both_kinds(invoke: Invoke, algorithm: str) -> None:
    Path("right.jsonl").write_text(
        "".join(json.dumps({"task_id": str(i), "prompt": f"p{i}", "solution": "s = 1\n"}) + "\n" for i in range(20))
    )
    options = ("data=jsonl", "data.path=right.jsonl", "data.correct_ratio=null", "num_samples=0")
    refused = invoke(f"algo={algorithm}", *options, "num_validation_samples=0", tiny=False)
    assert refused.code == 2 and "data.mismatched=true" in refused.err, refused.err
