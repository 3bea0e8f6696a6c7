"""Summary of graded samples, with pass@k and its intervals, pass@k by difficulty, and the reasons for failures."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from wmtp.evaluation.results_log import Row
from wmtp.generation.speculation_stats import SpeculationStats, speculation_metrics
from wmtp.statistics.pass_at_k import estimate

PRINTED_METRICS = ("loss", "mtp_loss", "perplexity", "tokens_per_forward")


def problem_counts(rows: Iterable[Row]) -> dict[str, tuple[int, int]]:
    """Return for each problem the number of its graded samples and the number of its samples that passed."""
    counts: dict[str, tuple[int, int]] = {}
    for row in rows:
        n, c = counts.get(row["task_id"], (0, 0))
        counts[row["task_id"]] = (n + 1, c + (row["outcome"] == "pass"))
    return counts


def pass_at_k_estimates(rows: Sequence[Row], ks: Iterable[int]) -> dict[str, dict[str, Any]]:
    """Return the estimate of pass@k for each k. If a problem has fewer than k graded samples, this k is omitted."""
    counts = list(problem_counts(rows).values())
    fewest = min((n for n, _ in counts), default=0)
    return {str(k): asdict(estimate(counts, k)) for k in sorted(set(ks)) if k <= fewest}


def pass_summary(rows: Sequence[Row], ks: Sequence[int]) -> dict[str, Any]:
    """Return pass@k over all problems and by difficulty, and the number of samples by outcome.

    Samples that failed are counted by the reason of their failure.
    """
    by_difficulty: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row["difficulty"] is not None:
            by_difficulty[row["difficulty"]].append(row)
    return {
        "problems": len({row["task_id"] for row in rows}),
        "samples": len(rows),
        "pass_at_k": pass_at_k_estimates(rows, ks),
        "by_difficulty": {
            str(difficulty): {
                "problems": len({row["task_id"] for row in members}),
                "pass_at_k": pass_at_k_estimates(members, ks),
            }
            for difficulty, members in sorted(by_difficulty.items())
        },
        "outcomes": dict(Counter(row["reason"] or row["outcome"] for row in rows).most_common()),
    }


def decoding_summary(rows: Sequence[Row]) -> dict[str, float]:
    """Return the number of tokens per forward pass, and the fraction of each head's draft tokens that was accepted."""
    return speculation_metrics([SpeculationStats(*(row[name] for name in SpeculationStats._fields)) for row in rows])


def format_estimate(estimate: dict[str, Any]) -> tuple[str, str]:
    """Return two texts: the estimated value, and its interval."""
    low, high = estimate["low"], estimate["high"]
    return f"{estimate['value']:.3f}", "all problems equal" if low is None else f"{low:.3f} to {high:.3f}"


def print_report(console: Console, summary: dict[str, Any]) -> None:
    """Print the summary at the end of an evaluation, as tables and lines of text."""
    problems = f"{summary['problems']} problems of the split {summary['split']}"
    console.print(f"{summary['data']}: {problems}, {summary['samples']} programs graded")
    for table in (pass_table(summary), difficulty_table(summary), head_table(summary)):
        if table.row_count:
            console.print(table)
    failures = ", ".join(f"{reason} {count}" for reason, count in summary["outcomes"].items() if reason != "pass")
    if failures:
        console.print(f"not passed: {failures}", soft_wrap=True, highlight=False)
    metrics = summary["prediction"] | summary["decoding"]
    texts = [f"{name.replace('_', ' ')} {metrics[name]:.4g}" for name in PRINTED_METRICS if name in metrics]
    console.print(", ".join(texts), soft_wrap=True, highlight=False)


def pass_table(summary: dict[str, Any]) -> Table:
    """Return a table that shows pass@k and its interval for each k."""
    table = Table("", number_column("pass"), number_column("95 % interval over problems"))
    for k, entry in summary["pass_at_k"].items():
        table.add_row(f"pass@{k}", *format_estimate(entry))
    return table


def difficulty_table(summary: dict[str, Any]) -> Table:
    """Return a table that shows pass@k for each difficulty."""
    ks = list(summary["pass_at_k"])
    table = Table("difficulty", number_column("problems"), *(number_column(f"pass@{k}") for k in ks))
    for difficulty, entry in summary["by_difficulty"].items():
        values = [format_estimate(entry["pass_at_k"][k])[0] if k in entry["pass_at_k"] else "-" for k in ks]
        table.add_row(difficulty, str(entry["problems"]), *values)
    return table


def head_table(summary: dict[str, Any]) -> Table:
    """Return a table that shows the loss, the accuracy and the fraction of accepted draft tokens of each head."""
    values = summary["prediction"] | summary["decoding"]
    table = Table("head", number_column("loss"), number_column("accuracy"), number_column("drafts accepted"))
    head = 1
    while f"head_{head}_loss" in values:
        names = (f"head_{head}_{name}" for name in ("loss", "accuracy", "acceptance"))
        table.add_row(str(head), *(f"{values[name]:.4f}" if name in values else "-" for name in names))
        head += 1
    return table


def number_column(name: str) -> Column:
    """Return a right-aligned table column for numbers, with the title `name`."""
    return Column(name, justify="right")
