"""Token-level reports at the end of a run: tokens.json, and how well the weights match the ground truth."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from wmtp.data.dataset import Dataset
from wmtp.data.split import TokenizedSplit
from wmtp.data.token_labels import has_token_labels, label_tokens
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import Hardware
from wmtp.models.mtp import MtpModel
from wmtp.objectives.mtp import MtpObjective
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import TOKENS
from wmtp.training.precompute import fill_column

TOKEN_METRICS = ("weight", "loss", "value")
"""Metrics of a token, in the order of `MtpObjective.token_metrics`."""
NUM_TASKS = 3
"""Number of tasks in tokens.json; each has a correct and an incorrect sample."""
NUM_BINS = 10
"""Number of bins of the calibration."""


def measure_tokens(objective: MtpObjective, model: MtpModel, data: Dataset, hardware: Hardware) -> np.ndarray:
    """Return the metrics of all tokens of the validation split, shape [token, metric], in the order `TOKEN_METRICS`.

    An entry is NaN if the token has no such metric. All ranks must call this function.
    """
    split = data.validation
    measured = np.full((len(split.samples.tokens), len(TOKEN_METRICS)), np.nan, np.float32)
    model.eval()
    with torch.no_grad():
        fill_column(measured, split, data.tokenizer, hardware, lambda batch: objective.token_metrics(model, batch))
    return measured


def write_token_report(folder: Path, measured: np.ndarray, data: Dataset, step: int) -> None:
    """Write tokens.json: samples of the first tasks, and the calibration of the values.

    `measured` has shape [token, metric], from `measure_tokens`; `step` is the number of the last update.
    """
    split = data.validation
    tasks = set(split.tasks[np.sort(np.unique(split.tasks, return_index=True)[1])][:NUM_TASKS].tolist())
    indices = [index for index in range(len(split)) if split.tasks[index] in tasks][: 2 * NUM_TASKS]
    content = {
        "step": step,
        "samples": describe_samples(split, data.tokenizer, measured, indices),
        "calibration": calibration(split, measured[:, TOKEN_METRICS.index("value")]),
    }
    replace_atomically(folder / TOKENS, encode_json(content))


def describe_samples(
    split: TokenizedSplit, tokenizer: Tokenizer, measured: np.ndarray, indices: list[int]
) -> list[dict[str, Any]]:
    """Return samples as plain JSON values, with the metrics of every token of their solutions."""
    decisive, noise, _ = label_tokens(split, tokenizer)
    records = [split.records[split.samples.kept[index]] for index in indices]
    all_spans = tokenizer.character_spans([record.solution for record in records])
    samples = []
    for index, record, spans in zip(indices, records, all_spans, strict=True):
        first = int(split.samples.offsets[index] + split.samples.prompt_lengths[index])
        end, text_start, tokens = int(split.samples.offsets[index + 1]), 0, []
        for position, (_, stop) in zip(range(first, end), spans, strict=False):  # the end token has no text
            values = {name: _plain(x) for name, x in zip(TOKEN_METRICS, measured[position], strict=True)}
            label = "decisive" if decisive[position] else "noise" if noise[position] else None
            tokens.append({"text": record.solution[text_start:stop], **values, "truth": label})
            text_start = stop
        samples.append(
            {"task_id": record.task_id, "is_correct": record.is_correct, "prompt": record.prompt, "tokens": tokens}
        )
    return samples


def calibration(split: TokenizedSplit, values: np.ndarray) -> list[dict[str, float]]:
    """Return count, mean value and mean reward of the tokens in each of `NUM_BINS` equal bins of the value.

    The bins divide [0, 1]; values outside count in the first or the last bin. `values` has shape [token].
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
    """Return how well small weights identify harmful tokens of the validation split, as areas under the ROC curve.

    The score of a token is its negated weight, and `weights` has shape [token]. For `decisive_wrong_auc`, the positives
    are the decisive tokens among the tokens of wrong solutions. For `noise_auc`, they are the noise tokens among the
    tokens of all solutions. 1 is perfect, 0.5 is chance. The result is empty if the data has no ground truth or if all
    weights are equal.
    """
    split = data.validation
    if not has_token_labels(split):
        return {}
    decisive, noise, response = label_tokens(split, data.tokenizer)
    known = response & np.isfinite(weights)
    if not known.any() or np.ptp(weights[known]) == 0:
        return {}
    solutions = np.repeat(np.arange(len(split)), split.samples.lengths)
    wrong = ~split.is_correct[solutions]
    return {
        "decisive_wrong_auc": area_under_roc(-weights, decisive, known & wrong, solutions),
        "noise_auc": area_under_roc(-weights, noise, known, solutions),
    }


def area_under_roc(scores: np.ndarray, positive: np.ndarray, mask: np.ndarray, groups: np.ndarray) -> float | None:
    """Return the probability that a positive has a higher score than a negative of its group; ties count as half.

    The result is None if there is no such pair. Pairs are formed only within a group (a solution): without groups,
    weights that are permuted within each solution would score above chance, because they still show which solutions
    are noisy.

    Args:
        scores: scores, shape [token].
        positive: True at positives, shape [token].
        mask: True at the tokens to compare, shape [token].
        groups: the group of each token, shape [token].
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
