"""The data set of a run, which makes batches of selected and tokenized records."""

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from wmtp.data.collate import Batch, collate
from wmtp.data.sampler import batches_by_length, epoch_batches, items_for_rank
from wmtp.data.sources import DataSource
from wmtp.data.split import TokenizedSplit
from wmtp.data.token_labels import harmful_tokens, has_token_labels
from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError

SINGLE_PROCESS = Processes.single_process()


class Dataset:
    """The training and validation data of a run.

    The samples of a batch depend only on the data, on the seed and on the position of the batch in the run.
    `max_new_tokens` is the number of tokens of the longest training solution.

    Raises:
        InputError: the data cannot be read, the selection is impossible, or no training sample is left.
    """

    def __init__(self, source: DataSource, cache_dir: Path, seed: int) -> None:
        splits = source.read()
        self.name, self.origin = source.name, source.origin
        self.tokenizer, self.template, self.seed = source.tokenizer, source.template, seed
        self.train = TokenizedSplit("train", splits.train, source, source.n_samples, cache_dir)
        self.validation = TokenizedSplit("validation", splits.validation, source, None, cache_dir)
        self.test = splits.test
        if has_token_labels(self.validation) and (harmful := harmful_tokens(self.validation, self.tokenizer)).any():
            self.validation.harmful = harmful
        self.max_length = source.max_length
        self.group_tasks = source.group_tasks
        responses = self.train.samples.lengths - self.train.samples.prompt_lengths
        self.max_new_tokens = int(responses.max(initial=0))
        if not len(self.train):
            raise InputError("data: no training samples are left; increase data.max_length or select more records")
        parts = (self.train.fingerprint, self.validation.fingerprint, str(source.group_tasks))
        self.fingerprint = hashlib.sha256("".join(parts).encode()).hexdigest()
        groups = self.train.tasks if source.group_tasks else None
        self._epoch = lru_cache(maxsize=2)(
            lambda epoch, batch_size: epoch_batches(self.train.samples.lengths, batch_size, self.seed, epoch, groups)
        )

    def extend_fingerprint(self, fingerprint: str) -> None:
        """Make the fingerprint of the data depend on the fingerprint of a model.

        This is needed if outputs of the model, such as rewards, are added to the data.
        """
        self.fingerprint = hashlib.sha256((self.fingerprint + fingerprint).encode()).hexdigest()

    def micro_batches(
        self, epoch: int, update: int, batch_size: int, micro_batch_size: int, processes: Processes = SINGLE_PROCESS
    ) -> list[Batch]:
        """Return the micro-batches of this process for one update of one epoch.

        The samples of a micro-batch and its `Batch.number` do not depend on the number of processes. All processes get
        the same number of micro-batches. Therefore, some processes may get an empty micro-batch.
        """
        update_indices = self._epoch(epoch, batch_size)[update]
        micro_batches = [
            update_indices[i : i + micro_batch_size] for i in range(0, len(update_indices), micro_batch_size)
        ]
        first = (epoch << 40) + (update << 12) + processes.rank
        return [
            collate(self.train, indices, self.tokenizer.padding, first + i * processes.size)
            for i, indices in enumerate(items_for_rank(micro_batches, processes.rank, processes.size))
        ]

    def num_tokens(self, epoch: int, update: int, batch_size: int) -> int:
        """Return the number of tokens in the samples of one update, summed over all processes."""
        return int(self.train.samples.lengths[self._epoch(epoch, batch_size)[update]].sum())

    def validation_batches(self, batch_size: int, processes: Processes = SINGLE_PROCESS) -> Iterator[Batch]:
        """Return the validation batches of this process.

        Each validation sample is in one batch of one process. All processes get the same number of batches. Therefore,
        some processes may get an empty batch.
        """
        micro_batches = items_for_rank(self.validation_order(batch_size), processes.rank, processes.size)
        return (collate(self.validation, indices, self.tokenizer.padding) for indices in micro_batches)

    def validation_order(self, batch_size: int) -> list[list[int]]:
        """Return the indices of the samples in each validation batch.

        If `data.group_tasks` is true, the samples are ordered by task, so that the solutions to a task are adjacent.
        Otherwise, the samples are ordered by length.
        """
        if not self.group_tasks:
            return batches_by_length(self.validation.samples.lengths, batch_size)
        ordered = np.argsort(self.validation.tasks, kind="stable").tolist()
        return [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
