"""Statistics of speculative decoding: forwards of the model, and accepted drafts."""

from collections.abc import Sequence
from typing import NamedTuple


class SpeculationStats(NamedTuple):
    """Counts of one completion; `num_chosen` includes the end token, for the others see `Completion`."""

    num_chosen: int
    forwards: int
    accepted: tuple[int, ...]
    drafted: tuple[int, ...]


def speculation_metrics(stats: Sequence[SpeculationStats]) -> dict[str, float]:
    """Return the tokens per forward and the acceptance rate of each head's drafts; empty without any forward."""
    num_forwards = sum(one.forwards for one in stats)
    if not num_forwards:
        return {}
    metrics = {"tokens_per_forward": sum(one.num_chosen for one in stats) / num_forwards}
    accepted = [sum(counts) for counts in zip(*(one.accepted for one in stats), strict=True)]
    drafted = [sum(counts) for counts in zip(*(one.drafted for one in stats), strict=True)]
    for head, (num_accepted, num_drafted) in enumerate(zip(accepted, drafted, strict=True), start=2):
        if num_drafted:
            metrics[f"head_{head}_acceptance"] = num_accepted / num_drafted
    return metrics
