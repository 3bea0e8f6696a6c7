"""The order of samples: a pure function of (seed, epoch), so that a position is two integers."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

WINDOW = 64
"""Batches that are sorted by length together: little padding, yet every epoch mixes anew."""


def epoch_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, groups: np.ndarray | None = None
) -> list[list[int]]:
    """Every sample once, shuffled, in batches of like length; the last one may be smaller.

    Samples of one group stay together, but for those at the edge of a batch.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    shuffled = generator.permutation(len(lengths))
    if groups is not None:
        shuffled = np.argsort(generator.permutation(int(groups.max()) + 1)[groups], kind="stable")
        longest = np.zeros(int(groups.max()) + 1, lengths.dtype)
        np.maximum.at(longest, groups, lengths)
        lengths = longest[groups]
    window = WINDOW * batch_size
    batches = []
    for start in range(0, len(shuffled), window):
        members = shuffled[start : start + window]
        members = members[np.argsort(lengths[members], kind="stable")]
        batches += [members[i : i + batch_size].tolist() for i in range(0, len(members), batch_size)]
    num_full = len(lengths) // batch_size
    return [batches[i] for i in generator.permutation(num_full)] + batches[num_full:]


T = TypeVar("T")


def share(items: Sequence[T], rank: int, size: int) -> list[T | None]:
    """Every `size`-th item from `rank` on; None where this process has nothing to do while others have.

    >>> share("abc", 0, 2), share("abc", 1, 2)
    (['a', 'c'], ['b', None])
    """
    rounds = -(-len(items) // size)
    return [items[i] if i < len(items) else None for i in range(rank, rounds * size, size)]


def by_length(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Every sample once, the shortest first: the order of validation."""
    ordered = np.argsort(lengths, kind="stable")
    return [ordered[i : i + batch_size].tolist() for i in range(0, len(ordered), batch_size)]
