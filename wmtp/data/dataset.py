"""A data set: which records, drawn how, tokenised how, in which order."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from wmtp.data.collate import Batch, collate
from wmtp.data.sampler import by_length, epoch_batches, share
from wmtp.data.sources import DataSource
from wmtp.data.split import TokenizedSplit
from wmtp.data.token_labels import has_truth, misleading_tokens
from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError

ALONE = Processes.alone()


class Dataset:
    """What a run trains and validates on. Batches are pure functions of their position."""

    def __init__(self, source: DataSource, cache_dir: Path, seed: int) -> None:
        splits = source.read()
        self.name, self.origin = source.name, source.origin
        self.tokenizer, self.template, self.seed = source.tokenizer, source.template, seed
        self.train = TokenizedSplit("train", splits.train, source, source.n_samples, cache_dir)
        self.validation = TokenizedSplit("validation", splits.validation, source, None, cache_dir)
        self.test = splits.test
        if has_truth(self.validation) and (misleading := misleading_tokens(self.validation, self.tokenizer)).any():
            self.validation.misleading = misleading
        self.max_length = source.max_length
        self.group_tasks = source.group_tasks
        responses = self.train.samples.lengths - self.train.samples.prompt_lengths
        self.max_new_tokens = int(responses.max(initial=0))
        if not len(self.train):
            raise InputError("data: no training sample is left; raise data.max_length or change the sampling options")
        parts = (self.train.fingerprint, self.validation.fingerprint, str(source.group_tasks))
        self.fingerprint = hashlib.sha256("".join(parts).encode()).hexdigest()
        groups = self.train.tasks if source.group_tasks else None
        self._epoch = lru_cache(maxsize=2)(
            lambda epoch, batch_size: epoch_batches(self.train.samples.lengths, batch_size, self.seed, epoch, groups)
        )

    def depend_on(self, fingerprint: str) -> None:
        """Take into the data's fingerprint that of a model which has measured something of them."""
        self.fingerprint = hashlib.sha256((self.fingerprint + fingerprint).encode()).hexdigest()

    def micro_batches(
        self, epoch: int, update: int, batch_size: int, micro_batch_size: int, processes: Processes = ALONE
    ) -> list[Batch]:
        """The samples of one update of one epoch, split into micro-batches: those of this process.

        A micro-batch has the same samples and the same number for any number of processes. All processes get
        equally many; where one has nothing left to do, it gets an empty one.
        """
        chosen = self._epoch(epoch, batch_size)[update]
        pieces = [chosen[i : i + micro_batch_size] for i in range(0, len(chosen), micro_batch_size)]
        first = (epoch << 40) + (update << 12) + processes.rank
        return [
            collate(self.train, piece, self.tokenizer.padding, first + i * processes.size)
            for i, piece in enumerate(share(pieces, processes.rank, processes.size))
        ]

    def num_tokens(self, epoch: int, update: int, batch_size: int) -> int:
        """How many tokens an update has, in all processes."""
        return int(self.train.samples.lengths[self._epoch(epoch, batch_size)[update]].sum())

    def validation_batches(self, batch_size: int, processes: Processes = ALONE) -> Iterator[Batch]:
        """Every validation sample once: the batches of this process, empty ones where others have more."""
        pieces = share(self.validation_order(batch_size), processes.rank, processes.size)
        return (collate(self.validation, piece, self.tokenizer.padding) for piece in pieces)

    def validation_order(self, batch_size: int) -> list[list[int]]:
        """The validation samples of each batch; the two solutions of a task together if `data.group_tasks` says so."""
        if not self.group_tasks:
            return by_length(self.validation.samples.lengths, batch_size)
        ordered = np.argsort(self.validation.tasks, kind="stable").tolist()
        return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
