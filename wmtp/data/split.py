"""The selected and tokenized records of one split, with optional arrays that have one entry per token."""

import hashlib
import logging
from pathlib import Path

import numpy as np

from wmtp.data.records import Record
from wmtp.data.selection import add_mismatched, select
from wmtp.data.sources import DataSource
from wmtp.data.token_cache import TokenizedRecords, cached_tokens

log = logging.getLogger(__name__)


class TokenizedSplit:
    """The selected and tokenized records of one split.

    `rewards` contains one number per sample. If the run uses a reward model, it is the score of the model. Otherwise,
    it is 1 for a correct solution, and 0 for an incorrect solution. `reference_losses`, `hidden_states` and `harmful`
    are arrays with one entry per token of `samples.tokens`. They are None until they are computed.
    """

    def __init__(
        self, name: str, records: list[Record], source: DataSource, n_samples: int | None, cache: Path
    ) -> None:
        if source.mismatched and records:
            records = add_mismatched(records, source.seed)
        if source.curated:
            records = [record for record in records if record.is_correct and not record.noise]
        self.name = name
        self.records = select(records, source.selection(n_samples)) if records else []
        self.record_ids = [f"{record.task_id}#{i}" for i, record in enumerate(self.records)]
        self.samples: TokenizedRecords = cached_tokens(
            self.records, source.tokenizer, source.template, source.max_length, source.long_samples, cache
        )
        kept = [self.records[index] for index in self.samples.kept]
        numbers = {task: number for number, task in enumerate(dict.fromkeys(record.task_id for record in kept))}
        self.tasks = np.asarray([numbers[record.task_id] for record in kept], np.int64)
        self.is_correct = np.asarray([record.is_correct for record in kept], bool)
        self.rewards = self.is_correct.astype(np.float32)
        self.reference_losses: np.ndarray | None = None
        self.hidden_states: np.ndarray | None = None
        self.harmful: np.ndarray | None = None
        if self.samples.num_long:
            action = "dropped" if source.long_samples == "drop" else "cut at the end of the solution"
            log.warning(
                "%s: %d of %d samples are longer than data.max_length=%d and were %s",
                name, self.samples.num_long, len(self.records), source.max_length, action,
            )  # fmt: skip

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
