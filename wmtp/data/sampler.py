"""The order of the training samples, which depends only on the seed and the epoch.

To continue at the same sample, a run therefore needs only the numbers of the epoch and of the update.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

MIN_WINDOWS = 4
"""The smallest number of windows into which the samples are divided at random in each epoch.

The samples of a window are sorted by length, which reduces padding. If a window were a large part of the data, samples
of similar length would be in one batch in every epoch and with every seed.
"""
MAX_WINDOW_BATCHES = 64
"""The largest window, as a number of batches. Larger windows would hardly reduce padding further."""


def epoch_batches(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int, groups: np.ndarray | None = None
) -> list[list[int]]:
    """Return shuffled batches of sample indices. The samples of a batch have similar lengths.

    `lengths` and `groups` have one entry per sample. Every sample is in one batch. Only the last batch may be smaller
    than `batch_size`. Samples of the same group are adjacent in a batch, but may also be divided among two batches.
    """
    generator = np.random.Generator(np.random.PCG64([seed, epoch]))
    group_of = np.arange(len(lengths)) if groups is None else np.unique(groups, return_inverse=True)[1]
    longest = np.zeros(group_of.max(initial=-1) + 1, lengths.dtype)
    np.maximum.at(longest, group_of, lengths)
    num_windows = max(MIN_WINDOWS, 2 * math.ceil(len(lengths) / (2 * MAX_WINDOW_BATCHES * batch_size)))
    windows = np.array_split(generator.permutation(len(longest)), num_windows)
    # lengths rise and fall alternately, and the ends join, so a batch from two windows has similar lengths, too
    by_length = [window[np.argsort(longest[window], kind="stable")] for window in windows]
    ordered = np.concatenate([window[:: (-1) ** i] for i, window in enumerate(by_length)])
    ordered = np.roll(ordered, generator.integers(max(1, len(ordered))))
    samples = np.argsort(np.argsort(ordered)[group_of], kind="stable")
    batches = [samples[i : i + batch_size].tolist() for i in range(0, len(samples), batch_size)]
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
