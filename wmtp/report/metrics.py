"""What a metric is in each run, which way is better, and which test problems its model solved."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wmtp.errors import InputError
from wmtp.report.run_record import RunRecord
from wmtp.runtime.run_dir import EVALUATIONS

PASS = re.compile(r"pass@([1-9]\d*)")
LOWER = ("loss", "perplexity")
HIGHER = ("pass_rate", "accuracy", "acceptance", "explained_variance", "tokens_per_forward")
OF_THE_MODEL = ("checkpoint", "data.")
"""Keys of an evaluation that say whose it is, or of its data what `records` says."""
WHERE = {"best": "best checkpoint", "last": "last model"}


@dataclass(frozen=True)
class Measured:
    """A metric in each run."""

    metric: str
    lower_is_better: bool
    at: str
    """Which model is measured, in words."""
    values: dict[RunRecord, float]
    """Runs whose value is not finite are left out."""
    solved: dict[RunRecord, dict[str, float]] = field(default_factory=dict)
    """Of pass@k, for each test problem that was judged: the share of answers that passed."""
    notes: list[str] = field(default_factory=list)


def measured(metric: str, runs: Sequence[RunRecord], at: str) -> Measured:
    """A metric's value in each of the runs: `val/…` of the best checkpoint or the last model, or `pass@k`.

    Raises:
        InputError: a run has no such value; those that all runs have are named.
    """
    if (match := PASS.fullmatch(metric)) is not None:
        found = pass_rates(int(match[1]), runs)
        if found is None:
            raise InputError(missing(metric, runs, at))
        return found
    lines = {run: run.summary.get(at, {}) for run in runs}
    if not metric.startswith("val/") or any(metric not in line for line in lines.values()):
        raise InputError(missing(metric, runs, at))
    values = {run: float(line[metric]) for run, line in lines.items()}
    notes = [f"{run.folder} is left out of {metric}, which is {value}: mind that it went wrong"
             for run, value in values.items() if not math.isfinite(value)]  # fmt: skip
    finite = {run: value for run, value in values.items() if math.isfinite(value)}
    return Measured(metric, is_lower_better(metric), WHERE[at], finite, notes=notes)


def is_lower_better(metric: str) -> bool:
    """Which way a metric is better.

    Raises:
        InputError: that is not known of it.
    """
    if metric.endswith(LOWER):
        return True
    if metric.endswith(HIGHER) or PASS.fullmatch(metric):
        return False
    raise InputError(f"metric={metric}: which way it is better is not known; known are …{', …'.join(LOWER + HIGHER)}")


def missing(metric: str, runs: Sequence[RunRecord], at: str) -> str:
    """What to say of a metric that not all runs have."""
    known = available(runs, at)
    said = f"all of them have {', '.join(known)}" if known else "they have none in common"
    if PASS.fullmatch(metric):
        remedy = "the same evaluation of each run gives it: python -m wmtp.evaluate checkpoint=RUN"
        return f"metric={metric}: not all runs have it; {said}; {remedy}"
    having = [run for run in runs if metric in run.summary.get(at, {})]
    if not metric.startswith("val/") or not having:
        return f"metric={metric}: is not measured at a validation; {said}"
    lacking = next(run for run in runs if run not in having)
    return f"metric={metric}: {having[0].folder} has it, {lacking.folder} has not; {said}"


def available(runs: Sequence[RunRecord], at: str) -> list[str]:
    """The metrics that all of the runs have."""
    lines = [{name for name in run.summary.get(at, {}) if name.startswith("val/")} for run in runs]
    named = {f"pass@{k}" for evaluation in common_evaluations(runs) for k in evaluation.ks}
    if all(run.summary.get("pass@1") for run in runs):
        named.add("pass@1")
    return sorted(set.intersection(*lines) | named) if lines else []


def pass_rates(k: int, runs: Sequence[RunRecord]) -> Measured | None:
    """pass@k of each run, over the same problems; None where not all have it.

    pass@1 is that of the run's own test problems at its end, where all runs answered the same of them.
    """
    if k == 1 and all(run.summary.get("pass@1") for run in runs):
        asked = {run: answers_at_the_end(run) for run in runs}
        if len({frozenset(row["task_id"] for row in rows) for rows in asked.values()}) == 1:
            values = {run: float(run.summary["pass@1"]["value"]) for run in runs}
            return Measured("pass@1", False, WHERE["last"], values, {run: shares(rows) for run, rows in asked.items()})
    fitting = [evaluation for evaluation in common_evaluations(runs) if k in evaluation.ks]
    if not fitting:
        return None
    chosen = max(fitting, key=lambda evaluation: (evaluation.num_problems, evaluation.name))
    of_several = f"pass@{k} is that of {chosen.name}, one of {len(fitting)} evaluations that all runs have"
    summaries = {run: _json(folder / "summary.json") for run, folder in chosen.folders.items()}
    values = {run: float(summary["pass_at_k"][str(k)]["value"]) for run, summary in summaries.items()}
    solved = {run: shares(_lines(folder / "results.jsonl")) for run, folder in chosen.folders.items()}
    notes = [of_several] if len(fitting) > 1 else []
    return Measured(f"pass@{k}", False, f"evaluation {chosen.name}", values, solved, notes)


def answers_at_the_end(run: RunRecord) -> list[dict[str, Any]]:
    """The run's answers to test problems at its last step."""
    rows = [row for row in run.samples if row.get("split") == "test"]
    last = max((row["step"] for row in rows), default=None)
    return [row for row in rows if row["step"] == last]


def shares(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """For each problem the share of its judged answers that passed."""
    outcomes: dict[str, list[bool]] = {}
    for row in rows:
        if row.get("outcome") not in (None, "sandbox error"):
            outcomes.setdefault(str(row["task_id"]), []).append(row["outcome"] == "pass")
    return {task: sum(passed) / len(passed) for task, passed in outcomes.items()}


@dataclass(frozen=True)
class CommonEvaluation:
    """An evaluation that was made of every run: the same problems, sampled and judged in the same way."""

    name: str
    folders: dict[RunRecord, Path]
    ks: list[int]
    num_problems: int


def common_evaluations(runs: Sequence[RunRecord]) -> list[CommonEvaluation]:
    """The evaluations that all runs have."""
    found: dict[str, dict[RunRecord, Path]] = {}
    for run in runs:
        for path in sorted(run.folder.glob(f"{EVALUATIONS}/*/evaluation.json")):
            if (path.parent / "summary.json").exists():
                fields = {key: value for key, value in _json(path).items() if not key.startswith(OF_THE_MODEL)}
                found.setdefault(json.dumps(fields, sort_keys=True), {})[run] = path.parent
    result = []
    for folders in found.values():
        if len(folders) == len(runs):
            estimates = [_json(folder / "summary.json") for folder in folders.values()]
            ks = set.intersection(*({int(k) for k in estimate["pass_at_k"]} for estimate in estimates))
            name = next(iter(folders.values())).name
            result.append(CommonEvaluation(name, folders, sorted(ks), min(e.get("problems", 0) for e in estimates)))
    return result


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
