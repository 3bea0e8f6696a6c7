"""Arrays with one entry per token of a data set: computed once, kept on disk, read memory-mapped."""

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
from wmtp.data.sampler import by_length, share
from wmtp.data.split import TokenizedSplit
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import Hardware
from wmtp.errors import InputError
from wmtp.models.mtp import MtpModel
from wmtp.models.source import weights_fingerprint
from wmtp.ops.cross_entropy import cross_entropy
from wmtp.ops.targets import targets
from wmtp.runtime.locks import one_at_a_time

FORMAT = 1
BATCH_SIZE = 32


class TokenColumns:
    """Fills the columns of splits from a frozen model.

    A file's key covers the tokens, the tokenizer, the model's weights and what else decides its forward, so
    that later epochs, runs and the jobs of a sweep find it, and nothing that changed ever meets a stale one.
    """

    def __init__(self, cache_dir: Path, tokenizer: Tokenizer, hardware: Hardware) -> None:
        self.cache_dir, self.tokenizer, self.hardware = cache_dir, tokenizer, hardware

    def attach_reference_losses(self, model: MtpModel, data: Dataset) -> None:
        """Give every token of a solution the next-token cross-entropy that `model` gives it, in nats; others 0."""

        def measure(batch: Batch) -> Tensor:
            target = targets(batch.labels, 1)
            losses = cross_entropy(model(batch.tokens, num_heads=1).states, model.unembedding_weight, target)
            return F.pad(losses[0, :, :-1], (1, 0))  # from the position that predicts to the token

        weights = weights_fingerprint(model, without="value_head.")
        for split in (data.train, data.validation):
            split.reference_losses = self._column("reference-losses", weights, split, (), model, measure)
        data.depend_on(weights)

    def attach_hidden_states(self, model: MtpModel, data: Dataset) -> None:
        """Give every token the trunk's hidden state after it."""
        weights = weights_fingerprint(model, without="value_head.")
        for split in (data.train, data.validation):
            split.hidden_states = self._column(
                "hidden-states",
                weights,
                split,
                (model.architecture.dim,),
                model,
                lambda batch: model.trunk_states(batch.tokens),
            )

    def _column(
        self,
        name: str,
        weights: str,
        split: TokenizedSplit,
        tail: tuple[int, ...],
        model: MtpModel,
        measure: Callable[[Batch], Tensor],
    ) -> np.ndarray:
        parts: list[Any] = [FORMAT, split.fingerprint, self.tokenizer.fingerprint, weights, self.hardware.precision]
        parts.append(model.architecture.settings)
        path = self.cache_dir / f"{name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        processes = self.hardware.processes
        with one_at_a_time(path.with_suffix(".lock")) if processes.is_main else nullcontext():
            if not processes.from_main(path.exists):
                self._write(path, (len(split.samples.tokens), *tail), model, split, measure)
            processes.wait()
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
        measure: Callable[[Batch], Tensor],
    ) -> None:
        model.eval()
        if not self.hardware.processes.is_main:
            fill(None, split, self.tokenizer, self.hardware, measure)
            return
        staged = path.with_suffix(f".{os.getpid()}.tmp")
        column = np.lib.format.open_memmap(staged, mode="w+", dtype=np.float32, shape=shape)
        try:
            fill(column, split, self.tokenizer, self.hardware, measure)
            column.flush()
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)


def fill(
    column: np.ndarray | None,
    split: TokenizedSplit,
    tokenizer: Tokenizer,
    hardware: Hardware,
    measure: Callable[[Batch], Tensor],
) -> None:
    """Put what `measure` gives for each position of a batch where the token stands in the split.

    The processes measure a batch each at a time, and hand it to those that have a `column`.
    """
    processes, offsets, lengths = hardware.processes, split.samples.offsets, split.samples.lengths
    batches = by_length(lengths, BATCH_SIZE)
    for first in range(0, len(batches), processes.size):
        group = batches[first : first + processes.size]
        mine = share(group, processes.rank, processes.size)[0]
        batch = collate(split, mine, tokenizer.padding).to(hardware.device)
        with hardware.autocast():
            values = measure(batch).float()
        for rank, chosen in enumerate(group):
            shape = (len(chosen), int(lengths[chosen].max()))
            own = values if rank == processes.rank else values.new_empty(*shape, *values.shape[2:])
            found = processes.broadcast(own, rank)
            if column is None:
                continue
            rows = found.cpu().numpy()
            for row, index in enumerate(chosen):
                column[offsets[index] : offsets[index + 1]] = rows[row, : lengths[index]]
