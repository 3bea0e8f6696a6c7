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
from wmtp.data.token_labels import first_decisive_tokens, label_tokens
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import Hardware
from wmtp.evaluation.token_report import (
    TOKEN_METRICS,
    area_under_roc,
    measure_tokens,
    share_of_top_scores,
    weight_quality,
    without_rounding_errors,
)
from wmtp.objectives.mtp import MtpObjective

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


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 2)), min_size=1, max_size=40))
def test_the_share_of_top_scores_equals_that_of_a_loop_also_with_ties(rows: list[tuple[int, bool, int]]) -> None:
    scores, among, groups = (np.array(column) for column in zip(*rows, strict=True))
    positive = np.zeros(len(rows), bool)
    positive[[int(np.flatnonzero(groups == group)[0]) for group in np.unique(groups)]] = True
    got = share_of_top_scores(scores.astype(np.float32), positive, among, groups)
    shares = []
    for group in np.unique(groups):
        members = [i for i in range(len(rows)) if groups[i] == group and among[i]]
        winners = [i for i in members if scores[i] == max(scores[j] for j in members)]
        if any(positive[i] for i in members):
            shares.append(sum(positive[i] for i in winners) / len(winners))
    assert got is None if not shares else got == pytest.approx(np.mean(shares))


def test_ties_in_the_top_score_share_the_credit() -> None:
    scores, positive = np.array([2.0, 2, 2, 0]), np.array([True, False, False, False])
    assert share_of_top_scores(scores, positive, np.ones(4, bool), np.zeros(4, int)) == pytest.approx(1 / 3)
    assert scores.argmax() == 0, "the control: the first of the tied tokens would get it all"


def test_equal_weights_of_heads_give_ties_despite_rounding() -> None:
    weights = np.random.default_rng(0).random(10_000, dtype=np.float32) * 5
    of_three_heads = ((weights + weights) + weights) / np.float32(3)
    rounded, expected = without_rounding_errors(of_three_heads), without_rounding_errors(weights)
    assert (of_three_heads != weights).mean() > 0.1, "the control: without rounding, they are no ties"
    assert (rounded != expected).mean() < 0.01
    assert np.allclose(rounded, weights, rtol=2**-16, atol=0)
    assert np.isnan(without_rounding_errors(np.array([np.nan]))).all()


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
    return weight_quality(measured[:, TOKEN_METRICS.index("unclipped_weight")], data)


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


def test_the_limits_of_weights_do_not_change_what_they_identify(noisy_data: Dataset) -> None:
    decisive, _, _ = label_tokens(noisy_data.validation, noisy_data.tokenizer)
    losses = np.where(first_decisive_tokens(decisive, noisy_data.validation), 60, 50).astype(np.float32)
    narrow = ExcessLoss(weight_min=0.9, weight_max=1.1)
    assert quality_of(noisy_data, narrow, losses)["decisive_wrong_top1"] == 1.0
    data = replace(noisy_data, validation=noisy_data.validation.with_columns(reference_losses=losses[:, None]))
    clipped = measure_tokens(MtpObjective(narrow), tiny_model(), data, CPU)[:, TOKEN_METRICS.index("weight")]
    assert weight_quality(clipped, data) == {}, "the control: all clipped weights are equal"


@pytest.mark.slow
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


def test_a_perfect_critic_scores_one_although_the_rest_of_a_step_has_full_weight(noisy_data: Dataset) -> None:
    split = noisy_data.validation
    decisive, _, response = label_tokens(split, noisy_data.tokenizer)
    solutions = np.repeat(np.arange(len(split)), split.samples.lengths)
    first = first_decisive_tokens(decisive, split)
    weights = np.where(response, np.where(first, 0.1, 1.0), np.nan).astype(np.float32)
    got = weight_quality(weights, noisy_data)
    assert got["decisive_wrong_auc"] == got["decisive_wrong_top1"] == 1.0
    every_token = area_under_roc(-weights, decisive, response & ~split.is_correct[solutions], solutions)
    assert every_token is not None and every_token < 0.85, "the control: all tokens of the step count as decisive"

    late = decisive & ~first
    got = weight_quality(np.where(late, 0.01, weights).astype(np.float32), noisy_data)
    assert got["decisive_wrong_auc"] == got["decisive_wrong_top1"] == 1.0, "the tokens after the first count as neither"
    end = np.zeros(len(weights), bool)
    end[split.samples.offsets[1:] - 1] = True
    got = weight_quality(np.where(end, 0.01, weights).astype(np.float32), noisy_data)
    assert got["decisive_wrong_top1"] == 0.0 and 0.9 < (got["decisive_wrong_auc"] or 0) < 1.0, "the end token counts"


@pytest.mark.slow
def test_randomly_permuted_weights_score_one_half_and_the_reciprocal_of_the_number_of_tokens(
    noisy_data: Dataset,
) -> None:
    split, generator = noisy_data.validation, np.random.default_rng(0)
    decisive, _, response = label_tokens(split, noisy_data.tokenizer)
    first = first_decisive_tokens(decisive, split)
    compared = response & (first | ~decisive) & ~np.repeat(split.is_correct, split.samples.lengths)
    sizes = [compared[a:b].sum() for a, b in zip(split.samples.offsets, split.samples.offsets[1:], strict=False)]
    chance = float(np.mean([1 / size for size in sizes if size]))
    drawn = [
        weight_quality(np.where(response, generator.random(len(response)), np.nan), noisy_data) for _ in range(300)
    ]
    auc, top1 = (np.mean([each[name] for each in drawn]) for name in ("decisive_wrong_auc", "decisive_wrong_top1"))
    assert auc == pytest.approx(0.5, abs=0.02)
    assert top1 == pytest.approx(chance, abs=0.012) and chance < 0.06


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
    assert values["decisive_wrong_auc"] is values["decisive_wrong_top1"] is None and values["noise_auc"] is not None
