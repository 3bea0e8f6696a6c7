"""Write tokens.json: weights, losses and values of the tokens of some validation samples."""

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
"""Number of tasks whose correct and incorrect samples are shown."""
NUM_BINS = 10


def measure_tokens(objective: MtpObjective, model: MtpModel, data: Dataset, hardware: Hardware) -> np.ndarray:
    """Return the metrics of all tokens of the validation split, with shape [token, metric].

    NaN where a token has no such metric. All ranks must call this function.
    """
    split = data.validation
    measured = np.full((len(split.samples.tokens), len(TOKEN_METRICS)), np.nan, np.float32)
    model.eval()
    with torch.no_grad():
        fill_column(measured, split, data.tokenizer, hardware, lambda batch: objective.token_metrics(model, batch))
    return measured


def write_token_report(folder: Path, measured: np.ndarray, data: Dataset, step: int) -> None:
    """Write tokens.json: samples of the first tasks, and the calibration of the values."""
    split = data.validation
    tasks = set(split.tasks[np.sort(np.unique(split.tasks, return_index=True)[1])][:NUM_TASKS].tolist())
    shown = [index for index in range(len(split)) if split.tasks[index] in tasks][: 2 * NUM_TASKS]
    content = {
        "step": step,
        "samples": describe_samples(split, data.tokenizer, measured, shown),
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
        end, written, tokens = int(split.samples.offsets[index + 1]), 0, []
        for position, (_, stop) in zip(range(first, end), spans, strict=False):  # the end token has no text
            values = {name: _plain(x) for name, x in zip(TOKEN_METRICS, measured[position], strict=True)}
            truth = "decisive" if decisive[position] else "noise" if noise[position] else None
            tokens.append({"text": record.solution[written:stop], **values, "truth": truth})
            written = stop
        samples.append(
            {"task_id": record.task_id, "is_correct": record.is_correct, "prompt": record.prompt, "tokens": tokens}
        )
    return samples


def calibration(split: TokenizedSplit, values: np.ndarray) -> list[dict[str, float]]:
    """Return count, mean value and mean reward of the tokens whose value is in each tenth of [0, 1]."""
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
    """Return areas under the ROC curve of the negated weights on the validation split.

    `decisive_wrong_auc` ranks the tokens of wrong solutions: a perfect weighting gives the tokens that make them
    wrong the smallest weights. `noise_auc` ranks the tokens of all solutions: noise against the rest. 0.5 is chance.
    The result is empty if the data has no ground truth or if all weights are equal.
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


def area_under_roc(scores: np.ndarray, positive: np.ndarray, among: np.ndarray, groups: np.ndarray) -> float | None:
    """Return the probability that a positive scores above a negative of its group, with ties counted as half.

    None if there is no such pair. Pairs are formed only within a group, because weights that are permuted within each
    solution still show which solutions are noisy.
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
