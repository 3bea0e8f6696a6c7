"""Samples to a batch: padded tokens, and labels that leave out prompts and padding."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wmtp.data.split import TokenizedSplit

IGNORED = -100
"""The label of a position that nothing is to be learned from."""
COLUMNS = ("reference_losses", "hidden_states", "misleading")
"""What a split may know of each of its tokens."""


@dataclass(frozen=True)
class Batch:
    """Some samples, right-padded to the longest. Labels are −100 at prompt and padding positions.

    `tasks` are equal for solutions to the same task. The optional arrays are there if the data set has them.
    """

    tokens: Int[Tensor, "batch position"]
    labels: Int[Tensor, "batch position"]
    rewards: Float[Tensor, " batch"]
    is_correct: Bool[Tensor, " batch"]
    tasks: Int[Tensor, " batch"]
    record_ids: tuple[str, ...]
    num_tokens: int
    number: int = 0
    """Which micro-batch of the run this is, however many processes there are."""
    reference_losses: Float[Tensor, "batch position"] | None = None
    hidden_states: Float[Tensor, "batch position dim"] | None = None
    misleading: Bool[Tensor, "batch position"] | None = None

    @property
    def response(self) -> Bool[Tensor, "batch position"]:
        """The tokens of the solutions."""
        return self.labels != IGNORED

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def collate(split: TokenizedSplit, indices: list[int] | None, padding: int, number: int = 0) -> Batch:
    """The batch of some samples. `num_tokens` counts their tokens, without padding.

    None gives a padding token from which nothing is learned: the work of a process that has none while others have.
    """
    if indices is None:
        empty = collate(split, [0], padding, number)
        shortened = {name: x[:, :1] for name, x in vars(empty).items() if isinstance(x, Tensor) and x.ndim > 1}
        shortened |= {"tokens": torch.full((1, 1), padding), "labels": torch.full((1, 1), IGNORED)}
        return replace(empty, **shortened, record_ids=(), num_tokens=0)  # type: ignore[arg-type]
    samples = split.samples
    lengths = samples.lengths[indices]
    size = (len(indices), int(lengths.max()))
    tokens, labels = np.full(size, padding, np.int64), np.full(size, IGNORED, np.int64)
    columns: dict[str, np.ndarray] = {}
    for name in COLUMNS:
        column = getattr(split, name)
        if column is not None:
            columns[name] = np.zeros((*size, *column.shape[1:]), column.dtype)
    for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
        start = samples.offsets[index]
        tokens[row, :length] = samples.tokens[start : start + length]
        prompt = samples.prompt_lengths[index]
        labels[row, prompt:length] = tokens[row, prompt:length]
        for name, padded in columns.items():
            padded[row, :length] = getattr(split, name)[start : start + length]
    return Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(split.rewards[indices]),
        torch.from_numpy(split.is_correct[indices]),
        torch.from_numpy(split.tasks[indices]),
        tuple(split.record_ids[samples.kept[index]] for index in indices),
        int(lengths.sum()),
        number,
        **{name: torch.from_numpy(padded) for name, padded in columns.items()},
    )
