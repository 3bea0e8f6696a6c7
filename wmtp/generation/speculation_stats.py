"""Statistics of speculative decoding, computed from the numbers of forward passes and of accepted drafts."""

from collections.abc import Sequence
from typing import NamedTuple


class SpeculationStats(NamedTuple):
    """The numbers of tokens, forward passes and drafts of one completion.

    `num_chosen` is the number of tokens of the completion, including the end token. The other fields are described in
    `Completion`.
    """

    num_chosen: int
    forwards: int
    accepted: tuple[int, ...]
    drafted: tuple[int, ...]


def speculation_metrics(stats: Sequence[SpeculationStats]) -> dict[str, float]:
    """Return the number of tokens per forward pass, and the fraction of each head's drafts that was accepted.

    If there was no forward pass, the result is empty.
    """
    num_forwards = sum(each.forwards for each in stats)
    if not num_forwards:
        return {}
    metrics = {"tokens_per_forward": sum(each.num_chosen for each in stats) / num_forwards}
    accepted = [sum(counts) for counts in zip(*(each.accepted for each in stats), strict=True)]
    drafted = [sum(counts) for counts in zip(*(each.drafted for each in stats), strict=True)]
    for head, (num_accepted, num_drafted) in enumerate(zip(accepted, drafted, strict=True), start=2):
        if num_drafted:
            metrics[f"head_{head}_acceptance"] = num_accepted / num_drafted
    return metrics
