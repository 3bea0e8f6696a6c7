"""The selected and tokenized records of one split, with optional arrays that have one entry per token."""

import hashlib
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from wmtp.data.records import Record
from wmtp.data.selection import add_mismatched, select
from wmtp.data.sources import DataSource
from wmtp.data.token_cache import TokenizedRecords, cached_tokens
from wmtp.errors import InputError

log = logging.getLogger(__name__)

TOKEN_COLUMNS = ("reference_losses", "hidden_states", "harmful")
"""The names of the optional arrays of a `TokenizedSplit` that have one entry per token."""
ADDED_COLUMNS = ("rewards", *TOKEN_COLUMNS)
"""The names of the arrays that `TokenizedSplit.with_columns` may set."""


@dataclass(frozen=True, eq=False, repr=False)
class TokenizedSplit:
    """The selected and tokenized records of one split. It cannot be changed, and its arrays are read-only.

    `tasks`, `is_correct` and `rewards` have one entry per sample. If the run uses a reward model, the reward is the
    score of the model. Otherwise, it is 1 for a correct solution, and 0 for an incorrect solution. `reference_losses`,
    `hidden_states` and `harmful` have one entry per token of `samples.tokens`, which is a row in the first two. They
    are None unless they were added.
    """

    name: str
    records: tuple[Record, ...]
    record_ids: tuple[str, ...]
    samples: TokenizedRecords
    tasks: np.ndarray
    is_correct: np.ndarray
    rewards: np.ndarray
    reference_losses: np.ndarray | None = None
    hidden_states: np.ndarray | None = None
    harmful: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Check the lengths of the arrays, and make them read-only.

        Raises:
            ValueError: an array does not have one entry per sample or per token.
        """
        for name in ("tasks", "is_correct", *ADDED_COLUMNS):
            column: np.ndarray | None = getattr(self, name)
            if column is None:
                continue
            count, unit = (len(self.samples.tokens), "tokens") if name in TOKEN_COLUMNS else (len(self), "samples")
            if len(column) != count:
                raise ValueError(f"{self.name}.{name} has {len(column)} entries for {count} {unit}")
            column.flags.writeable = False

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def fingerprint(self) -> str:
        """A hash of the tokens, of the lengths of samples and prompts, and of the correctness of each sample."""
        samples = self.samples
        digest = hashlib.sha256()
        for array in (samples.tokens, samples.offsets, samples.prompt_lengths, self.is_correct):
            digest.update(array.tobytes())
        return digest.hexdigest()

    @property
    def targets(self) -> np.ndarray:
        """A boolean mask over `samples.tokens`: the tokens of solutions, without the first token of a sample.

        No head predicts the first token.
        """
        samples = self.samples
        position = np.arange(len(samples.tokens)) - np.repeat(samples.offsets[:-1], samples.lengths)
        mask: np.ndarray = position >= np.repeat(np.maximum(samples.prompt_lengths, 1), samples.lengths)
        return mask

    def with_columns(self, **columns: np.ndarray) -> "TokenizedSplit":
        """Return a split that also has the given columns, which replace its columns of the same name.

        The given arrays become read-only. `ADDED_COLUMNS` lists the possible names.

        Raises:
            ValueError: no column has this name, or a column does not have one entry per sample or per token.
        """
        if unknown := columns.keys() - set(ADDED_COLUMNS):
            raise ValueError(f"{', '.join(sorted(unknown))}: not one of the columns {', '.join(ADDED_COLUMNS)}")
        return replace(self, **columns)  # type: ignore[arg-type]

    def first(self, count: int) -> "TokenizedSplit":
        """Return a split with the first `count` samples of this split, or with all if it has fewer."""
        offsets = self.samples.offsets[: count + 1]
        tokens = slice(offsets[-1])
        samples = replace(
            self.samples,
            tokens=self.samples.tokens[tokens],
            offsets=offsets,
            prompt_lengths=self.samples.prompt_lengths[:count],
            kept=self.samples.kept[:count],
        )
        columns = {name: getattr(self, name) for name in ("tasks", "is_correct", *ADDED_COLUMNS)}
        parts = {
            name: column[tokens if name in TOKEN_COLUMNS else slice(count)]
            for name, column in columns.items()
            if column is not None
        }
        return replace(self, samples=samples, **parts)


def build_split(
    name: str, records: list[Record], source: DataSource, n_samples: int | None, cache: Path
) -> TokenizedSplit:
    """Select and tokenize records with the settings of a source, and return them as a split.

    If `n_samples` is None, as many records as possible are selected. The tokens are cached in the folder `cache`.

    Raises:
        InputError: the selection is impossible, or the cached tokens cannot be read.
    """
    if source.mismatched and records:
        records = add_mismatched(records, source.seed)
    if source.curated:
        records = [record for record in records if record.is_correct and not record.noise]
    try:
        records = select(records, source.selection(n_samples)) if records else []
    except InputError as error:
        raise InputError(f"{error} (the {name} split has {len(records)} records)") from error
    samples = cached_tokens(records, source.tokenizer, source.template, source.max_length, source.long_samples, cache)
    if samples.num_long:
        action = "dropped" if source.long_samples == "drop" else "cut at the end of the solution"
        log.warning(
            "%s: %d of %d samples are longer than data.max_length=%d and were %s",
            name, samples.num_long, len(records), source.max_length, action,
        )  # fmt: skip
    kept = [records[index] for index in samples.kept]
    numbers = {task: number for number, task in enumerate(dict.fromkeys(record.task_id for record in kept))}
    is_correct = np.asarray([record.is_correct for record in kept], bool)
    return TokenizedSplit(
        name,
        records=tuple(records),
        record_ids=tuple(f"{record.task_id}#{i}" for i, record in enumerate(records)),
        samples=samples,
        tasks=np.asarray([numbers[record.task_id] for record in kept], np.int64),
        is_correct=is_correct,
        rewards=is_correct.astype(np.float32),
    )
