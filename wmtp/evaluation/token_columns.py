"""Arrays with one entry for each token of a data set, which a model computes once and which are cached on disk."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wmtp.data.collate import Batch, collate
from wmtp.data.dataset import Dataset
from wmtp.data.sampler import batches_by_length, items_for_rank
from wmtp.data.split import TokenizedSplit
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import Hardware
from wmtp.errors import InputError
from wmtp.models.mtp import MtpModel
from wmtp.models.source import weights_fingerprint
from wmtp.ops.cross_entropy import cross_entropy
from wmtp.ops.targets import targets
from wmtp.runtime.locks import file_lock

FORMAT = 2
"""Version of the file format and of the arithmetic. The names of the cached files depend on it.

It must change if other code computes other values, as with the rounding of losses in bf16.
"""
BATCH_SIZE = 32


def column_fingerprint(model: MtpModel) -> str:
    """Return a hash of the weights on which columns depend, which are all except those of the value head."""
    return weights_fingerprint(model, exclude_prefix="value_head.")


class TokenColumns:
    """A disk cache of arrays (columns) that a frozen model computes, with one entry for each token of a split.

    The name of a cached file contains a hash of the tokens, the tokenizer, the weights of the model and everything else
    that determines the model's forward pass. A file is therefore never used after one of these has changed. As long as
    none of them changes, later epochs, later runs and other jobs of a sweep reuse the file.
    """

    def __init__(self, cache_dir: Path, tokenizer: Tokenizer, hardware: Hardware) -> None:
        self.cache_dir, self.tokenizer, self.hardware = cache_dir, tokenizer, hardware

    def reference_losses(self, model: MtpModel, data: Dataset, is_correct: bool | None = None) -> list[np.ndarray]:
        """Return the losses of a reference for both splits, shape [token], from the cache or from `model`.

        The loss of a token is the next-token cross-entropy of `model` in nats, and 0 for tokens outside solutions. If
        the model is class-conditional, `is_correct` is the class of all solutions. All ranks must call this method.

        Raises:
            InputError: the cached file cannot be read.
        """

        def _losses(batch: Batch) -> Tensor:
            """Return the loss of the model for each token of a batch."""
            target = targets(batch.labels, 1)
            classes = None if is_correct is None else torch.full_like(batch.tasks, int(is_correct))
            states = model(batch.tokens, num_heads=1, classes=classes).states
            losses = cross_entropy(states, model.unembedding_weight, target)
            return F.pad(losses[0, :, :-1], (1, 0))  # shift to the position of the predicted token

        name = "reference-losses"
        if is_correct is not None:
            name = f"{'correct' if is_correct else 'incorrect'}-losses"
        weights = column_fingerprint(model)
        return [self._column(name, weights, split, (), model, _losses) for split in data.splits]

    def with_hidden_states(self, model: MtpModel, data: Dataset) -> Dataset:
        """Return the data set with the column `hidden_states`, shape [token, dim], from the cache or from `model`.

        A hidden state is the output of the model's trunk at a token. All ranks must call this method.

        Raises:
            InputError: the cached file cannot be read.
        """
        weights = column_fingerprint(model)
        shape = (model.architecture.dim,)
        states = [
            self._column("hidden-states", weights, split, shape, model, lambda batch: model.trunk_states(batch.tokens))
            for split in data.splits
        ]
        return data.with_columns(hidden_states=states)

    def _column(
        self,
        name: str,
        weights: str,
        split: TokenizedSplit,
        value_shape: tuple[int, ...],
        model: MtpModel,
        compute: Callable[[Batch], Tensor],
    ) -> np.ndarray:
        key: list[Any] = [FORMAT, split.fingerprint, self.tokenizer.fingerprint, weights, self.hardware.precision]
        key.append(model.architecture.settings)
        path = self.cache_dir / f"{name}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        processes = self.hardware.processes
        with file_lock(path.with_suffix(".lock")) if processes.is_main else nullcontext():
            if not processes.run_on_main(path.exists):
                self._write(path, (len(split.samples.tokens), *value_shape), model, split, compute)
            processes.barrier()
        try:
            column: np.ndarray = np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise InputError(f"{path}: the cached {name} cannot be read ({error}); delete this file") from error
        return column

    @torch.inference_mode()
    def _write(
        self,
        path: Path,
        shape: tuple[int, ...],
        model: MtpModel,
        split: TokenizedSplit,
        compute: Callable[[Batch], Tensor],
    ) -> None:
        model.eval()
        if not self.hardware.processes.is_main:
            fill_column(None, split, self.tokenizer, self.hardware, compute)
            return
        staged = path.with_suffix(f".{os.getpid()}.tmp")
        column = np.lib.format.open_memmap(staged, mode="w+", dtype=np.float32, shape=shape)
        try:
            fill_column(column, split, self.tokenizer, self.hardware, compute)
            column.flush()
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)


def fill_column(
    column: np.ndarray | None,
    split: TokenizedSplit,
    tokenizer: Tokenizer,
    hardware: Hardware,
    compute: Callable[[Batch], Tensor],
) -> None:
    """Compute values for all tokens of a split and write them to `column`.

    The batches are distributed over the ranks. Each rank computes the values of its batches and broadcasts them. All
    ranks must call this function.

    Args:
        column: the array to fill, shape [token, ...]; None on ranks that do not store the values.
        split: the split.
        tokenizer: the tokenizer of the split, which provides the padding token.
        hardware: device, precision and processes.
        compute: a function that returns the values of a batch, shape [batch, position, ...].
    """
    processes, offsets, lengths = hardware.processes, split.samples.offsets, split.samples.lengths
    batches = batches_by_length(lengths, BATCH_SIZE)
    for first in range(0, len(batches), processes.size):
        group = batches[first : first + processes.size]
        indices = items_for_rank(group, processes.rank, processes.size)[0]
        batch = collate(split, indices, tokenizer.padding).to(hardware.device)
        with hardware.autocast():
            values = compute(batch).float()
        for rank, rank_indices in enumerate(group):
            shape = (len(rank_indices), int(lengths[rank_indices].max()))
            local_values = values if rank == processes.rank else values.new_empty(*shape, *values.shape[2:])
            rank_values = processes.broadcast(local_values, rank)
            if column is None:
                continue
            rows = rank_values.cpu().numpy()
            for row, index in enumerate(rank_indices):
                column[offsets[index] : offsets[index + 1]] = rows[row, : lengths[index]]
