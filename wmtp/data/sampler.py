"""The order of samples. It depends only on seed and epoch, so (epoch, update) is enough to store a position."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

WINDOW = 64
"""Number of batches whose samples are sorted by length together: little padding, but new batches in each epoch."""


def epoch_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, groups: np.ndarray | None = None
) -> list[list[int]]:
    """Return batches of indices, shuffled, with samples of similar length in a batch; the last one may be smaller.

    `lengths` and `groups` have one entry per sample. Every sample occurs once. Samples of one group are adjacent; only
    the boundary between two batches can separate them.
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


def items_for_rank(items: Sequence[T], rank: int, size: int) -> list[T | None]:
    """Return every `size`-th item, starting at `rank`; the last one is None if lower ranks have one item more.

    >>> items_for_rank("abc", 0, 2), items_for_rank("abc", 1, 2)
    (['a', 'c'], ['b', None])
    """
    rounds = -(-len(items) // size)
    return [items[i] if i < len(items) else None for i in range(rank, rounds * size, size)]


def batches_by_length(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Return batches of indices, ordered by length, shortest first; every sample occurs once."""
    ordered = np.argsort(lengths, kind="stable")
    return [ordered[i : i + batch_size].tolist() for i in range(0, len(ordered), batch_size)]
