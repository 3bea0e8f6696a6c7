"""What completions took: forwards of the model, and drafts that were accepted or not."""

from collections.abc import Sequence
from typing import NamedTuple


class Cost(NamedTuple):
    """What a completion took: the tokens that were chosen for it, the end token included, and see `Completion`."""

    num_chosen: int
    forwards: int
    accepted: tuple[int, ...]
    drafted: tuple[int, ...]


def speculation_metrics(costs: Sequence[Cost]) -> dict[str, float]:
    """Tokens chosen per forward, and the share of each head's drafts that was accepted; nothing of nothing."""
    num_forwards = sum(cost.forwards for cost in costs)
    if not num_forwards:
        return {}
    metrics = {"tokens_per_forward": sum(cost.num_chosen for cost in costs) / num_forwards}
    accepted = [sum(counts) for counts in zip(*(cost.accepted for cost in costs), strict=True)]
    drafted = [sum(counts) for counts in zip(*(cost.drafted for cost in costs), strict=True)]
    for head, (num_accepted, num_drafted) in enumerate(zip(accepted, drafted, strict=True), start=2):
        if num_drafted:
            metrics[f"head_{head}_acceptance"] = num_accepted / num_drafted
    return metrics
