"""Number of tokens that a run needs to reach the baseline's best loss."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from wmtp.report.results import TokensToTarget, TokensToTargetPair
from wmtp.report.run_record import RunRecord
from wmtp.report.statistics import median_interval

LossCurve = Sequence[tuple[int, float]]
"""Pairs (tokens trained on, validation loss)."""


def loss_curve(run: RunRecord, metric: str) -> LossCurve | None:
    """Return the finite validation losses of a run by tokens, or None if these are not recorded."""
    lines = [line for line in run.metrics if line.get(metric) is not None]
    if not lines or any("tokens" not in line for line in lines):
        return None
    points = [(int(line["tokens"]), float(line[metric])) for line in lines]
    return [point for point in points if math.isfinite(point[1])]


def first_reached(points: LossCurve, target: float) -> float | None:
    """Return the tokens after which a loss is first at or below `target`, or None if it never is.

    The loss is interpolated linearly between validations.

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


def pretrain_tokens(run: RunRecord) -> int:
    """Return the number of tokens of stage 1, 0 if there was none."""
    return int((run.summary.get("pretrain") or {}).get("total_tokens") or 0)


def tokens_to_target(
    label: str, pairs: Mapping[int, tuple[RunRecord, RunRecord]], metric: str
) -> TokensToTarget | None:
    """Return the tokens that each run of a pair needs to reach the baseline's best loss.

    A pair whose baseline has no finite loss is left out.

    Args:
        label: label of the group.
        pairs: pairs (baseline run, group run) by seed.
        metric: name of the loss.

    Returns:
        The result, or None if tokens are not recorded or no pair is left.
    """
    found = []
    for seed, (baseline, other) in sorted(pairs.items()):
        curves = loss_curve(baseline, metric), loss_curve(other, metric)
        if curves[0] is None or curves[1] is None:
            return None
        if not curves[0]:
            continue
        target = min(loss for _, loss in curves[0])
        stages, needed = (pretrain_tokens(baseline), pretrain_tokens(other)), first_reached(curves[1], target)
        baseline_tokens = first_reached(curves[0], target)
        assert baseline_tokens is not None
        total = None if needed is None else needed + stages[1]
        found.append(TokensToTargetPair(seed, target, baseline_tokens + stages[0], total, *stages))
    if not found:
        return None
    ratios = [math.inf if pair.tokens is None else math.log(pair.tokens / pair.baseline_tokens) for pair in found]
    interval = median_interval(ratios)
    low, high = interval or (math.inf, math.inf)
    return TokensToTarget(
        label, metric, found, never=sum(pair.tokens is None for pair in found),
        ratio=finite_ratio(float(np.median(ratios))), has_interval=interval is not None,
        low=finite_ratio(low), high=finite_ratio(high),
    )  # fmt: skip


def finite_ratio(log_ratio: float) -> float | None:
    """Return the ratio for a logarithm, or None if it is infinite."""
    return math.exp(log_ratio) if math.isfinite(log_ratio) else None
