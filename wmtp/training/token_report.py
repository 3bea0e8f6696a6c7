"""tokens.json: some validation samples token by token, as the weighting and the values see them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from wmtp.data.dataset import Dataset
from wmtp.data.split import TokenizedSplit
from wmtp.data.token_labels import has_truth, token_truth
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import Hardware
from wmtp.models.mtp import MtpModel
from wmtp.objectives.mtp import MtpObjective
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import TOKENS
from wmtp.training.precompute import fill

MEASURES = ("weight", "loss", "value")
"""What is measured of a token, in the order of `MtpObjective.token_measures`."""
NUM_TASKS = 3
"""Tasks of which samples are shown, right and wrong ones."""
NUM_BINS = 10


def measure_tokens(objective: MtpObjective, model: MtpModel, data: Dataset, hardware: Hardware) -> np.ndarray:
    """[token, measure] of the validation split; NaN where there is none. All processes must ask."""
    split = data.validation
    measured = np.full((len(split.samples.tokens), len(MEASURES)), np.nan, np.float32)
    model.eval()
    with torch.no_grad():
        fill(measured, split, data.tokenizer, hardware, lambda batch: objective.token_measures(model, batch))
    return measured


def write_token_report(folder: Path, measured: np.ndarray, data: Dataset, step: int) -> None:
    """Write tokens.json: samples of the first tasks, and how well values foresee the rewards."""
    split = data.validation
    tasks = set(split.tasks[np.sort(np.unique(split.tasks, return_index=True)[1])][:NUM_TASKS].tolist())
    shown = [index for index in range(len(split)) if split.tasks[index] in tasks][: 2 * NUM_TASKS]
    content = {
        "step": step,
        "samples": described(split, data.tokenizer, measured, shown),
        "calibration": calibration(split, measured[:, MEASURES.index("value")]),
    }
    replace_atomically(folder / TOKENS, encode_json(content))


def described(
    split: TokenizedSplit, tokenizer: Tokenizer, measured: np.ndarray, indices: list[int]
) -> list[dict[str, Any]]:
    """Samples as plain values, with every token of their solutions."""
    decisive, noise, _ = token_truth(split, tokenizer)
    records = [split.records[split.samples.kept[index]] for index in indices]
    places = tokenizer.character_spans([record.solution for record in records])
    samples = []
    for index, record, spans in zip(indices, records, places, strict=True):
        first = int(split.samples.offsets[index] + split.samples.prompt_lengths[index])
        end, written, tokens = int(split.samples.offsets[index + 1]), 0, []
        for place, (_, stop) in zip(range(first, end), spans, strict=False):  # the end token has no text
            values = {name: _plain(x) for name, x in zip(MEASURES, measured[place], strict=True)}
            truth = "decisive" if decisive[place] else "noise" if noise[place] else None
            tokens.append({"text": record.solution[written:stop], **values, "truth": truth})
            written = stop
        samples.append(
            {"task_id": record.task_id, "is_correct": record.is_correct, "prompt": record.prompt, "tokens": tokens}
        )
    return samples


def calibration(split: TokenizedSplit, values: np.ndarray) -> list[dict[str, float]]:
    """Of the tokens whose value lies in each tenth of [0, 1]: how many, their mean value, and the mean reward."""
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
