"""A data set: which records, drawn how, tokenised how, in which order."""

import hashlib
import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from wmtp.annotations import ExistingPath, Positive, Ratio
from wmtp.data import readers, tasks
from wmtp.data.collate import Batch, collate
from wmtp.data.order import by_length, epoch_batches
from wmtp.data.records import Record, Splits
from wmtp.data.sampling import DifficultyBins, Sampling, select
from wmtp.data.tokenization import Tokenizer
from wmtp.data.tokens import LongSamples, TokenizedRecords, cached_tokens
from wmtp.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """Where records come from, which of them are used, and how they become tokens."""

    tokenizer: Tokenizer
    template: Annotated[str, Field(pattern=r"\{prompt\}")] = "{prompt}\n"
    max_length: Positive = 512
    long_samples: LongSamples = "drop"
    n_samples: Positive | None = None
    balance_correct: bool = False
    correct_ratio: Ratio | None = None
    difficulty_bins: DifficultyBins | None = None
    seed: int = 0

    @abstractmethod
    def read(self) -> Splits:
        """All records, before any are chosen."""

    def sampling(self, n_samples: int | None) -> Sampling:
        """The wished composition; `balance_correct` is a `correct_ratio` of one half."""
        ratio = 0.5 if self.balance_correct else self.correct_ratio
        return Sampling(n_samples, ratio, self.difficulty_bins, self.seed)


@dataclass(frozen=True, kw_only=True)
class TaskSource(DataSource):
    """The embedded programming tasks."""

    num_train: Positive = 5_000
    num_validation: Positive = 200
    num_test: Positive = 200
    difficulties: dict[Annotated[int, Field(ge=1, le=4)], Annotated[float, Field(ge=0)]]
    noise: Ratio = 0.0

    def read(self) -> Splits:
        """Generate the three splits; each task has a right and a wrong solution."""
        sizes = {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}
        return Splits(
            *(tasks.generate(split, size, self.difficulties, self.noise, self.seed) for split, size in sizes.items())
        )


@dataclass(frozen=True, kw_only=True)
class FileSource(DataSource):
    """Records from files of one of the public shapes."""

    path: ExistingPath
    shape: Literal["jsonl", "mbpp", "humaneval", "codecontests"]
    on_error: Literal["stop", "skip"] = "stop"
    max_errors: Annotated[int, Field(ge=0)] = 100

    def read(self) -> Splits:
        """Read the files; rejected lines are counted by reason and reported."""
        splits, rejections = readers.read_splits(self.path, self.shape, self.on_error, self.max_errors)
        counts: dict[str, int] = {}
        for rejection in rejections:
            counts[rejection.reason] = counts.get(rejection.reason, 0) + 1
        if rejections:
            listed = ", ".join(f"{reason} ×{count}" for reason, count in sorted(counts.items()))
            log.warning("%s: skipped %d of the lines: %s", self.path, len(rejections), listed)
        return splits


class TokenizedSplit:
    """The chosen records of one split, as tokens."""

    def __init__(
        self, name: str, records: list[Record], source: DataSource, n_samples: int | None, cache: Path
    ) -> None:
        self.records = select(records, source.sampling(n_samples)) if records else []
        self.record_ids = [f"{record.task_id}#{i}" for i, record in enumerate(self.records)]
        self.samples: TokenizedRecords = cached_tokens(
            self.records, source.tokenizer, source.template, source.max_length, source.long_samples, cache
        )
        if self.samples.num_long:
            what = "dropped" if source.long_samples == "drop" else "cut at the end of the solution"
            log.warning(
                "%s: %d of %d samples are longer than data.max_length=%d and were %s",
                name, self.samples.num_long, len(self.records), source.max_length, what,
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.samples)


class Dataset:
    """What a run trains and validates on. Batches are pure functions of their position."""

    def __init__(self, source: DataSource, cache_dir: Path, seed: int) -> None:
        splits = source.read()
        self.tokenizer, self.template, self.seed = source.tokenizer, source.template, seed
        self.train = TokenizedSplit("train", splits.train, source, source.n_samples, cache_dir)
        self.validation = TokenizedSplit("validation", splits.validation, source, None, cache_dir)
        self.test = splits.test
        responses = self.train.samples.lengths - self.train.samples.prompt_lengths
        self.max_new_tokens = int(responses.max(initial=0))
        if not len(self.train):
            raise InputError("data: no training sample is left; raise data.max_length or change the sampling options")
        digest = hashlib.sha256(self.train.samples.tokens.tobytes() + self.validation.samples.tokens.tobytes())
        self.fingerprint = digest.hexdigest()
        self._epoch = lru_cache(maxsize=2)(
            lambda epoch, batch_size: epoch_batches(self.train.samples.lengths, batch_size, self.seed, epoch)
        )

    def micro_batches(self, epoch: int, update: int, batch_size: int, micro_batch_size: int) -> list[Batch]:
        """The samples of one update of one epoch, split into micro-batches."""
        chosen = self._epoch(epoch, batch_size)[update]
        return [
            self._batch(self.train, chosen[i : i + micro_batch_size]) for i in range(0, len(chosen), micro_batch_size)
        ]

    def validation_batches(self, batch_size: int) -> list[Batch]:
        """Every validation sample once."""
        return [
            self._batch(self.validation, chosen) for chosen in by_length(self.validation.samples.lengths, batch_size)
        ]

    def _batch(self, split: TokenizedSplit, chosen: list[int]) -> Batch:
        return collate(split.samples, chosen, split.record_ids, self.tokenizer.padding)
