"""The order of the training samples, which depends only on the seed and the epoch.

To continue at the same sample, a run therefore needs only the numbers of the epoch and of the update.
"""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

WINDOW = 64
"""The number of batches whose samples are sorted by length together.

Sorting reduces padding. The number is limited so that each epoch has different batches.
"""


def epoch_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, groups: np.ndarray | None = None
) -> list[list[int]]:
    """Return shuffled batches of sample indices. The samples of a batch have similar lengths.

    `lengths` and `groups` have one entry per sample. Every sample is in one batch. Only the last batch may be smaller
    than `batch_size`. Samples of the same group are adjacent in a batch, but may also be divided among two batches.
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
    """Return the items of one process, which are every `size`-th item from index `rank`.

    If processes of lower rank have one item more, None is appended, so that all processes have the same number of
    entries.

    >>> items_for_rank("abc", 0, 2), items_for_rank("abc", 1, 2)
    (['a', 'c'], ['b', None])
    """
    rounds = -(-len(items) // size)
    return [items[i] if i < len(items) else None for i in range(rank, rounds * size, size)]


def batches_by_length(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
    """Return batches of sample indices in the order of increasing length. Every sample is in one batch."""
    ordered = np.argsort(lengths, kind="stable")
    return [ordered[i : i + batch_size].tolist() for i in range(0, len(ordered), batch_size)]
