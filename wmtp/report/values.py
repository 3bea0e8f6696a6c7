"""A run's value of a metric, and which way is better."""

from typing import Literal

from wmtp.report.runs import RunRecord

At = Literal["best", "last"]
HIGHER_IS_BETTER = ("pass", "accuracy", "explained_variance", "tokens_per_forward", "tokens_per_second", "acceptance")


def lower_is_better(metric: str) -> bool:
    """Whether less is better, as of losses; not of rates.

    >>> lower_is_better("val/head_1_loss"), lower_is_better("val/pass_rate")
    (True, False)
    """
    return not any(name in metric for name in HIGHER_IS_BETTER)


def value_of(run: RunRecord, metric: str, at: At) -> float | None:
    """A metric of a run's best checkpoint, or of its last model; `pass@1` is always the last one's. None: unknown."""
    if metric == "pass@1":
        found = (run.summary.get("pass@1") or {}).get("value")
    else:
        found = run.summary.get(at, {}).get(metric)
    return float(found) if isinstance(found, int | float) else None
