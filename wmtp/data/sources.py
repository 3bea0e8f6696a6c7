"""Sources of records, with the settings of their selection and tokenization."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Self

from pydantic import Field

from wmtp.data import readers, tasks
from wmtp.data.records import Splits
from wmtp.data.selection import DifficultyBins, Selection
from wmtp.data.token_cache import LongSamples
from wmtp.data.tokenizer import Tokenizer
from wmtp.field_types import ExistingPath, Positive, Ratio

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """A source of records, with the settings of their selection and tokenization."""

    tokenizer: Tokenizer = field(kw_only=False)
    template: Annotated[str, Field(pattern=r"\{prompt\}")] = "{prompt}\n"
    max_length: Positive = 512
    long_samples: LongSamples = "drop"
    n_samples: Positive | None = None
    balance_correct: bool = False
    correct_ratio: Ratio | None = None
    difficulty_bins: DifficultyBins | None = None
    mismatched: bool = False
    curated: bool = False
    group_tasks: bool = False
    reward_model: ExistingPath | None = None
    seed: int = 0

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the data set."""

    @property
    def origin(self) -> str:
        """The location of the records: the path of files, or wmtp:<name> for generated records."""
        return f"wmtp:{self.name}"

    @property
    def is_test_set(self) -> bool:
        """True if the whole data set is a benchmark."""
        return False

    @abstractmethod
    def read(self) -> Splits:
        """Return all records, before the selection."""

    def without_selection(self) -> Self:
        """Return a copy of the source that selects all records."""
        return replace(
            self,
            n_samples=None,
            balance_correct=False,
            correct_ratio=None,
            difficulty_bins=None,
            mismatched=False,
            curated=False,
        )

    def selection(self, n_samples: int | None) -> Selection:
        """Return the selection of `n_samples` records (None: as many as possible).

        `balance_correct` has the effect of a `correct_ratio` of 0.5.
        """
        ratio = 0.5 if self.balance_correct else self.correct_ratio
        return Selection(n_samples, ratio, self.difficulty_bins, self.seed)


@dataclass(frozen=True, kw_only=True)
class TaskSource(DataSource):
    """The embedded programming tasks."""

    num_train: Positive = 5_000
    num_validation: Positive = 200
    num_test: Positive = 200
    difficulties: dict[Annotated[int, Field(ge=1, le=4)], Annotated[float, Field(ge=0)]]
    noise: Ratio = 0.0

    @property
    def name(self) -> str:
        """The name of the data set."""
        return "tasks"

    def read(self) -> Splits:
        """Generate the three splits; each task has a correct and an incorrect solution."""
        sizes = {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}
        return Splits(
            *(tasks.generate(split, size, self.difficulties, self.noise, self.seed) for split, size in sizes.items())
        )


@dataclass(frozen=True, kw_only=True)
class FileSource(DataSource):
    """Records from files in one of the public formats."""

    path: ExistingPath
    shape: Literal["jsonl", "mbpp", "humaneval", "codecontests"]
    on_error: Literal["stop", "skip"] = "stop"
    max_errors: Annotated[int, Field(ge=0)] = 100

    @property
    def name(self) -> str:
        """The name of the public data set, or jsonl."""
        return self.shape

    @property
    def origin(self) -> str:
        """The absolute path of the files."""
        return str(self.path.absolute())

    @property
    def is_test_set(self) -> bool:
        """True for HumanEval."""
        return self.shape == "humaneval"

    def read(self) -> Splits:
        """Read the files; log the number of rejected rows for each reason.

        Raises:
            InputError: see `readers.read_splits`.
        """
        splits, rejections = readers.read_splits(self.path, self.shape, self.on_error, self.max_errors)
        counts: dict[str, int] = {}
        for rejection in rejections:
            counts[rejection.reason] = counts.get(rejection.reason, 0) + 1
        if rejections:
            reasons = ", ".join(f"{reason} ×{count}" for reason, count in sorted(counts.items()))
            log.warning("%s: skipped %d rows: %s", self.path, len(rejections), reasons)
        return splits
