"""Computation of the number of tokens that a run needs to reach the baseline's best loss."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from wmtp.report.results import TokensToTarget, TokensToTargetPair
from wmtp.report.run_record import RunRecord
from wmtp.statistics.paired import median_interval

LossCurve = Sequence[tuple[int, float]]
"""Validation losses of a run, as pairs (number of tokens trained on, loss)."""


def loss_curve(run: RunRecord, metric: str) -> LossCurve | None:
    """Return the finite values of a validation loss, each with the number of tokens trained on.

    The result is None if the run did not record the loss or the number of tokens.
    """
    lines = [line for line in run.metrics if line.get(metric) is not None]
    if not lines or any("tokens" not in line for line in lines):
        return None
    points = [(int(line["tokens"]), float(line[metric])) for line in lines]
    return [point for point in points if math.isfinite(point[1])]


def first_reached(points: LossCurve, target: float) -> float | None:
    """Return the number of tokens after which the loss first reaches `target`, or None if it never does.

    The loss reaches `target` when it is at most `target`. It is interpolated linearly between validations.

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
    """Return the number of tokens that the run was trained on in stage 1, or 0 if the run had no stage 1."""
    return int((run.summary.get("pretrain") or {}).get("total_tokens") or 0)


def tokens_to_target(
    label: str, pairs: Mapping[int, tuple[RunRecord, RunRecord]], metric: str
) -> TokensToTarget | None:
    """Return how many tokens the runs of a group needed to reach the best loss of the baseline.

    Each run is compared with the best loss of the baseline's run with the same seed. If that run has no finite loss,
    the pair is left out.

    Args:
        label: label of the group.
        pairs: for each seed, the pair (run of the baseline, run of the group).
        metric: name of the validation loss.

    Returns:
        The result for the group, or None if a run did not record its number of tokens or if all pairs are left out.
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
    """Return the ratio with the given logarithm, or None if the logarithm is infinite."""
    return math.exp(log_ratio) if math.isfinite(log_ratio) else None
