"""The direction of each metric: whether lower or higher values are better.

Early stopping, the best checkpoint, sweeps and comparisons of runs use the same directions.
"""

import math
import re

LOWER_IS_BETTER = ("loss", "perplexity")
HIGHER_IS_BETTER = (
    "pass_rate", "accuracy", "acceptance", "explained_variance", "tokens_per_forward", "auc", "top1", "logprob",
    "probability", "sampled_pass@1",
)  # fmt: skip
PASS_AT_K = re.compile(r"pass@([1-9]\d*)")


def is_lower_better(metric: str) -> bool | None:
    """Return whether lower values of a metric are better; None if neither lower nor higher values are better.

    >>> is_lower_better("val/head_2_loss"), is_lower_better("val/pass_rate"), is_lower_better("train/value_variance")
    (True, False, None)
    """
    if metric.endswith(LOWER_IS_BETTER):
        return True
    return False if metric.endswith(HIGHER_IS_BETTER) or PASS_AT_K.fullmatch(metric) else None


def is_improvement(metric: str, value: float, best: float | None, min_delta: float = 0.0) -> bool:
    """Return whether a value is finite, and better than the best value by more than `min_delta` if there is one."""
    if best is None or not math.isfinite(value):
        return math.isfinite(value)
    return (value - best if is_lower_better(metric) is False else best - value) > min_delta
