"""Where records come from, which of them are used, and how they become tokens."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Self

from pydantic import Field

from wmtp.data import readers, tasks
from wmtp.data.records import Splits
from wmtp.data.selection import DifficultyBins, Sampling
from wmtp.data.token_cache import LongSamples
from wmtp.data.tokenizer import Tokenizer
from wmtp.field_types import ExistingPath, Positive, Ratio

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """Where records come from, which of them are used, and how they become tokens."""

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
        """What the data set is called, in a word."""

    @property
    def origin(self) -> str:
        """Where its records come from."""
        return f"wmtp:{self.name}"

    @property
    def is_test_set(self) -> bool:
        """Whether all of it was made to measure models by."""
        return False

    @abstractmethod
    def read(self) -> Splits:
        """All records, before any are chosen."""

    def whole(self) -> Self:
        """The same source without any wish which records to choose."""
        return replace(
            self,
            n_samples=None,
            balance_correct=False,
            correct_ratio=None,
            difficulty_bins=None,
            mismatched=False,
            curated=False,
        )

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

    @property
    def name(self) -> str:
        """That of the config's option."""
        return "tasks"

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

    @property
    def name(self) -> str:
        """The public data set of that shape, or jsonl."""
        return self.shape

    @property
    def origin(self) -> str:
        """Where its files are."""
        return str(self.path.absolute())

    @property
    def is_test_set(self) -> bool:
        """HumanEval is one."""
        return self.shape == "humaneval"

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
