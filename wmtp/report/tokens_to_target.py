"""How many tokens a run needs to become as good as the baseline ever was."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from wmtp.report.results import Reach, ReachPair
from wmtp.report.run_record import RunRecord
from wmtp.report.statistics import median_interval

Curve = Sequence[tuple[int, float]]
"""Tokens trained on, and the loss that was then measured."""


def curve(run: RunRecord, metric: str) -> Curve | None:
    """A run's validations that are finite; None where a line does not say after how many tokens, or there are none."""
    lines = [line for line in run.metrics if line.get(metric) is not None]
    if not lines or any("tokens" not in line for line in lines):
        return None
    points = [(int(line["tokens"]), float(line[metric])) for line in lines]
    return [point for point in points if math.isfinite(point[1])]


def first_reached(points: Curve, target: float) -> float | None:
    """After how many tokens a loss is first at or below a target, on straight lines between validations; None: never.

    >>> first_reached([(100, 3.0), (200, 1.0)], 2.0)
    150.0
    """
    before: tuple[int, float] | None = None
    for tokens, loss in points:
        if loss <= target:
            if before is None or before[1] == loss:
                return float(tokens)
            return before[0] + (tokens - before[0]) * (before[1] - target) / (before[1] - loss)
        before = (tokens, loss)
    return None


def stage_tokens(run: RunRecord) -> int:
    """Tokens of the stage before the training."""
    return int((run.summary.get("pretrain") or {}).get("total_tokens") or 0)


def reach(label: str, pairs: Mapping[int, tuple[RunRecord, RunRecord]], metric: str) -> Reach | None:
    """Tokens of pairs (baseline, other) by seed until each is at the baseline's best.

    A pair whose baseline has no finite loss is left out. None: tokens are not recorded, or there is no such pair.
    """
    found = []
    for seed, (baseline, other) in sorted(pairs.items()):
        curves = curve(baseline, metric), curve(other, metric)
        if curves[0] is None or curves[1] is None:
            return None
        if not curves[0]:
            continue
        target = min(loss for _, loss in curves[0])
        stages, needed = (stage_tokens(baseline), stage_tokens(other)), first_reached(curves[1], target)
        own = first_reached(curves[0], target)
        assert own is not None
        total = None if needed is None else needed + stages[1]
        found.append(ReachPair(seed, target, own + stages[0], total, *stages))
    if not found:
        return None
    ratios = [math.inf if pair.tokens is None else math.log(pair.tokens / pair.baseline_tokens) for pair in found]
    interval = median_interval(ratios)
    low, high = interval or (math.inf, math.inf)
    return Reach(
        label, metric, found, never=sum(pair.tokens is None for pair in found), ratio=finite(float(np.median(ratios))),
        has_interval=interval is not None, low=finite(low), high=finite(high),
    )  # fmt: skip


def finite(log_ratio: float) -> float | None:
    """A ratio from its logarithm; None where it is infinite."""
    return math.exp(log_ratio) if math.isfinite(log_ratio) else None
