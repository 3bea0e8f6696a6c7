"""Samples to a batch: padded tokens, and labels that leave out prompts and padding."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from wmtp.data.tokens import TokenizedRecords

IGNORED = -100
"""The label of a position that nothing is to be learned from."""


@dataclass(frozen=True)
class Batch:
    """Some samples, right-padded to the longest. Labels are −100 at prompt and padding positions."""

    tokens: Int[Tensor, "batch position"]
    labels: Int[Tensor, "batch position"]
    record_ids: tuple[str, ...]
    num_tokens: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on another device."""
        tokens, labels = self.tokens.to(device, non_blocking=True), self.labels.to(device, non_blocking=True)
        return Batch(tokens, labels, self.record_ids, self.num_tokens)


def collate(samples: TokenizedRecords, indices: list[int], record_ids: list[str], padding: int) -> Batch:
    """The batch of some samples. `num_tokens` counts their tokens, without padding."""
    lengths = samples.lengths[indices]
    tokens = np.full((len(indices), int(lengths.max())), padding, np.int64)
    labels = np.full_like(tokens, IGNORED)
    for row, (index, length) in enumerate(zip(indices, lengths, strict=True)):
        start = samples.offsets[index]
        tokens[row, :length] = samples.tokens[start : start + length]
        prompt = samples.prompt_lengths[index]
        labels[row, prompt:length] = tokens[row, prompt:length]
    ids = tuple(record_ids[samples.kept[index]] for index in indices)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(labels), ids, int(lengths.sum()))
