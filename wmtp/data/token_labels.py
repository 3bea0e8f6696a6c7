"""Ground truth that identifies two kinds of tokens: noise, and tokens that decide whether a solution is correct."""

import numpy as np

from wmtp.data.split import TokenizedSplit
from wmtp.data.tokenizer import Tokenizer


def label_tokens(split: TokenizedSplit, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return three boolean masks over the tokens in `split.samples.tokens`.

    The masks mark the decisive tokens, the noise tokens, and all tokens of solutions.
    """
    decisive, noise, response = (np.zeros(len(split.samples.tokens), bool) for _ in range(3))
    records = [split.records[index] for index in split.samples.kept]
    token_spans = tokenizer.character_spans([record.solution for record in records])
    for index, (record, spans) in enumerate(zip(records, token_spans, strict=True)):
        first = split.samples.offsets[index] + split.samples.prompt_lengths[index]
        end = split.samples.offsets[index + 1]
        response[first:end] = True
        for position, (start, stop) in zip(range(first, end), spans, strict=False):  # the end token has no span
            decisive[position] = any(start < b and a < stop for a, b in record.decisive)
            noise[position] = any(start < b and a < stop for a, b in record.noise)
    return decisive, noise, response


def harmful_tokens(split: TokenizedSplit, tokenizer: Tokenizer) -> np.ndarray:
    """Return a boolean mask over the tokens in `split.samples.tokens`.

    The mask is True for noise tokens, and for decisive tokens of incorrect solutions.
    """
    decisive, noise, _ = label_tokens(split, tokenizer)
    wrong = np.repeat(~split.is_correct, split.samples.lengths)
    harmful: np.ndarray = noise | (decisive & wrong)
    return harmful


def first_decisive_tokens(decisive: np.ndarray, split: TokenizedSplit) -> np.ndarray:
    """Return a boolean mask over the tokens in `split.samples.tokens`.

    The mask is True at the first decisive token of each solution that has one. In an incorrect solution, this is the
    token at which the solution becomes wrong; the decisive tokens after it only continue the mistake. `decisive` is the
    mask of `label_tokens`.
    """
    positions = np.flatnonzero(decisive)
    solutions = np.repeat(np.arange(len(split)), split.samples.lengths)[positions]
    first = np.zeros(len(decisive), bool)
    first[positions[np.unique(solutions, return_index=True)[1]]] = True
    return first


def has_token_labels(split: TokenizedSplit) -> bool:
    """Return whether any record of the split has character ranges that are marked as decisive or as noise."""
    return any(record.decisive or record.noise for record in split.records)
