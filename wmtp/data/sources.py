"""Sources of records, with the settings for the selection and the tokenization of the records."""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field

from wmtp.data import readers, tasks
from wmtp.data.contents import Contents, hash_file, hash_records
from wmtp.data.records import Splits
from wmtp.data.selection import DifficultyBins, Selection
from wmtp.data.task_noise import NoiseKind
from wmtp.data.token_cache import LongSamples
from wmtp.data.tokenizer import Tokenizer
from wmtp.field_types import ExistingPath, Positive, Ratio

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DataSource(ABC):
    """A source of records, with the settings for the selection and the tokenization of its records."""

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
    select_validation: bool = True
    group_tasks: bool = False
    reward_model: ExistingPath | None = None
    seed: int = 0

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the data set."""

    @property
    def origin(self) -> str:
        """The path of the files that contain the records, or `wmtp:<name>` if the records are generated."""
        return f"wmtp:{self.name}"

    @property
    def is_test_set(self) -> bool:
        """True if the data set consists only of test data. By default, the whole data set is then evaluated."""
        return False

    @abstractmethod
    def read(self) -> Splits:
        """Return the records of all splits, before any selection."""

    def contents(self, splits: Splits) -> Contents:
        """Return the origins and hashes of the parts of the data. `splits` is the result of `read`."""
        parts = splits._asdict().items()
        return {name: {"source": f"{self.origin} ({name})", "hash": hash_records(part)} for name, part in parts}

    def without_selection(self) -> Self:
        """Return a copy of the source with settings that select all records."""
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
        """Return the settings for the selection of `n_samples` records.

        If `n_samples` is None, as many records as possible are selected. If `balance_correct` is true, half of the
        selected records are correct. If `group_tasks` is true, correct and incorrect records are of the same tasks.
        """
        ratio = 0.5 if self.balance_correct else self.correct_ratio
        return Selection(n_samples, ratio, self.difficulty_bins, self.seed, by_task=self.group_tasks)


def _not_empty(kinds: list[NoiseKind]) -> list[NoiseKind]:
    if not kinds:
        raise ValueError("is empty; name at least one kind, or set data.noise=0 for no noise")
    return kinds


@dataclass(frozen=True, kw_only=True)
class TaskSource(DataSource):
    """A source of the generated tasks, which are programming tasks that wmtp itself generates."""

    num_train: Positive = 5_000
    num_validation: Positive = 200
    num_test: Positive = 200
    difficulties: dict[Annotated[int, Field(ge=1, le=4)], Annotated[float, Field(ge=0)]]
    noise: Ratio = 0.0
    noise_kinds: Annotated[list[NoiseKind], AfterValidator(_not_empty)] = field(default_factory=lambda: ["footer"])
    noise_lines: Annotated[int, Field(ge=1, le=100)] = 4
    wrong_variants: Annotated[int, Field(ge=1, le=8)] = 1

    @property
    def name(self) -> str:
        """The name of the data set."""
        return "tasks"

    def read(self) -> Splits:
        """Generate the three splits. Each task has a correct solution and `wrong_variants` different incorrect ones."""
        sizes = {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}
        return Splits(
            *(
                tasks.generate(
                    split, size, self.difficulties, self.noise, self.seed,
                    noise_kinds=self.noise_kinds, noise_lines=self.noise_lines, wrong_variants=self.wrong_variants,
                )
                for split, size in sizes.items()
            )
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FileSource(DataSource):
    """A source that reads records from files in one of the supported formats."""

    path: ExistingPath
    shape: Literal["jsonl", "mbpp", "humaneval", "codecontests"]
    on_error: Literal["stop", "skip"] = "stop"
    max_errors: Annotated[int, Field(ge=0)] = 100

    @property
    def name(self) -> str:
        """The name of the public data set, or `jsonl` for plain JSONL files."""
        return self.shape

    @property
    def origin(self) -> str:
        """The absolute path of the file or folder."""
        return str(self.path.absolute())

    @property
    def is_test_set(self) -> bool:
        """True for HumanEval, which consists only of test data."""
        return self.shape == "humaneval"

    def read(self) -> Splits:
        """Read the files. If rows are rejected, log how many rows are rejected for each reason.

        Raises:
            InputError: `readers.read_splits` describes the possible errors.
        """
        splits, rejections = readers.read_splits(self.path, self.shape, self.on_error, self.max_errors)
        counts: dict[str, int] = {}
        for rejection in rejections:
            counts[rejection.reason] = counts.get(rejection.reason, 0) + 1
        if rejections:
            reasons = ", ".join(f"{reason} ×{count}" for reason, count in sorted(counts.items()))
            log.warning("%s: skipped %d rows: %s", self.path, len(rejections), reasons)
        return splits

    def contents(self, splits: Splits) -> Contents:
        """Return the absolute paths and the hashes of the files."""
        files = readers.split_files(self.path.absolute()).items()
        return {name: {"source": str(file), "hash": hash_file(file)} for name, file in files}
