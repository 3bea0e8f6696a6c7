"""Example runs and comparisons with data for every part of their HTML reports."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from tests.support.fake_runs import fake_run, write_json, write_lines
from wmtp.report.measures import GroupMeans
from wmtp.report.results import (
    Comparison,
    Difference,
    FailedRuns,
    GroupValues,
    McNemar,
    MetricComparison,
    TokensToTarget,
    TokensToTargetPair,
)
from wmtp.report.run_record import RunRecord

HOSTILE = "</script><img src=x onerror=alert(1)>$x_1$&amp;"
TOKENS = ["def", " f", "(x", "):", "\n    ", "return", " x", " +", " 1", "\n", "#", " 7f3a", "\n", ""]


def rich_run(folder: Path, *, updates: int = 400, name: str | None = HOSTILE) -> Path:
    """Write a critic run with data for every part of its report, and with text that must be escaped in HTML."""
    numbers = random.Random(0)
    fake_run(folder, algo="critic", val_losses=[1.0], passes=[True, False] * 8, run_name=name)
    config = RunRecord(folder).config | {
        "early_stopping": {"window": 40, "threshold": 3.0, "ratio": 0.7},
        "max_grad_norm": 1.0, "num_validation_samples": 20, "tags": {"note": HOSTILE},
    }  # fmt: skip
    (folder / "config.yaml").write_text(json.dumps(config))
    lines = [line for step in range(5, updates + 1, 5) for line in _lines(numbers, step, updates)]
    write_lines(folder / "metrics.jsonl", lines)
    (folder / "pretrain").mkdir()
    write_lines(folder / "pretrain" / "metrics.jsonl", lines)
    reason = "unstable: 30 of the last 40 gradient norms exceeded 3"
    _edit(folder / "status.json", {"step": updates, "stop_reason": reason, "ended": "2026-11-21T10:35:00+00:00"})
    passes = {"value": 0.5, "low": 0.25, "high": 0.75, "problems": 16}
    _edit(folder / "summary.json", {
        "total_steps": updates, "early_stopped": True, "stop_reason": reason, "tokens_per_second": 12_345.6,
        "peak_memory_bytes": 5e8, "parameters": 1_234_567, "device": "cpu", "processes": 1, "strategy": "single",
        "weights": {"decisive_wrong_auc": 0.71, "decisive_wrong_top1": 0.26, "noise_auc": None},
        "last": {"val/value_explained_variance": 0.053}, "config_hash": "c" * 64, "pass@1": passes,
        "sampled_pass@1": {"value": 0.325, "low": 0.2, "high": 0.4, "problems": 16},
        "pretrain": {"total_steps": updates, "total_tokens": 1_000 * updates},
    })  # fmt: skip
    _edit(folder / "provenance.json", {
        "changed": {"algo.beta": [0.9, 0.5], "tags.note": [None, HOSTILE], "data.num_train": [2000, 40]},
        "git_revision": "a" * 40, "versions": {"python": "3.11", "torch": "2.13.0"},
        "data": {"source": "wmtp:tasks", "train": 40, "validation": 8, "fingerprint": "f" * 64},
        "command": ["algo=critic", f"tags.note={HOSTILE}"],
    })  # fmt: skip
    samples = [
        {"step": updates, "split": "test", "task_id": f"test/{number}", "difficulty": 2,
         "prompt": f"{HOSTILE} {number}",
         "completion": f"def f(x):\n    return x  # {HOSTILE} " + "unbroken" * 12, "outcome": outcome,
         "reason": None if outcome == "pass" else "wrong", "detail": "" if outcome == "pass" else "test 1: 1 == 2"}
        for number, outcome in enumerate(["pass", "fail"] * 8)
    ]  # fmt: skip
    attempts = [
        sample | {"temperature": 1.0, "index": index, "outcome": outcome}
        for sample in samples for index, outcome in enumerate(["fail", "pass", "fail"])
    ]  # fmt: skip
    write_lines(folder / "samples.jsonl", samples + attempts)
    write_json(folder / "tokens.json", tokens(numbers))
    estimates = {str(k): {"value": 0.2 * k, "low": 0.1 * k, "high": 0.24 * k} for k in (1, 4)}
    (folder / "evaluations" / "one").mkdir(parents=True)
    by_difficulty = {str(level): {"problems": 8, "pass_at_k": estimates} for level in (1, 2)}
    write_json(
        folder / "evaluations" / "one" / "summary.json", {"pass_at_k": estimates, "by_difficulty": by_difficulty}
    )
    return folder


def tokens(numbers: random.Random, *, weighted: bool = True) -> dict[str, Any]:
    """Return the content of tokens.json; unless `weighted`, all weights are 1 and there are no values."""
    samples = [
        {"task_id": f"validation/{number}", "is_correct": number % 2 == 0, "prompt": f"Add one. {HOSTILE}", "tokens": [
            {"text": text, "loss": numbers.expovariate(1),
             "weight": math.exp(numbers.gauss(0, 0.9)) if weighted else 1.0,
             "value": numbers.random() if weighted else None,
             "truth": {" +": "decisive", " 7f3a": "noise"}.get(text)} for text in [*TOKENS[:-1], HOSTILE, ""]
        ]} for number in range(4)
    ]  # fmt: skip
    bins = [
        {"low": n / 10, "high": n / 10 + 0.1, "count": 90 * n, "value": n / 10 + 0.05, "reward": min(1.0, n / 8)}
        for n in range(10)
    ]
    return {"step": 400, "samples": samples, "calibration": bins if weighted else []}


def example_comparison(parent: Path) -> Comparison:
    """Return a comparison of three groups of five seeds with two metrics; one group's name must be escaped in HTML."""
    numbers = random.Random(1)
    effects = {"baseline": 0.0, "critic": -0.08, f"rho1, optimizer.lr=0.003, tags.note={HOSTILE}": 0.01}
    groups: dict[str, list[RunRecord]] = {}
    for label, effect in effects.items():
        for seed in range(5):
            losses = [
                2 * math.exp(-step / 5) + 0.6 + effect + 0.02 * seed + numbers.gauss(0, 0.01) for step in range(1, 16)
            ]
            folder = parent / label.split(",")[0] / str(seed)
            stage = 3_000 if label == "critic" else None
            fake_run(folder, algo=label.split(",")[0], seed=seed, val_losses=losses, stage_tokens=stage)
            (folder / "report.html").write_text("<!doctype html><title>run</title>")
            groups.setdefault(label, []).append(RunRecord(folder))
    metrics = [_metric("val/loss", True, groups, numbers), _metric("pass@1", False, groups, numbers)]
    critic, other = list(groups)[1:]
    pairs = [TokensToTargetPair(seed, 0.7, 150_000.0, 100_000.0 + 5_000 * seed, 0, 3_000) for seed in range(5)]
    reach = [
        TokensToTarget(critic, "val/loss", pairs, 0, 0.75, True, 0.68, 0.8),
        TokensToTarget(other, "val/loss", [*pairs[:4], replace(pairs[4], tokens=None)], 1, 0.73, True, 0.7, None),
    ]
    notes = ["Seed 7 of critic has no partner and is left out.", f"Note: {HOSTILE}"]
    means = [
        GroupMeans("Policy, best checkpoint", ["val/canonical_logprob"], {label: [-12.5] for label in groups}),
        GroupMeans(
            "Weights and values, last model", ["decisive_wrong_auc", "decisive_wrong_top1"],
            {label: [None, None] if label == "baseline" else [0.912, 0.478] for label in groups},
        ),
    ]  # fmt: skip
    return Comparison("baseline", metrics, groups, "val/loss", reach, notes, means)


