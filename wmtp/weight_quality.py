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
    """
    split = data.validation
    decisive, noise, response = token_truth(split, data.tokenizer)
    if not decisive.any() and not noise.any():
        return {}
    weights = np.zeros(len(split.samples.tokens), np.float32)
    model.eval()
    with torch.no_grad():
        fill(weights, split, data.tokenizer, hardware, lambda batch: objective.token_weights(model, batch))
    known = response & np.isfinite(weights)
    wrong = np.repeat(~split.is_correct, split.samples.lengths)
    return {
        "decisive_wrong_auc": area_under_roc(-weights, decisive, known & wrong),
        "noise_auc": area_under_roc(-weights, noise, known),
    }


def area_under_roc(scores: np.ndarray, positive: np.ndarray, among: np.ndarray) -> float | None:
    """The chance that a positive scores above a negative, ties counting half; None without one of either."""
    positives, negatives = scores[among & positive], scores[among & ~positive]
    if not len(positives) or not len(negatives):
        return None
    count = len(positives)
    ranks = rankdata(np.concatenate([positives, negatives]))[:count]
    return float(ranks.sum() - count * (count + 1) / 2) / (count * len(negatives))


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
