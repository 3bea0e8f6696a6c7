"""What is known of tokens for certain: which make a solution what it is, and which are noise."""

import numpy as np

from wmtp.data.split import TokenizedSplit
from wmtp.data.tokenizer import Tokenizer


def token_truth(split: TokenizedSplit, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every token of a split: does it overlap a decisive span, does it overlap noise, is it of a solution."""
    decisive, noise, response = (np.zeros(len(split.samples.tokens), bool) for _ in range(3))
    records = [split.records[index] for index in split.samples.kept]
    places = tokenizer.character_spans([record.solution for record in records])
    for index, (record, spans) in enumerate(zip(records, places, strict=True)):
        first = split.samples.offsets[index] + split.samples.prompt_lengths[index]
        end = split.samples.offsets[index + 1]
        response[first:end] = True
        for place, (start, stop) in zip(range(first, end), spans, strict=False):  # the end token has no place
            decisive[place] = any(start < b and a < stop for a, b in record.decisive)
            noise[place] = any(start < b and a < stop for a, b in record.noise)
    return decisive, noise, response


def misleading_tokens(split: TokenizedSplit, tokenizer: Tokenizer) -> np.ndarray:
    """For every token of a split: is it noise, or what makes a wrong solution wrong."""
    decisive, noise, _ = token_truth(split, tokenizer)
    wrong = np.repeat(~split.is_correct, split.samples.lengths)
    misleading: np.ndarray = noise | (decisive & wrong)
    return misleading


def has_truth(split: TokenizedSplit) -> bool:
    """Whether anything is known of the split's tokens."""
    return any(record.decisive or record.noise for record in split.records)