def _metric(
    name: str, lower_is_better: bool, groups: dict[str, list[RunRecord]], numbers: random.Random
) -> MetricComparison:
    values = {
        label: {run.seed: numbers.gauss(0.7 - 0.03 * place, 0.02) for run in runs}
        for place, (label, runs) in enumerate(groups.items())
    }
    groups_of_values = [
        GroupValues(label, by_seed, mean(by_seed.values()), stdev(by_seed.values()), FailedRuns(0, 5))
        for label, by_seed in values.items()
    ]
    base, *others = groups_of_values
    first_verdict = "better" if lower_is_better else "worse"
    differences = [
        Difference(
            label=group.label, pairs=pairs,
            mean=mean(pairs.values()), low=mean(pairs.values()) - spread, high=mean(pairs.values()) + spread,
            level=0.05, p=p, p_holm=2 * p, wilcoxon=0.0625, wilcoxon_holm=0.125, wilcoxon_floor=0.0625,
            permutation=0.0625, mcnemar=McNemar(9, 3, 88, 0.15), is_within_delta=None,
            verdict=verdict, seeds_needed=needed, lost=FailedRuns(0, 5), baseline_lost=FailedRuns(0, 5),
        )
        for group, spread, p, verdict, needed in zip(
            others, (0.01, 0.09), (0.004, 0.31), (first_verdict, "undecided"), (5, 23), strict=True
        )
        for pairs in [{seed: group.values_by_seed[seed] - value for seed, value in base.values_by_seed.items()}]
    ]  # fmt: skip
    return MetricComparison(name, lower_is_better, "best checkpoint", None, groups_of_values, differences)  # type: ignore[arg-type]


def _lines(numbers: random.Random, step: int, updates: int) -> list[dict[str, Any]]:
    level = math.exp(-3 * step / updates)
    measured = {f"head_{head}_loss": level * head + 0.3 + 0.05 * numbers.random() for head in range(1, 5)}
    measured |= {"loss": level + 0.5, "value_loss": 0.25 * level, "value_explained_variance": 0.5 - level}
    line: dict[str, Any] = {"step": step, "epoch": 0, "time": 0.0, "tokens": 1_000 * step}
    training = line | {f"train/{name}": value + 0.05 * numbers.random() for name, value in measured.items()} | {
        "train/lr": 1e-3 * level, "train/grad_norm": "nan" if step == 50 else numbers.expovariate(1) + 0.1,
        "train/weight_mean": 1.0, "train/weight_std": 0.4, "train/weight_min": 0.1 + 0.1 * numbers.random(),
        "train/weight_max": 2 + numbers.random(), "train/tokens_per_second": 1e4 * (1 + numbers.random()),
    }  # fmt: skip
    if step % 25:
        return [training]
    passes = {"val/pass_rate": round(20 * (1 - level)) / 20, "val/sampled_pass_rate": 0.4 * (1 - level)}
    passes |= {"val/canonical_logprob": -30 * level, "val/canonical_probability": math.exp(-30 * level)}
    return [training, line | {f"val/{name}": value for name, value in measured.items()} | passes]


def _edit(path: Path, changes: dict[str, Any]) -> None:
    before = json.loads(path.read_text()) if path.exists() else {}
    write_json(path, before | changes)
