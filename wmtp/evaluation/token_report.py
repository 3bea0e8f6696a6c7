"""Token-level results at the end of a run: the file tokens.json, and a comparison of weights with the ground truth."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from wmtp.data.dataset import Dataset
from wmtp.data.split import TokenizedSplit
from wmtp.data.token_labels import first_decisive_tokens, has_token_labels, label_tokens
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import Hardware
from wmtp.evaluation.token_columns import fill_column
from wmtp.models.mtp import MtpModel
from wmtp.objectives.mtp import MtpObjective
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import TOKENS

REPORTED_METRICS = ("weight", "loss", "value")
"""Names of the metrics of a token in tokens.json."""
TOKEN_METRICS = (*REPORTED_METRICS, "unclipped_weight")
"""Names of all metrics of a token, in the order of the results of `MtpObjective.token_metrics`."""
NUM_TASKS = 3
"""Number of tasks in tokens.json. The file contains at most twice as many samples, which belong to these tasks."""
NUM_BINS = 10
"""Number of bins into which `calibration` divides the values."""


def measure_tokens(objective: MtpObjective, model: MtpModel, data: Dataset, hardware: Hardware) -> np.ndarray:
    """Return the metrics of all tokens of the validation split, shape [token, metric].

    The metrics are in the order of `TOKEN_METRICS`. If a token does not have a metric, the entry is NaN. All ranks must
    call this function.
    """
    split = data.validation
    measured = np.full((len(split.samples.tokens), len(TOKEN_METRICS)), np.nan, np.float32)
    model.eval()
    with torch.no_grad():
        fill_column(measured, split, data.tokenizer, hardware, lambda batch: objective.token_metrics(model, batch))
    return measured


def write_token_report(folder: Path, measured: np.ndarray, data: Dataset, step: int) -> None:
    """Write tokens.json, which contains samples of the first validation tasks, and the calibration of the values.

    `measured` is the result of `measure_tokens`, shape [token, metric]. `step` is the number of the last update.
    """
    split = data.validation
    tasks = set(split.tasks[np.sort(np.unique(split.tasks, return_index=True)[1])][:NUM_TASKS].tolist())
    indices = [index for index in range(len(split)) if split.tasks[index] in tasks][: 2 * NUM_TASKS]
    content = {
        "step": step,
        "split": split.name,
        "samples": describe_samples(split, data.tokenizer, measured, indices),
        "calibration": calibration(split, measured[:, TOKEN_METRICS.index("value")]),
    }
    replace_atomically(folder / TOKENS, encode_json(content))


def describe_samples(
    split: TokenizedSplit, tokenizer: Tokenizer, measured: np.ndarray, indices: list[int]
) -> list[dict[str, Any]]:
    """Return the samples of a split at the given indices as plain JSON values.

    Each sample contains the metrics of every token of its solution.
    """
    decisive, noise, _ = label_tokens(split, tokenizer)
    records = [split.records[split.samples.kept[index]] for index in indices]
    all_spans = tokenizer.character_spans([record.solution for record in records])
    samples = []
    for index, record, spans in zip(indices, records, all_spans, strict=True):
        first = int(split.samples.offsets[index] + split.samples.prompt_lengths[index])
        end, text_start, tokens = int(split.samples.offsets[index + 1]), 0, []
        for position, (_, stop) in zip(range(first, end), spans, strict=False):  # the end token has no text
            values = {name: _plain(x) for name, x in zip(REPORTED_METRICS, measured[position], strict=False)}
            label = "decisive" if decisive[position] else "noise" if noise[position] else None
            tokens.append({"text": record.solution[text_start:stop], **values, "truth": label})
            text_start = stop
        samples.append(
            {"task_id": record.task_id, "is_correct": record.is_correct, "prompt": record.prompt, "tokens": tokens}
        )
    return samples


def calibration(split: TokenizedSplit, values: np.ndarray) -> list[dict[str, float]]:
    """Divide the tokens of a split into bins by their value, and return statistics of the tokens in each bin.

    The statistics are the number of tokens, their mean value and their mean reward. The interval [0, 1] is divided into
    `NUM_BINS` bins of equal width. A value below 0 counts in the first bin, and a value above 1 counts in the last bin.
    Empty bins are left out. `values` has shape [token] and is NaN for tokens without a value.
    """
    rewards = np.repeat(split.rewards, split.samples.lengths)
    known = np.isfinite(values)
    bins = np.clip((values[known] * NUM_BINS).astype(int), 0, NUM_BINS - 1)
    values, rewards = values[known], rewards[known]
    return [
        {
            "low": number / NUM_BINS,
            "high": (number + 1) / NUM_BINS,
            "count": int((bins == number).sum()),
            "value": float(values[bins == number].mean()),
            "reward": float(rewards[bins == number].mean()),
        }
        for number in np.unique(bins).tolist()
    ]


def _plain(x: np.floating[Any]) -> float | None:
    return round(float(x), 4) if np.isfinite(x) else None


def weight_quality(weights: np.ndarray, data: Dataset) -> dict[str, float | None]:
    """Return measures of how well small weights identify harmful tokens, computed from the validation split.

    A token is compared only with tokens of the same solution:

    - `decisive_wrong_auc`: area under the ROC curve of the first decisive token of each wrong solution, at which the
      solution becomes wrong, against the other tokens of the solution. It is 1 if each first token has a lower weight
      than all other tokens, and about 0.5 for random weights.
    - `decisive_wrong_top1`: share of wrong solutions in which this first token has the lowest weight (see
      `share_of_top_scores`). For random weights, it is about 1 divided by the number of tokens of a solution.
    - `noise_auc`: area under the ROC curve of noise tokens against the other tokens, in all solutions.

    In the first two, the decisive tokens after the first one count as neither: after a mistake, the rest of an
    exchanged step can be predicted. Each measure is None if no solution has tokens to compare. The result is empty if
    the data has no ground truth or if all weights are equal. `weights` has shape [token]. They should not be clipped,
    because tokens with equal weights cannot be told apart.
    """
    split = data.validation
    if not has_token_labels(split):
        return {}
    decisive, noise, response = label_tokens(split, data.tokenizer)
    known = response & np.isfinite(weights)
    suspicion = -without_rounding_errors(weights)
    if not known.any() or np.ptp(suspicion[known]) == 0:
        return {}
    solutions = np.repeat(np.arange(len(split)), split.samples.lengths)
    first = first_decisive_tokens(decisive, split)
    compared = known & ~split.is_correct[solutions] & (first | ~decisive)
    return {
        "decisive_wrong_auc": area_under_roc(suspicion, first, compared, solutions),
        "decisive_wrong_top1": share_of_top_scores(suspicion, first, compared, solutions),
        "noise_auc": area_under_roc(suspicion, noise, known, solutions),
    }


def without_rounding_errors(weights: np.ndarray) -> np.ndarray:
    """Return weights rounded to 16 binary digits.

    The weight of a token is a mean over heads. Without this, equal weights of heads, such as those clipped to
    `weight_min`, would give means that differ in the last digit, and such ties would be decided by rounding errors.
    """
    mantissa, exponent = np.frexp(weights)
    rounded: np.ndarray = np.ldexp(np.round(mantissa * 2**16), exponent - 16)
    return rounded


def area_under_roc(scores: np.ndarray, positive: np.ndarray, mask: np.ndarray, groups: np.ndarray) -> float | None:
    """Return the probability that a positive token has a higher score than a negative token of the same group.

    A tie counts as half. The result is None if no group contains a positive and a negative token. Tokens of different
    groups (solutions) are not compared. If they were, weights that are randomly permuted within each solution would
    have a result above 0.5, because they still show which solutions contain much noise.

    Args:
        scores: the score of each token, shape [token].
        positive: True for positive tokens, shape [token].
        mask: True for the tokens to compare, shape [token].
        groups: the number of the group of each token, shape [token].
    """
    scores, positive, groups = scores[mask], positive[mask], groups[mask]
    order = np.argsort(groups, kind="stable")
    boundaries = np.flatnonzero(np.diff(groups[order])) + 1
    num_won, num_pairs = 0.0, 0
    for members in np.split(order, boundaries):
        count = int(positive[members].sum())
        ranks = rankdata(scores[members])[positive[members]]
        num_won += float(ranks.sum()) - count * (count + 1) / 2
        num_pairs += count * (len(members) - count)
    return num_won / num_pairs if num_pairs else None


def share_of_top_scores(scores: np.ndarray, positive: np.ndarray, mask: np.ndarray, groups: np.ndarray) -> float | None:
    """Return the share of groups in which the positive token has the highest score.

    If n tokens of a group have its highest score and the positive token is one of them, the group counts 1 / n. Groups
    without a positive token are left out. The result is None if no group has one.

    Args:
        scores: the score of each token, shape [token].
        positive: True for positive tokens, of which a group has at most one, shape [token].
        mask: True for the tokens to compare, shape [token].
        groups: the number of the group of each token, shape [token].
    """
    if not (positive & mask).any():
        return None
    highest = np.full(groups.max() + 1, -np.inf)
    np.maximum.at(highest, groups[mask], scores[mask])
    is_top = mask & (scores == highest[groups])
    num_top = np.bincount(groups[is_top], minlength=len(highest))
    chosen = groups[positive & mask]
    return float(np.mean(is_top[positive & mask] / num_top[chosen]))
