"""Tokenization of records. The result is cached on disk under a hash of everything that determines the tokens."""

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
from wmtp.runtime.atomic_files import share_like_folder

FORMAT = 2
"""The version of the format of the cached files. It is a part of the cache key."""
LongSamples = Literal["drop", "cut"]


@dataclass(frozen=True)
class TokenizedRecords:
    """The tokens of records, concatenated in one array. The arrays are read-only.

    Sample i contains the tokens `tokens[offsets[i] : offsets[i + 1]]` of the record with the index `kept[i]`. The first
    `prompt_lengths[i]` tokens of the sample are the prompt. `num_long` is the number of records with more than
    `max_length` tokens. These records were dropped, or their solutions were cut.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    kept: np.ndarray
    num_long: int

    def __post_init__(self) -> None:
        """Make the arrays read-only."""
        for array in (self.tokens, self.offsets, self.prompt_lengths, self.kept):
            array.flags.writeable = False

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


def texts_fingerprint(records: list[Record]) -> str:
    """Return a hash of the texts of records that are tokenized. Their tests, which may be large, are left out."""
    digest = hashlib.sha256()
    for record in records:
        for text in (record.prompt, record.solution):
            encoded = text.encode()
            digest.update(b"%d " % len(encoded) + encoded)
    return digest.hexdigest()


def tokenize(
    records: list[Record], tokenizer: Tokenizer, template: str, max_length: int, long_samples: LongSamples
) -> TokenizedRecords:
    """Tokenize the prompt and the solution of each record separately. The end token is appended to each solution.

    `template` contains `{prompt}`, which is replaced by the prompt of the record. Only the template can name special
    tokens (see `Tokenizer`). If a record has more than
    `max_length` tokens and `long_samples` is "drop", the record is dropped. If `long_samples` is "cut", the end of its
    solution is cut. A record is also dropped if its prompt leaves no room for a solution.
    """
    prompts = tokenizer.encode_prompts(template, [record.prompt for record in records])
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
    """Return the result of `tokenize`. If the cache contains a result for equal arguments, it is read from the cache.

    Otherwise, the result is computed and written to the cache.

    Raises:
        InputError: the cached file cannot be read or written.
    """
    encoding = [tokenizer.fingerprint, tokenizer.prefix, template]
    key = [FORMAT, texts_fingerprint(records), *encoding, max_length, long_samples]
    path = cache_dir / f"tokens-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.safetensors"
    if path.exists():
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot read the token cache ({error}); delete this file") from error
        num_long = int(arrays.pop("num_long")[0])
        return TokenizedRecords(**arrays, num_long=num_long)
    result = tokenize(records, tokenizer, template, max_length, long_samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(vars(result) | {"num_long": np.asarray([result.num_long])}, staged)
        share_like_folder(staged)
        os.replace(staged, path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: cannot be written: {error}; choose another folder with cache_dir=DIR") from error
    finally:
        staged.unlink(missing_ok=True)
    return result
