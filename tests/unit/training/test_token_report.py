"""Tests of the quality of weights: area under the ROC curve, token labels, and weights of known quality."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from tests.conftest import tiny_model
from wmtp.algorithms.base import Algorithm
from wmtp.algorithms.controls import Random, Shuffled
from wmtp.algorithms.excess_loss import ExcessLoss
from wmtp.algorithms.uniform import Uniform
from wmtp.data.dataset import Dataset, read_dataset
from wmtp.data.records import Record
from wmtp.data.sources import TaskSource
from wmtp.data.split import TokenizedSplit, build_split
from wmtp.data.token_labels import label_tokens
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import Hardware
from wmtp.objectives.mtp import MtpObjective
from wmtp.training.token_report import TOKEN_METRICS, area_under_roc, measure_tokens, weight_quality

CPU = Hardware(device="cpu")


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans(), st.integers(0, 2)), min_size=1, max_size=60))
def test_the_area_equals_that_of_scikit_learn_within_groups_also_with_ties(
    rows: list[tuple[int, bool, bool, int]],
) -> None:
    scores, positive, among, groups = (np.array(column) for column in zip(*rows, strict=True))
    got = area_under_roc(scores.astype(np.float32) / 3, positive, among, groups)
    areas, pairs = [], []
    for group in range(3):
        truth, chosen = positive[among & (groups == group)], scores[among & (groups == group)]
        if truth.any() and not truth.all():
            areas.append(roc_auc_score(truth, chosen))
            pairs.append(truth.sum() * (~truth).sum())
    assert got is None if not areas else got == pytest.approx(np.average(areas, weights=pairs))


def test_ties_count_half() -> None:
    scores, positive, among = np.array([1.0, 1, 2, 0]), np.array([True, False, True, False]), np.ones(4, bool)
    assert area_under_roc(scores, positive, among, np.zeros(4, int)) == (0.5 + 1 + 1 + 1) / 4
    without_ties = np.mean([a > b for a in (1.0, 2.0) for b in (1.0, 0.0)])
    assert without_ties == 0.75  # the control: ties are not counted


SOLUTION = "def compute(xs):\n    xs = [x + 17 for x in xs]\n    return xs\n# id: 00417\n"


def spans_of(*parts: str) -> tuple[tuple[int, int], ...]:
    return tuple((SOLUTION.index(part), SOLUTION.index(part) + len(part)) for part in parts)


def labeled_split(tokenizer: Tokenizer, folder: Path) -> TokenizedSplit:
    """Return a split of three records: one that is too long and is dropped, one without spans, one with spans."""
    records = [
        Record(task_id="long", prompt="word " * 300, solution=SOLUTION, decisive=((0, len(SOLUTION)),)),
        Record(task_id="plain", prompt="Say 17", solution="print(17)\n"),
        Record(
            task_id="marked", prompt="Add 17 to each.", solution=SOLUTION, is_correct=False,
            decisive=spans_of("+", "17"), noise=spans_of("00417"),
        ),
    ]  # fmt: skip
    source = TaskSource(tokenizer=tokenizer, difficulties={1: 1}, max_length=200)
    return build_split("validation", records, source, None, folder)


def test_exactly_the_tokens_that_overlap_a_span_are_labeled(tokenizer: Tokenizer, tmp_path: Path) -> None:
    split = labeled_split(tokenizer, tmp_path)
    decisive, noise, response = label_tokens(split, tokenizer)
    samples = split.samples
    assert samples.kept.tolist() == [1, 2]
    first, stop = samples.offsets[1] + samples.prompt_lengths[1], samples.offsets[2]
    assert samples.tokens[stop - 1] == tokenizer.end
    assert (
        not decisive[:first].any() and not noise[:first].any()
    )  # the record without spans, and the prompt, which also contains 17
    assert not decisive[stop - 1] and not noise[stop - 1]
    expected = np.zeros(len(samples.tokens), bool)
    for index in range(2):
        expected[samples.offsets[index] + samples.prompt_lengths[index] : samples.offsets[index + 1]] = True
    assert np.array_equal(response, expected)

    text, token_labels = "", []
    for position in range(first, stop - 1):
        piece = tokenizer.decode([int(samples.tokens[position])])
        token_labels.append((len(text), len(text) + len(piece), bool(decisive[position]), bool(noise[position])))
        text += piece
    assert text == SOLUTION
    for spans, field in ((spans_of("+", "17"), 2), (spans_of("00417"), 3)):
        span_positions = {i for start, end in spans for i in range(start, end)}
        for label in token_labels:
            assert label[field] is bool(span_positions & set(range(*label[:2])))
        assert 0 < sum(label[field] for label in token_labels) < 6


@pytest.fixture(scope="module")
def noisy_data(tokenizer: Tokenizer, cache: Path) -> Dataset:
    """Return a data set of correct and incorrect solutions, half of them with noise."""
    source = TaskSource(
        tokenizer=tokenizer, num_train=2, num_validation=12, num_test=1, difficulties={1: 1, 2: 1}, noise=0.5
    )
    return read_dataset(source, cache, seed=0)


def quality_of(
    data: Dataset, algorithm: Algorithm, reference_losses: np.ndarray | None = None
) -> dict[str, float | None]:
    if reference_losses is not None:
        data = replace(data, validation=data.validation.with_columns(reference_losses=reference_losses[:, None]))
    return quality(MtpObjective(algorithm), data)


def quality(objective: MtpObjective, data: Dataset) -> dict[str, float | None]:
    measured = measure_tokens(objective, tiny_model(), data, CPU)
    return weight_quality(measured[:, TOKEN_METRICS.index("weight")], data)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["decisive_wrong_auc", "noise_auc"])
def test_correct_weights_score_one_inverted_weights_zero_and_random_weights_half(
    name: str, noisy_data: Dataset
) -> None:
    decisive, noise, _ = label_tokens(noisy_data.validation, noisy_data.tokenizer)
    truth = decisive if name == "decisive_wrong_auc" else noise
    high_on_labels = 1000 * truth.astype(np.float32)
    assert quality_of(noisy_data, ExcessLoss(), high_on_labels)[name] == 1.0
    assert quality_of(noisy_data, ExcessLoss(), 1000 - high_on_labels)[name] == 0.0
    drawn = quality_of(noisy_data, Random(of=ExcessLoss()), high_on_labels)[name]
    assert drawn is not None and 0.3 < drawn < 0.7
    assert quality_of(noisy_data, Uniform()) == {}, "equal weights have a quality"


@pytest.mark.parametrize("name", ["decisive_wrong_auc", "noise_auc"])
def test_shuffled_weights_score_half(name: str, tokenizer: Tokenizer, cache: Path) -> None:
    source = TaskSource(tokenizer=tokenizer, num_train=2, num_validation=80, num_test=1, difficulties={1: 1}, noise=0.5)
    data = read_dataset(source, cache, seed=0)
    decisive, noise, response = label_tokens(data.validation, data.tokenizer)
    truth = decisive if name == "decisive_wrong_auc" else noise
    losses = 1000 * truth.astype(np.float32)
    data = replace(data, validation=data.validation.with_columns(reference_losses=losses[:, None]))
    shuffled = quality_of(data, Shuffled(of=ExcessLoss()))[name]
    assert shuffled is not None and 0.45 < shuffled < 0.55

    if name == "decisive_wrong_auc":
        return  # all incorrect solutions have equally many decisive tokens, so the control does not apply
    # the control: pooled over all solutions, shuffled weights still show which solutions have noise
    weights = measure_tokens(MtpObjective(Shuffled(of=ExcessLoss())), tiny_model(), data, CPU)[:, 0]
    pooled = area_under_roc(-weights, truth, response & np.isfinite(weights), np.zeros(len(truth), int))
    assert pooled is not None and pooled > 0.55


def test_decisive_tokens_count_only_in_incorrect_solutions(noisy_data: Dataset) -> None:
    decisive, _, _ = label_tokens(noisy_data.validation, noisy_data.tokenizer)
    is_incorrect, lengths = ~noisy_data.validation.is_correct, noisy_data.validation.samples.lengths
    in_incorrect = np.repeat(is_incorrect, lengths)
    assert (decisive & ~in_incorrect).any()
    high_on_decisive = 1000 * (decisive & in_incorrect).astype(np.float32)
    assert quality_of(noisy_data, ExcessLoss(), high_on_decisive)["decisive_wrong_auc"] == 1.0
    pooled = area_under_roc(
        high_on_decisive, decisive, np.ones(len(decisive), bool), np.repeat(range(len(is_incorrect)), lengths)
    )
    assert pooled is not None and pooled < 1.0  # the control: correct solutions are included


def test_quality_is_empty_without_labels(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = TaskSource(tokenizer=tokenizer, difficulties={1: 1})
    plain = build_split("validation", [Record(task_id="a", prompt="Say", solution="pass\n")], source, None, tmp_path)
    data = SimpleNamespace(validation=plain, tokenizer=tokenizer)
    assert quality(MtpObjective(Uniform()), data) == {}
    no_records = build_split("validation", [], source, None, tmp_path)
    data = SimpleNamespace(validation=no_records, tokenizer=tokenizer)
    assert quality(MtpObjective(Uniform()), data) == {}
    split = labeled_split(tokenizer, tmp_path)
    losses = np.arange(len(split.samples.tokens), dtype=np.float32)
    only_noise = replace(split, is_correct=np.ones(len(split), bool), reference_losses=losses[:, None])
    data = SimpleNamespace(validation=only_noise, tokenizer=tokenizer)
    values = quality(MtpObjective(ExcessLoss()), data)
    assert values["decisive_wrong_auc"] is None and values["noise_auc"] is not None
