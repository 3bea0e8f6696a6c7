"""How well an algorithm's weights find the tokens that are known to mislead, or to be noise."""

import numpy as np
import torch
from scipy.stats import rankdata

from wmtp.data.dataset import Dataset
from wmtp.data.split import TokenizedSplit
from wmtp.data.tokenization import Tokenizer
from wmtp.models.mtp import MtpModel
from wmtp.objectives.mtp import MtpObjective
from wmtp.runtime.hardware import Hardware
from wmtp.token_columns import fill


def weight_quality(
    objective: MtpObjective, model: MtpModel, data: Dataset, hardware: Hardware
) -> dict[str, float | None]:
    """Areas under the ROC curve of the negated weights, on the validation split; None where there is no truth.

    `decisive_wrong_auc` ranks the tokens of wrong solutions: a perfect weighting gives those that make them
    wrong the least weight. `noise_auc` ranks the tokens of all solutions, noise against the rest. 0.5 is chance.
    Nothing is said of weights that are all equal. All processes must ask; each measures some of the batches.
    """
    split = data.validation
    if not any(record.decisive or record.noise for record in split.records):
        return {}
    decisive, noise, response = token_truth(split, data.tokenizer)
    weights = np.zeros(len(split.samples.tokens), np.float32)
    model.eval()
    with torch.no_grad():
        fill(weights, split, data.tokenizer, hardware, lambda batch: objective.token_weights(model, batch))
    known = response & np.isfinite(weights)
    if not known.any() or np.ptp(weights[known]) == 0:
        return {}
    solutions = np.repeat(np.arange(len(split)), split.samples.lengths)
    wrong = ~split.is_correct[solutions]
    return {
        "decisive_wrong_auc": area_under_roc(-weights, decisive, known & wrong, solutions),
        "noise_auc": area_under_roc(-weights, noise, known, solutions),
    }


def area_under_roc(scores: np.ndarray, positive: np.ndarray, among: np.ndarray, groups: np.ndarray) -> float | None:
    """The chance that a positive scores above a negative of its group, ties counting half; None without such a pair.

    Only within a group, since a weighting permuted within solutions still says which solutions are noisy.
    """
    scores, positive, groups = scores[among], positive[among], groups[among]
    order = np.argsort(groups, kind="stable")
    borders = np.flatnonzero(np.diff(groups[order])) + 1
    won, pairs = 0.0, 0
    for members in np.split(order, borders):
        count = int(positive[members].sum())
        ranks = rankdata(scores[members])[positive[members]]
        won += float(ranks.sum()) - count * (count + 1) / 2
        pairs += count * (len(members) - count)
    return won / pairs if pairs else None


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
