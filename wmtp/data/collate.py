"""Batches of samples, which are padded to equal length. Only the tokens of solutions have labels."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wmtp.data.split import TOKEN_COLUMNS, TokenizedSplit

IGNORED = -100
"""The label of a position without a training target."""
MICRO_BATCH_BITS = 12
"""The number of lower bits of `Batch.number` that identify the micro-batch within its update."""
UPDATE_BITS = 40
"""The number of lower bits of `Batch.number` that identify the micro-batch within its epoch."""


@dataclass(frozen=True)
class Batch:
    """A batch of samples, which are padded on the right to the length of the longest sample.

    The label at a position of a solution is the token id. The label at a position of a prompt or of the padding is
    −100. Samples of the same task have the same number in `tasks`. `num_tokens` is the number of tokens without
    padding. `reference_losses`, `hidden_states` and `harmful` are None if the data set does not have these arrays.
    """

    tokens: Int[Tensor, "batch position"]
    labels: Int[Tensor, "batch position"]
    rewards: Float[Tensor, " batch"]
    is_correct: Bool[Tensor, " batch"]
    tasks: Int[Tensor, " batch"]
    record_ids: tuple[str, ...]
    num_tokens: int
    number: int = 0
    """A number that identifies the micro-batch in the run. It does not depend on the number of processes."""
    reference_losses: Float[Tensor, "batch position reference"] | None = None
    hidden_states: Float[Tensor, "batch position dim"] | None = None
    harmful: Bool[Tensor, "batch position"] | None = None

    @property
    def response(self) -> Bool[Tensor, "batch position"]:
        """A mask that is True at the tokens of solutions."""
        return self.labels != IGNORED

    @property
    def samples(self) -> tuple[str, ...]:
        """A name for each sample, which differs between updates and does not depend on the split of an update."""
        update = self.number >> MICRO_BATCH_BITS
        return tuple(f"{update} {record_id}" for record_id in self.record_ids)

    @property
    def epoch(self) -> int:
        """The number of the epoch, starting from 0."""
        return self.number >> UPDATE_BITS

    def to(self, device: torch.device) -> "Batch":
        """Return a batch with the same content, whose tensors are on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def collate(split: TokenizedSplit, indices: list[int] | None, padding: int, number: int = 0) -> Batch:
    """Return a batch of the samples that have the given indices in a split.

    `padding` is the id of the padding token, and `number` becomes the number of the batch. If `indices` is None, the
    batch is empty: it has one padding token, no label and `num_tokens` 0. A process gets an empty batch if it has no
    samples left while other processes still have some.
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
    for name in TOKEN_COLUMNS:
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
