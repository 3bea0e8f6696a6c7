"""Tests of the oracle: its token labels and its weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Invoke, tiny_model
from wmtp.algorithms.base import Observations
from wmtp.algorithms.oracle import Oracle
from wmtp.algorithms.uniform import Uniform
from wmtp.data.collate import collate
from wmtp.data.dataset import Dataset, read_dataset
from wmtp.data.records import Record
from wmtp.data.sources import TaskSource
from wmtp.data.split import TokenizedSplit, build_split
from wmtp.data.token_labels import harmful_tokens
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import Hardware
from wmtp.evaluation.token_report import TOKEN_METRICS, calibration, describe_samples, measure_tokens, weight_quality
from wmtp.objectives.mtp import MtpObjective

CPU = Hardware(device="cpu")


@pytest.fixture(scope="module")
def noisy_data(tokenizer: Tokenizer, cache: Path) -> Dataset:
    """Return a data set of correct and incorrect solutions, half of them with noise."""
    source = TaskSource(
        tokenizer=tokenizer, num_train=8, num_validation=12, num_test=1, difficulties={1: 1, 2: 1}, noise=0.5
    )
    return read_dataset(source, cache, seed=0)


def text_of(split: TokenizedSplit, tokenizer: Tokenizer, index: int, chosen: np.ndarray) -> str:
    """Return the concatenated text of the chosen tokens of a sample."""
    first, end = split.samples.offsets[index : index + 2]
    return tokenizer.decode([int(t) for t in split.samples.tokens[first:end][chosen[first:end]]])


def test_noise_and_decisive_tokens_of_wrong_solutions_are_harmful(tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = "def run(x):\n    return x + 17\n# id: 00417\n"
    decisive, noise = (text.index("17"), text.index("17") + 2), (text.index("00417"), text.index("00417") + 5)
    records = [
        Record(task_id="a", prompt="Say", solution=text, is_correct=right, decisive=(decisive,), noise=(noise,))
        for right in (True, False)
    ]
    source = TaskSource(tokenizer=tokenizer, difficulties={1: 1})
    split = build_split("train", records, source, None, tmp_path)
    harmful = harmful_tokens(split, tokenizer)
    text_by_correctness = {
        bool(split.is_correct[index]): text_of(split, tokenizer, index, harmful).replace(" ", "") for index in (0, 1)
    }
    assert "00417" in text_by_correctness[True] and "17" not in text_by_correctness[True].replace("00417", "")
    assert "17" in text_by_correctness[False].replace("00417", "") and "00417" in text_by_correctness[False]


def test_weight_of_a_harmful_token_reaches_every_head() -> None:
    harmful = torch.tensor([[False, False, True, False]])
    observed = Observations(torch.ones(2, 1, 4) > 0, torch.ones(1, 4) > 0, harmful=harmful)
    weights = Oracle(misleading_weight=0.25).weights(observed)
    assert weights[:, 0, :2].tolist() == [[1.0, 0.25], [0.25, 1.0]]
    assert Uniform().weights(observed)[:, 0, :2].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_oracle_weights_find_all_harmful_tokens(noisy_data: Dataset) -> None:
    measured = measure_tokens(MtpObjective(Oracle()), tiny_model(), noisy_data, CPU)
    weights = measured[:, TOKEN_METRICS.index("weight")]
    known = np.isfinite(weights)
    assert noisy_data.validation.harmful is not None
    harmful = noisy_data.validation.harmful[known]
    assert (weights[known][harmful] == 0).all() and (weights[known][~harmful] > 0).all()
    assert weight_quality(weights, noisy_data)["noise_auc"] > 0.95  # type: ignore[operator]


def test_token_labels_reach_the_batch(noisy_data: Dataset) -> None:
    split = noisy_data.validation
    batch = collate(split, [3, 1], noisy_data.tokenizer.padding)
    assert batch.harmful is not None and batch.harmful.dtype == torch.bool and split.harmful is not None
    for row, index in enumerate((3, 1)):
        first, end = split.samples.offsets[index : index + 2]
        assert batch.harmful[row, : end - first].tolist() == split.harmful[first:end].tolist()
        assert not batch.harmful[row, end - first :].any()


def test_data_without_token_labels_is_rejected(invoke: Invoke, tmp_path: Path) -> None:
    lines = [f'{{"task_id": "{n}", "prompt": "Say {n}", "solution": "print({n})\\n"}}' for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    outcome = invoke("algo=oracle", "data=jsonl", "data.path=a.jsonl", "model=nano", "num_samples=0",
                     "num_validation_samples=0", tiny=False)  # fmt: skip
    assert outcome.code == 2 and "no record has decisive or noise spans, which algo=oracle needs" in outcome.err


# tokens.json


def test_tokens_in_tokens_json_concatenate_to_the_solution_and_have_the_measured_values(noisy_data: Dataset) -> None:
    measured = np.arange(3 * len(noisy_data.validation.samples.tokens), dtype=np.float32).reshape(-1, 3)
    samples = describe_samples(noisy_data.validation, noisy_data.tokenizer, measured, [4, 0])
    for index, sample in zip((4, 0), samples, strict=True):
        record = noisy_data.validation.records[noisy_data.validation.samples.kept[index]]
        assert "".join(token["text"] for token in sample["tokens"]) == record.solution
        first = noisy_data.validation.samples.offsets[index] + noisy_data.validation.samples.prompt_lengths[index]
        assert [token["weight"] for token in sample["tokens"]] == [
            measured[first + n, 0] for n in range(len(sample["tokens"]))
        ]
        known = {token["truth"] for token in sample["tokens"]}
        assert "decisive" in known and ("noise" in known) == bool(record.noise)


def test_calibration_compares_values_with_the_share_of_correct_solutions(noisy_data: Dataset) -> None:
    split = noisy_data.validation
    values = np.full(len(split.samples.tokens), np.nan, np.float32)
    values[:40], values[40:60] = 0.52, 1.7
    bins = calibration(split, values)
    rewards = np.repeat(split.rewards, split.samples.lengths)
    assert [(entry["low"], entry["count"]) for entry in bins] == [(0.5, 40), (0.9, 20)]
    assert bins[0]["reward"] == pytest.approx(rewards[:40].mean()) and bins[0]["value"] == pytest.approx(0.52)
    assert calibration(split, np.full_like(values, np.nan)) == []
