"""What the answers say: pass@k with intervals, by difficulty, and why programs failed."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from wmtp.evaluation.pass_at_k import estimate
from wmtp.evaluation.results_log import Row
from wmtp.generation.speculation_stats import Cost, speculation_metrics

TOTALS = ("loss", "mtp_loss", "perplexity", "tokens_per_forward")


def counts_of(rows: Iterable[Row]) -> dict[str, tuple[int, int]]:
    """For each problem, how many samples were judged and how many passed."""
    counts: dict[str, tuple[int, int]] = {}
    for row in rows:
        n, c = counts.get(row["task_id"], (0, 0))
        counts[row["task_id"]] = (n + 1, c + (row["outcome"] == "pass"))
    return counts


def estimates(rows: Sequence[Row], ks: Iterable[int]) -> dict[str, dict[str, Any]]:
    """pass@k by k, over the problems of the rows; left out where a problem has fewer than k judged samples."""
    counts = list(counts_of(rows).values())
    fewest = min((n for n, _ in counts), default=0)
    return {str(k): asdict(estimate(counts, k)) for k in sorted(set(ks)) if k <= fewest}


def pass_summary(rows: Sequence[Row], ks: Sequence[int]) -> dict[str, Any]:
    """pass@k in all and by difficulty, and how often each reason was given."""
    by_difficulty: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row["difficulty"] is not None:
            by_difficulty[row["difficulty"]].append(row)
    return {
        "problems": len({row["task_id"] for row in rows}),
        "samples": len(rows),
        "pass_at_k": estimates(rows, ks),
        "by_difficulty": {
            str(difficulty): {
                "problems": len({row["task_id"] for row in chosen}),
                "pass_at_k": estimates(chosen, ks),
            }
            for difficulty, chosen in sorted(by_difficulty.items())
        },
        "outcomes": dict(Counter(row["reason"] or row["outcome"] for row in rows).most_common()),
    }


def decoding_summary(rows: Sequence[Row]) -> dict[str, float]:
    """Tokens per forward, and for each head that drafts the share of its drafts that were accepted."""
    return speculation_metrics([Cost(**{name: row[name] for name in Cost._fields}) for row in rows])


def shown(estimate: dict[str, Any]) -> tuple[str, str]:
    """An estimate and its interval as text."""
    low, high = estimate["low"], estimate["high"]
    return f"{estimate['value']:.3f}", "all problems alike" if low is None else f"{low:.3f} to {high:.3f}"


def print_report(console: Console, summary: dict[str, Any]) -> None:
    """The tables at the end of an evaluation."""
    console.print(f"{summary['data']}: {summary['problems']} problems, {summary['samples']} programs judged")
    for table in (pass_table(summary), difficulty_table(summary), head_table(summary)):
        if table.row_count:
            console.print(table)
    failures = ", ".join(f"{reason} {count}" for reason, count in summary["outcomes"].items() if reason != "pass")
    if failures:
        console.print(f"not passed: {failures}", soft_wrap=True, highlight=False)
    totals = summary["prediction"] | summary["decoding"]
    said = [f"{name.replace('_', ' ')} {totals[name]:.4g}" for name in TOTALS if name in totals]
    console.print(", ".join(said), soft_wrap=True, highlight=False)


def pass_table(summary: dict[str, Any]) -> Table:
    """pass@k with intervals."""
    table = Table("", right("pass"), right("95 % interval over problems"))
    for k, entry in summary["pass_at_k"].items():
        table.add_row(f"pass@{k}", *shown(entry))
    return table


def difficulty_table(summary: dict[str, Any]) -> Table:
    """pass@k by difficulty."""
    ks = list(summary["pass_at_k"])
    table = Table("difficulty", right("problems"), *(right(f"pass@{k}") for k in ks))
    for difficulty, entry in summary["by_difficulty"].items():
        values = [shown(entry["pass_at_k"][k])[0] if k in entry["pass_at_k"] else "-" for k in ks]
        table.add_row(difficulty, str(entry["problems"]), *values)
    return table


def head_table(summary: dict[str, Any]) -> Table:
    """What each head predicts of right solutions, and how many of its drafts were accepted."""
    values = summary["prediction"] | summary["decoding"]
    table = Table("head", right("loss"), right("accuracy"), right("drafts accepted"))
    head = 1
    while f"head_{head}_loss" in values:
        names = (f"head_{head}_{name}" for name in ("loss", "accuracy", "acceptance"))
        table.add_row(str(head), *(f"{values[name]:.4f}" if name in values else "-" for name in names))
        head += 1
    return table


def right(name: str) -> Column:
    """A column of numbers."""
    return Column(name, justify="right")
