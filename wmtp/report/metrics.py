"""Access to the values of a metric in each run, and to the test problems that each run solved."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wmtp.errors import InputError
from wmtp.report.measures import MODEL_LABELS, SAMPLED_PASS, measured_values
from wmtp.report.run_record import RunRecord, is_attempt
from wmtp.runtime.json_lines import read_json_lines
from wmtp.runtime.run_dir import EVALUATIONS
from wmtp.statistics.pass_at_k import pass_at_k
from wmtp.tracking import directions
from wmtp.tracking.directions import PASS_AT_K

CHECKPOINT_KEYS = ("checkpoint", "data.")
"""Prefixes of the keys of evaluation.json that are ignored when evaluations of different runs are matched.

The ignored keys identify the evaluated checkpoint, or describe data that the key `records` already identifies.
"""


@dataclass(frozen=True)
class MetricValues:
    """The values of one metric in each run."""

    name: str
    lower_is_better: bool
    at: str
    """Description of the model whose metric was measured, such as "best checkpoint"."""
    values: dict[RunRecord, float]
    """Value of the metric for each run. Runs without a finite value are missing."""
    solved: dict[RunRecord, dict[str, float]] = field(default_factory=dict)
    """For each run and each graded test problem, its pass@k.

    This dictionary is empty unless the metric is pass@k.
    """
    notes: list[str] = field(default_factory=list)


def metric_values(metric: str, runs: Sequence[RunRecord], at: str) -> MetricValues:
    """Return the values of a metric in all runs.

    Args:
        metric: name of the metric: a validation metric such as `val/loss`, a measure of the weights such as
            `decisive_wrong_auc`, `pass@k` such as `pass@1`, or `sampled_pass@1`.
        runs: finished runs.
        at: model whose validation metrics are used: "best" for the best checkpoint, "last" for the model at the end of
            the training. `at` is ignored for other metrics.

    Raises:
        InputError: a run does not have the metric. The message lists the metrics that all runs have.
    """
    if (match := PASS_AT_K.fullmatch(metric)) is not None or metric == SAMPLED_PASS:
        found = pass_at_k_values(int(match[1]), runs) if match else final_pass_values(metric, runs)
        if found is None:
            raise InputError(missing_metric_message(metric, runs, at))
        return found
    measured = {run: measured_values(run, at) for run in runs}
    if any(metric not in values for values in measured.values()):
        raise InputError(missing_metric_message(metric, runs, at))
    values = {run: each[metric] for run, each in measured.items()}
    notes = [f"{run.folder} is left out of {metric}: its value is {value}, so check what went wrong"
             for run, value in values.items() if not math.isfinite(value)]  # fmt: skip
    finite = {run: value for run, value in values.items() if math.isfinite(value)}
    model = MODEL_LABELS[at if metric.startswith("val/") else "last"]
    return MetricValues(metric, is_lower_better(metric), model, finite, notes=notes)


def is_lower_better(metric: str) -> bool:
    """Return whether lower values of a metric are better.

    Raises:
        InputError: the name of the metric does not tell whether lower or higher values are better.
    """
    lower = directions.is_lower_better(metric)
    if lower is None:
        raise InputError(
            f"metric={metric}: cannot tell whether lower or higher is better; the name must end in one of "
            f"{', '.join(directions.LOWER_IS_BETTER + directions.HIGHER_IS_BETTER)}"
        )
    return lower


def missing_metric_message(metric: str, runs: Sequence[RunRecord], at: str) -> str:
    """Return the error message for a metric that is missing in some of the runs."""
    known = common_metrics(runs, at)
    others = f"all of them have {', '.join(known)}" if known else "they have none in common"
    if PASS_AT_K.fullmatch(metric):
        remedy = "run the same evaluation for each run: python -m wmtp.evaluate checkpoint=RUN"
        return f"metric={metric}: not all runs have it; {others}; {remedy}"
    if metric == SAMPLED_PASS:
        return f"metric={metric}: not all runs have it for the same test problems; {others}"
    with_metric = [run for run in runs if metric in measured_values(run, at)]
    if not with_metric:
        return f"metric={metric}: is not measured at a validation; {others}"
    without_metric = next(run for run in runs if run not in with_metric)
    return f"metric={metric}: {with_metric[0].folder} has it, {without_metric.folder} does not; {others}"


def common_metrics(runs: Sequence[RunRecord], at: str) -> list[str]:
    """Return the names of the metrics that all runs have."""
    measured = [measured_values(run, at).keys() for run in runs]
    named = {f"pass@{k}" for evaluation in common_evaluations(runs) for k in evaluation.ks}
    return sorted(set.intersection(*map(set, measured)) | named) if measured else []


def pass_at_k_values(k: int, runs: Sequence[RunRecord]) -> MetricValues | None:
    """Return pass@k of each run. It must be measured on the same test problems in all runs; if it is not, return None.

    If `k` is 1 and all runs sampled the same test problems at the end of the training, then these samples are used.
    Otherwise the values are from an evaluation by `wmtp.evaluate` that all runs have.
    """
    if k == 1 and (found := final_pass_values("pass@1", runs)) is not None:
        return found
    candidates = [evaluation for evaluation in common_evaluations(runs) if k in evaluation.ks]
    if not candidates:
        return None
    chosen = max(candidates, key=lambda evaluation: (evaluation.num_problems, evaluation.name))
    several_note = f"pass@{k} is from {chosen.name}, one of {len(candidates)} evaluations that all runs have"
    summaries = {run: _json(folder / "summary.json") for run, folder in chosen.folders.items()}
    values = {run: float(summary["pass_at_k"][str(k)]["value"]) for run, summary in summaries.items()}
    solved = {
        run: problem_pass_rates(read_json_lines(folder / "results.jsonl"), k) for run, folder in chosen.folders.items()
    }
    notes = [several_note] if len(candidates) > 1 else []
    return MetricValues(f"pass@{k}", False, f"evaluation {chosen.name}", values, solved, notes)


def final_pass_values(metric: str, runs: Sequence[RunRecord]) -> MetricValues | None:
    """Return `pass@1` or `sampled_pass@1` of the samples that each run made at its end.

    The result is None if a run has no such samples, or if the runs sampled different test problems.
    """
    if not all(run.summary.get(metric) for run in runs):
        return None
    samples = {run: final_test_samples(run, is_greedy=metric != SAMPLED_PASS) for run in runs}
    if len({frozenset((row["task_id"], row.get("prompt")) for row in rows) for rows in samples.values()}) > 1:
        return None
    values = {run: float(run.summary[metric]["value"]) for run in runs}
    solved = {run: problem_pass_rates(rows) for run, rows in samples.items()}
    return MetricValues(metric, False, MODEL_LABELS["last"], values, solved)


def final_test_samples(run: RunRecord, *, is_greedy: bool) -> list[dict[str, Any]]:
    """Return samples for test problems from the last step at which the run generated samples for test problems.

    They are the greedy samples or, if `is_greedy` is false, the attempts.
    """
    rows = [row for row in run.samples if row.get("split") == "test"]
    last = max((row["step"] for row in rows), default=None)
    return [row for row in rows if row["step"] == last and is_attempt(row) != is_greedy]


def problem_pass_rates(rows: Iterable[Mapping[str, Any]], k: int = 1) -> dict[str, float]:
    """Return pass@k of each problem that has at least k graded samples. For k = 1, it is the share that passed."""
    outcomes: dict[str, list[bool]] = {}
    for row in rows:
        if row.get("outcome") not in (None, "sandbox error"):
            outcomes.setdefault(str(row["task_id"]), []).append(row["outcome"] == "pass")
    return {task: pass_at_k(len(passed), sum(passed), k) for task, passed in outcomes.items() if len(passed) >= k}


@dataclass(frozen=True)
class CommonEvaluation:
    """An evaluation by `wmtp.evaluate` that was made for every run with the same problems, sampling and grading."""

    name: str
    folders: dict[RunRecord, Path]
    ks: list[int]
    num_problems: int


def common_evaluations(runs: Sequence[RunRecord]) -> list[CommonEvaluation]:
    """Return the evaluations that were made for all runs with the same problems, sampling and grading."""
    found: dict[str, dict[RunRecord, Path]] = {}
    for run in runs:
        for path in sorted(run.folder.glob(f"{EVALUATIONS}/*/evaluation.json")):
            if (path.parent / "summary.json").exists():
                fields = {key: value for key, value in _json(path).items() if not key.startswith(CHECKPOINT_KEYS)}
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
