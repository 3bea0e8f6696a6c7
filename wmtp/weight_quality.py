"""How well an algorithm's weights find the tokens that are known to mislead, or to be noise."""

import numpy as np
from scipy.stats import rankdata

from wmtp.data.dataset import Dataset
from wmtp.data.truth import has_truth, token_truth


def weight_quality(weights: np.ndarray, data: Dataset) -> dict[str, float | None]:
    """Areas under the ROC curve of the negated weights, on the validation split; empty where there is no truth.

    `decisive_wrong_auc` ranks the tokens of wrong solutions: a perfect weighting gives those that make them
    wrong the least weight. `noise_auc` ranks the tokens of all solutions, noise against the rest. 0.5 is chance.
    Nothing is said of weights that are all equal.
    """
    split = data.validation
    if not has_truth(split):
        return {}
    decisive, noise, response = token_truth(split, data.tokenizer)
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
