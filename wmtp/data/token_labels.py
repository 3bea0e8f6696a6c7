"""Ground truth that identifies two kinds of tokens: noise, and tokens that decide whether a solution is correct."""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from operator import itemgetter

import numpy as np

from wmtp.data.split import TokenizedSplit
from wmtp.data.tokenizer import Tokenizer


def label_tokens(split: TokenizedSplit, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return three boolean masks over the tokens in `split.samples.tokens`.

    The masks mark the decisive tokens, the noise tokens, and all tokens of solutions. If the split has a correct solution
    to the same task, the decisive tokens of an incorrect solution begin with the first token that differs.
    """
    decisive, noise, response = (np.zeros(len(split.samples.tokens), bool) for _ in range(3))
    records = [split.records[index] for index in split.samples.kept]
    firsts = (split.samples.offsets[:-1] + split.samples.prompt_lengths).tolist()
    ends = split.samples.offsets[1:].tolist()
    token_spans = tokenizer.character_spans([record.solution for record in records])
    for record, spans, first, end in zip(records, token_spans, firsts, ends, strict=True):
        response[first:end] = True
        for mask, ranges in ((decisive, record.decisive), (noise, record.noise)):
            for start, stop in ranges:  # the tokens [begin, after) overlap the range; they are in ascending order
                begin = first + bisect_right(spans, start, key=itemgetter(1))
                after = first + bisect_left(spans, stop, key=itemgetter(0))
                mask[begin : min(after, end)] = True  # the end of a solution may be cut
    _begin_at_first_difference(decisive, noise, split)
    return decisive, noise, response


def _begin_at_first_difference(decisive: np.ndarray, noise: np.ndarray, split: TokenizedSplit) -> None:
    """Let the decisive tokens of each incorrect solution begin with the first token that differs from a correct one.

    The range of characters in a record does not determine this token: ` 11` and ` 10` can have one token, or a common
    first token. The correct solution is the one to the same task with the longest common beginning, without noise. If
    the first difference is not in the first decisive range or next to it, the solutions are too different to compare.
    """
    samples = split.samples
    bounds = list(zip(samples.offsets[:-1] + samples.prompt_lengths, samples.offsets[1:], strict=True))
    correct: dict[int, list[list[int]]] = {}
    for index in np.flatnonzero(split.is_correct):
        first, end = bounds[index]
        correct.setdefault(int(split.tasks[index]), []).append(samples.tokens[first:end][~noise[first:end]].tolist())
    for index in np.flatnonzero(~split.is_correct):
        first, end = bounds[index]
        labelled = first + np.flatnonzero(decisive[first:end])
        others = correct.get(int(split.tasks[index]))
        if not len(labelled) or not others:
            continue
        positions = first + np.flatnonzero(~noise[first:end])
        tokens = samples.tokens[positions].tolist()
        common = max(_common_length(tokens, other) for other in others)
        if common < len(positions) and labelled[0] - 1 <= positions[common] <= labelled[-1]:
            decisive[labelled[0] : positions[common]] = False
            decisive[positions[common]] = True


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


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


def label_shares(split: TokenizedSplit, tokenizer: Tokenizer) -> dict[str, float]:
    """Return the shares of four kinds of tokens among all tokens of solutions, which sum to 1.

    - `noise`: noise tokens.
    - `decisive_correct`: decisive tokens of correct solutions.
    - `decisive_incorrect`: the first decisive token of each incorrect solution, at which it becomes wrong.
    - `other`: all other tokens.

    The result is empty if no token has a label.
    """
    if not has_token_labels(split):
        return {}
    return shares_of_masks(*label_tokens(split, tokenizer), split)


def shares_of_masks(
    decisive: np.ndarray, noise: np.ndarray, response: np.ndarray, split: TokenizedSplit
) -> dict[str, float]:
    """Return the shares of `label_shares` for the masks of `label_tokens`. A token with two labels counts as noise."""
    wrong = np.repeat(~split.is_correct, split.samples.lengths)
    masks = {
        "noise": noise,
        "decisive_correct": decisive & ~noise & ~wrong,
        "decisive_incorrect": first_decisive_tokens(decisive, split) & ~noise & wrong,
    }
    total = int(response.sum())
    shares = {name: int(mask.sum()) / total for name, mask in masks.items()}
    return shares | {"other": 1 - sum(shares.values())}
