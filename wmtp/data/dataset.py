"""The data set of a run, which makes batches of selected and tokenized records."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from wmtp.data.collate import MICRO_BATCH_BITS, UPDATE_BITS, Batch, collate
from wmtp.data.contents import Contents
from wmtp.data.records import Record
from wmtp.data.sampler import batches_by_length, epoch_batches, items_for_rank
from wmtp.data.sources import DataSource
from wmtp.data.split import TokenizedSplit, build_split
from wmtp.data.token_labels import harmful_tokens, has_token_labels, label_shares
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError

SINGLE_PROCESS = Processes.single_process()


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """The training and validation data of a run. It cannot be changed.

    The samples of a batch depend only on the data, on the seed and on the position of the batch in the run.
    """

    name: str
    origin: str
    tokenizer: Tokenizer
    template: str
    max_length: int
    group_tasks: bool
    seed: int
    train: TokenizedSplit
    validation: TokenizedSplit
    test: tuple[Record, ...]
    fingerprint: str
    """A hash of everything that determines the samples. A run can only be resumed with data of the same fingerprint."""
    contents: Contents
    """The origins and hashes of everything that was read, including what the samples do not depend on."""
    label_shares: dict[str, float] = field(default_factory=dict)
    """The result of `token_labels.label_shares` for the training split. It is empty if the data has no token labels."""

    @property
    def max_new_tokens(self) -> int:
        """The number of tokens of the longest training solution."""
        return int((self.train.samples.lengths - self.train.samples.prompt_lengths).max(initial=0))

    @property
    def splits(self) -> tuple[TokenizedSplit, TokenizedSplit]:
        """The training split and the validation split."""
        return self.train, self.validation

    @cached_property
    def _epoch(self) -> Callable[[int, int], list[list[int]]]:
        """A function that returns the batches of an epoch for a batch size, and that keeps its last two results."""
        groups = self.train.tasks if self.group_tasks else None
        return lru_cache(maxsize=2)(
            lambda epoch, batch_size: epoch_batches(self.train.samples.lengths, batch_size, self.seed, epoch, groups)
        )

    def with_columns(self, *, fingerprint: str | None = None, **columns: Iterable[np.ndarray]) -> "Dataset":
        """Return a data set whose splits also have the given columns (see `TokenizedSplit.with_columns`).

        Args:
            fingerprint: the fingerprint of the model whose outputs the columns contain. The fingerprint of the new data
                set depends on it. If it is None, the new data set has the same fingerprint as this data set.
            columns: for each column, its array for the training split, followed by its array for the validation split.

        Raises:
            ValueError: no column has this name, or a column does not have one entry per sample or per token.
        """
        train, validation = self.splits
        for name, arrays in columns.items():
            train, validation = (
                split.with_columns(**{name: array}) for split, array in zip((train, validation), arrays, strict=True)
            )
        combined = self.fingerprint if fingerprint is None else _hash(self.fingerprint + fingerprint)
        return replace(self, train=train, validation=validation, fingerprint=combined)

    def with_training_as_validation(self) -> "Dataset":
        """Return a data set that has the first training samples as validation samples, as many as it has of these."""
        return replace(self, validation=self.train.first(len(self.validation)))

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
        first = (epoch << UPDATE_BITS) + (update << MICRO_BATCH_BITS) + processes.rank
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


def read_dataset(source: DataSource, cache_dir: Path, seed: int) -> Dataset:
    """Read the records of a source, select and tokenize them, and return them as a data set.

    If the validation records have token labels, the validation split has the column `harmful`.

    Raises:
        InputError: the data cannot be read, the selection is impossible, or no training sample is left.
    """
    records = source.read()
    train = build_split("train", records.train, source, source.n_samples, cache_dir)
    selected = source if source.select_validation else source.without_selection()
    validation = build_split("validation", records.validation, selected, None, cache_dir)
    if not len(train):
        raise InputError("data: no training samples are left; increase data.max_length or select more records")
    fingerprint = _hash(train.fingerprint + validation.fingerprint + str(source.group_tasks))
    if has_token_labels(validation) and (harmful := harmful_tokens(validation, source.tokenizer)).any():
        validation = validation.with_columns(harmful=harmful)
    return Dataset(
        source.name, source.origin, source.tokenizer, source.template, source.max_length, source.group_tasks,
        seed, train, validation, tuple(records.test), fingerprint, source.contents(records),
        label_shares(train, source.tokenizer),
    )  # fmt: skip


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
