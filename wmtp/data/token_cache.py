"""Tokenization of records, cached on disk under a hash of everything that determines the tokens."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from wmtp.data.records import Record
from wmtp.data.tokenizer import Tokenizer
from wmtp.errors import InputError

FORMAT = 1
"""Version of the cached files; a part of the cache key."""
LongSamples = Literal["drop", "cut"]


@dataclass(frozen=True)
class TokenizedRecords:
    """The tokens of the records that fit, concatenated in one array.

    Sample i is record `kept[i]`, with the tokens `tokens[offsets[i] : offsets[i + 1]]`; the first `prompt_lengths[i]`
    of them are the prompt. `num_long` counts records longer than `max_length`, which were dropped or cut.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    kept: np.ndarray
    num_long: int

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each sample."""
        return np.diff(self.offsets)


def records_fingerprint(records: list[Record]) -> str:
    """Return a hash of all fields of the records."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(record.model_dump_json().encode() + b"\n")
    return digest.hexdigest()


def tokenize(
    records: list[Record], tokenizer: Tokenizer, template: str, max_length: int, long_samples: LongSamples
) -> TokenizedRecords:
    """Tokenize prompts and solutions separately; each solution ends with the tokenizer's end token.

    A record of more than `max_length` tokens is dropped. If `long_samples` is "cut", the end of its solution is cut
    instead, unless its prompt leaves no room for a solution.
    """
    prompts = tokenizer.encode([template.replace("{prompt}", record.prompt) for record in records])
    solutions = tokenizer.encode([record.solution for record in records])
    tokens: list[int] = []
    offsets, prompt_lengths, kept, num_long = [0], [], [], 0
    for index, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        sample = [*prompt, *solution, tokenizer.end]
        if len(sample) > max_length:
            num_long += 1
            if long_samples == "drop" or len(prompt) >= max_length:
                continue
            sample = sample[:max_length]
        tokens += sample
        offsets.append(len(tokens))
        prompt_lengths.append(len(prompt))
        kept.append(index)
    return TokenizedRecords(
        np.asarray(tokens, np.int32), np.asarray(offsets, np.int64), np.asarray(prompt_lengths, np.int32),
        np.asarray(kept, np.int64), num_long,
    )  # fmt: skip


def cached_tokens(
    records: list[Record],
    tokenizer: Tokenizer,
    template: str,
    max_length: int,
    long_samples: LongSamples,
    cache_dir: Path,
) -> TokenizedRecords:
    """Return the result of `tokenize`, from the cache on disk if it contains one for equal arguments.

    Raises:
        InputError: the cached file cannot be read.
    """
    key = [FORMAT, records_fingerprint(records), tokenizer.fingerprint, template, max_length, long_samples]
    path = cache_dir / f"tokens-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        try:
            arrays = load_file(path)
        except SafetensorError as error:
            raise InputError(f"{path}: cannot read the token cache ({error}); delete this file") from error
        num_long = int(arrays.pop("num_long")[0])
        return TokenizedRecords(**arrays, num_long=num_long)
    result = tokenize(records, tokenizer, template, max_length, long_samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(vars(result) | {"num_long": np.asarray([result.num_long])}, staged)
    os.replace(staged, path)
    return result
