"""Tests of comparisons with a baseline: pairing, metrics, verdicts, tokens to target, refused inputs."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from tests.support.fake_runs import fake_evaluation, fake_run
from wmtp.errors import InputError
from wmtp.report.compare import compare_runs
from wmtp.report.results import Comparison, Difference, comparison_to_dict
from wmtp.report.run_record import find_runs
from wmtp.report.tables import print_comparison
from wmtp.report.tokens_to_target import first_reached
from wmtp.runtime.atomic_files import encode_json
from wmtp.statistics.clustered import clustered_estimate

BASELINE = [1.00, 1.10, 0.95, 1.05, 1.02]
BETTER = [0.90, 0.97, 0.86, 0.94, 0.93]
SAME = [1.01, 1.09, 0.96, 1.04, 1.01]


def study(folder: Path, **losses: Sequence[float]) -> Path:
    """Write a run with the given final loss for each seed of each algorithm."""
    for algo, values in losses.items():
        for seed, loss in enumerate(values):
            fake_run(folder / algo / str(seed), algo=algo, seed=seed, val_losses=[loss + 1, loss, loss + 0.1])
    return folder


def compare_study(folder: Path, **options: Any) -> Comparison:
    return compare_runs(find_runs([folder]), **options)


def difference(comparison: Comparison, label: str, metric: int = 0) -> Difference:
    return next(each for each in comparison.metrics[metric].differences if each.label == label)


def printed(comparison: Comparison) -> str:
    """Return the printed tables for a terminal with 80 columns."""
    console = Console(width=80, record=True, markup=False, file=io.StringIO())
    print_comparison(console, comparison)
    return console.export_text()


def test_differences_are_paired_by_seed_and_get_a_verdict(tmp_path: Path) -> None:
    comparison = compare_study(study(tmp_path, critic=BETTER, baseline=BASELINE, rho1=SAME))
    found = difference(comparison, "critic")
    pairs = [a - b for a, b in zip(BETTER, BASELINE, strict=True)]
    assert list(found.pairs) == [0, 1, 2, 3, 4]
    assert list(found.pairs.values()) == pytest.approx(pairs)
    assert found.mean == pytest.approx(np.mean(pairs))
    assert found.low is not None and found.high is not None
    assert found.low < found.mean < found.high < 0
    assert found.verdict == "better"
    assert difference(comparison, "rho1").verdict == "undecided"
    assert [group.label for group in comparison.metrics[0].groups] == list(comparison.groups)
    assert next(iter(comparison.groups)) == comparison.baseline == "baseline"
    values = comparison.metrics[0].groups[0]
    assert (values.mean, values.deviation) == pytest.approx((np.mean(BASELINE), np.std(BASELINE, ddof=1)))


def test_a_difference_within_delta_is_the_same_and_without_delta_undecided(tmp_path: Path) -> None:
    folder = study(tmp_path, critic=BETTER, baseline=BASELINE, rho1=SAME)
    found = compare_study(folder, delta=0.05)
    assert difference(found, "rho1").verdict == "the same" and difference(found, "rho1").is_within_delta
    assert difference(found, "critic").verdict == "better" and difference(found, "critic").is_within_delta is False
    assert difference(compare_study(folder, delta=0.01), "rho1").verdict == "undecided"
    assert difference(compare_study(folder), "rho1").is_within_delta is None


def test_several_settings_of_one_method_against_one_of_another_are_noted(tmp_path: Path) -> None:
    study(tmp_path, baseline=BASELINE, critic=BETTER)
    assert not any("unequal search" in note for note in compare_study(tmp_path).notes)
    for number, beta in enumerate((0.3, 0.6, 1.2)):
        for seed, loss in enumerate(BETTER):
            fake_run(tmp_path / f"{beta}" / str(seed), algo="critic", seed=seed, val_losses=[3.0, loss - number / 100],
                     **{"algo.beta": beta})  # fmt: skip
    note = "unequal search: of the compared settings, critic has 4, baseline has 1; the best of more settings"
    assert any(each.startswith(note) for each in compare_study(tmp_path).notes)


def test_rounding_errors_are_no_difference(tmp_path: Path) -> None:
    folder = study(tmp_path, baseline=[0.1, 0.2, 0.4], critic=[0.4, 0.1, 0.2])
    found = difference(compare_study(folder), "critic")
    assert np.mean(list(found.pairs.values())) != 0.0
    assert str(found.mean) == "0.0" and found.seeds_needed is None


def test_pairing_shows_a_difference_that_an_unpaired_test_does_not(tmp_path: Path) -> None:
    slightly = [loss - 0.03 + 0.002 * seed for seed, loss in enumerate(BASELINE)]
    found = difference(compare_study(study(tmp_path, baseline=BASELINE, critic=slightly)), "critic")
    assert found.verdict == "better"
    assert stats.ttest_ind(BASELINE, slightly).pvalue > 0.3


def test_the_signed_rank_p_equals_that_of_scipy_and_its_limit_is_noted(tmp_path: Path) -> None:
    comparison = compare_study(study(tmp_path, baseline=BASELINE, critic=BETTER, rho1=[1.2, 1.0, 1.3, 0.9, 1.5]))
    for label in ("critic", "rho1"):
        found = difference(comparison, label)
        assert found.wilcoxon == stats.wilcoxon(list(found.pairs.values())).pvalue
    assert difference(comparison, "critic").wilcoxon_floor == 0.0625
    assert any("with 5 pairs the signed-rank test cannot give a p below 0.0625" in note for note in comparison.notes)


def test_p_values_are_corrected_for_the_number_of_groups(tmp_path: Path) -> None:
    single = difference(compare_study(study(tmp_path / "a", baseline=BASELINE, critic=BETTER)), "critic")
    many = difference(
        compare_study(study(tmp_path / "b", baseline=BASELINE, critic=BETTER, rho1=SAME, random=SAME)), "critic"
    )
    assert single.p == single.p_holm == many.p
    assert many.p is not None and many.p_holm == pytest.approx(3 * many.p)
    assert single.seeds_needed is not None and many.seeds_needed is not None
    assert single.seeds_needed <= many.seeds_needed
    slightly = [loss - 0.01 * (seed % 2) for seed, loss in enumerate(BASELINE)]
    few = compare_study(study(tmp_path / "c", baseline=BASELINE, critic=slightly))
    more = compare_study(study(tmp_path / "d", baseline=BASELINE, critic=slightly, rho1=SAME, random=SAME))
    assert (difference(few, "critic").seeds_needed or 0) < (difference(more, "critic").seeds_needed or 0)


def test_the_verdict_depends_on_the_direction_of_the_metric(tmp_path: Path) -> None:
    for algo, values in (("baseline", BASELINE), ("critic", BETTER)):
        for seed, value in enumerate(values):
            names = (
                "val/pass_rate", "val/value_explained_variance", "val/head_1_loss", "val/canonical_logprob",
                "val/canonical_probability", "val/sampled_pass_rate",
            )  # fmt: skip
            more = {name: [value, value] for name in names}
            fake_run(tmp_path / algo / str(seed), algo=algo, seed=seed, metrics=more)
    for metric, verdict in (
        ("val/pass_rate", "worse"), ("val/value_explained_variance", "worse"), ("val/head_1_loss", "better"),
        ("val/canonical_logprob", "worse"), ("val/canonical_probability", "worse"), ("val/sampled_pass_rate", "worse"),
    ):  # fmt: skip
        assert difference(compare_study(tmp_path, metric=metric), "critic").verdict == verdict


def test_the_option_at_selects_the_best_checkpoint_or_the_last_model(tmp_path: Path) -> None:
    folder = study(tmp_path, baseline=BASELINE, critic=BETTER)
    best, last = (compare_study(folder, at=at).metrics[0] for at in ("best", "last"))
    assert list(best.groups[0].values_by_seed.values()) == BASELINE
    assert list(last.groups[0].values_by_seed.values()) == [x + 0.1 for x in BASELINE]
    assert (best.at, last.at) == ("best checkpoint", "last model")


def test_one_pair_is_too_few_and_noted(tmp_path: Path) -> None:
    comparison = compare_study(study(tmp_path, baseline=BASELINE[:1], critic=BETTER[:1]))
    found = difference(comparison, "critic")
    assert (found.low, found.high, found.p, found.p_holm, found.seeds_needed) == (None,) * 5
    assert found.verdict == "too few seeds"
    assert "critic: 1 pair of runs cannot rule out chance; train at least 2 seeds" in comparison.notes


def test_seeds_without_a_partner_are_noted_and_left_out(tmp_path: Path) -> None:
    comparison = compare_study(study(tmp_path, baseline=BASELINE, critic=BETTER[:4]))
    assert list(difference(comparison, "critic").pairs) == [0, 1, 2, 3]
    assert any("unpaired: baseline has seed 4, critic does not" in note for note in comparison.notes)
    assert len(comparison.metrics[0].groups[0].values_by_seed) == 5


def test_unfinished_runs_are_noted_and_left_out(tmp_path: Path) -> None:
    study(tmp_path, baseline=BASELINE, critic=BETTER)
    failed = fake_run(tmp_path / "failed", algo="critic", seed=7, state="FAILED")
    comparison = compare_study(tmp_path)
    assert f"{failed} is left out: it is FAILED, not FINISHED" in comparison.notes
    assert 7 not in comparison.metrics[0].groups[1].values_by_seed


def test_the_later_of_two_runs_with_one_seed_is_used(tmp_path: Path) -> None:
    study(tmp_path, baseline=BASELINE, critic=BETTER)
    later = fake_run(tmp_path / "a", algo="critic", seed=2, val_losses=[0.5], started="2026-11-22T09:30:00+00:00")
    comparison = compare_study(tmp_path)
    assert comparison.metrics[0].groups[1].values_by_seed[2] == 0.5
    assert any(note.startswith(f"{tmp_path / 'critic' / '2'} is left out: {later}") for note in comparison.notes)


def test_a_nonfinite_value_is_noted_and_left_out(tmp_path: Path) -> None:
    for algo, values in (("baseline", ["1.0", "1.1", "1.2"]), ("critic", ["nan", "0.9", "0.8"])):
        for seed, value in enumerate(values):
            measured: Any = {"val/value_loss": [value, value]}
            fake_run(tmp_path / algo / str(seed), algo=algo, seed=seed, metrics=measured)
    comparison = compare_study(tmp_path, metric="val/value_loss")
    assert list(difference(comparison, "critic").pairs) == [1, 2]
    assert any("critic/0 is left out of val/value_loss: its value is nan" in note for note in comparison.notes)


@pytest.mark.parametrize("part", ["critic, optimizer.lr=0.01", "optimizer.lr=0.01", "0.01"])
def test_the_baseline_can_be_given_by_a_part_of_its_label(tmp_path: Path, part: str) -> None:
    for number, (algo, lr) in enumerate([("baseline", 0.001), ("critic", 0.001), ("critic", 0.01)]):
        for seed in range(3):
            fake_run(tmp_path / f"{number}-{seed}", algo=algo, seed=seed, **{"optimizer.lr": lr})
    assert compare_study(tmp_path, baseline=part).baseline == "critic, optimizer.lr=0.01"
    with pytest.raises(
        InputError, match=r"baseline=critic: matches several groups; .*baseline='critic, optimizer.lr=0.0"
    ):
        compare_study(tmp_path, baseline="critic")
    with pytest.raises(InputError, match=r"baseline=rho1: there is no such group; the groups are baseline='baseline',"):
        compare_study(tmp_path, baseline="rho1")


def test_one_group_or_no_common_seed_is_an_error(tmp_path: Path) -> None:
    study(tmp_path / "one", baseline=BASELINE)
    with pytest.raises(
        InputError, match="finished runs: 5, but they form only one group, because their configs differ at most"
    ):
        compare_study(tmp_path / "one")
    for seed, algo in enumerate(["baseline", "critic"]):
        fake_run(tmp_path / "two" / algo, algo=algo, seed=seed)
    with pytest.raises(InputError, match=r"no group has a seed in common .*\n  baseline: seeds 0\n  critic: seeds 1"):
        compare_study(tmp_path / "two")
    fake_run(tmp_path / "three", state="RUNNING")
    with pytest.raises(InputError, match="none of the 1 runs has finished"):
        compare_study(tmp_path / "three")


def test_a_group_without_a_common_seed_is_left_out(tmp_path: Path) -> None:
    study(tmp_path, baseline=BASELINE, critic=BETTER)
    fake_run(tmp_path / "rho1", algo="rho1", seed=9)
    comparison = compare_study(tmp_path)
    assert list(comparison.groups) == ["baseline", "critic"]
    assert "rho1 is left out: it has no seed in common with baseline" in comparison.notes


def test_an_unknown_metric_lists_the_common_metrics(tmp_path: Path) -> None:
    folder = study(tmp_path, baseline=BASELINE, critic=BETTER)
    with pytest.raises(InputError, match=r"metric=val/los: is not measured at a validation; all of them have val/loss"):
        compare_study(folder, metric="val/los")
    with pytest.raises(InputError, match=r"metric=pass@5: not all runs have it; .* python -m wmtp.evaluate"):
        compare_study(folder, metric="pass@5")
    with pytest.raises(InputError, match="metric=tokens: is not measured at a validation"):
        compare_study(folder, metric="tokens")


@pytest.mark.parametrize(
    ("key", "name", "config"),
    [
        ("train_fingerprint", "training data", "data.path"),
        ("validation_fingerprint", "validation set", "data.seed"),
        ("tokenizer", "tokenizer", "model.tokenizer.vocab_size"),
    ],
)
def test_runs_with_different_data_are_refused(tmp_path: Path, key: str, name: str, config: str) -> None:
    one = fake_run(tmp_path / "a", algo="baseline", **{config: 77})
    other = fake_run(tmp_path / "b", algo="critic", provenance={key: "other"}, **{config: 99})
    with pytest.raises(InputError) as raised:
        compare_study(tmp_path)
    message = str(raised.value)
    assert f"  {name} differs between {one} and {other}:\n    {config}: 77 and 99\n" in message
    assert "Compare only runs that use the same data, or train again" in message
    assert raised.value.exit_code == 2


def test_training_data_may_differ_by_a_setting_if_the_validation_data_are_equal(tmp_path: Path) -> None:
    """The controls: another validation set, one that is not recorded, or other files under the same settings."""
    for number, provenance in enumerate([{}, {"validation_fingerprint": "other"}, {"validation_fingerprint": None}]):
        folder = tmp_path / str(number)
        fake_run(folder / "a", algo="baseline", **{"data.correct_ratio": 1.0})
        changed = {"train_fingerprint": "other"} | provenance
        fake_run(folder / "b", algo="baseline", provenance=changed, **{"data.correct_ratio": 0.5})
        if provenance:
            with pytest.raises(InputError, match="The runs use different data"):
                compare_study(folder, baseline="1")
            continue
        notes = compare_study(folder, baseline="1").notes
        assert "the training data differ (data.correct_ratio: 1.0 and 0.5) and the held-out data do not" in notes[0]


def test_different_files_with_equal_configs_are_refused(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b", algo="critic", provenance={"train_fingerprint": "other"})
    with pytest.raises(
        InputError, match="the configs are equal below data, so the files that they refer to must have changed"
    ):
        compare_study(tmp_path)


def test_the_fingerprint_with_reference_losses_may_differ(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b", algo="rho1", provenance={"fingerprint": "with the reference's losses"})
    assert compare_study(tmp_path).notes == ["rho1: 1 pair of runs cannot rule out chance; train at least 2 seeds"]


def test_runs_without_recorded_data_are_compared_with_a_note(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b", algo="critic", provenance={"train_fingerprint": None})
    assert any(
        note.startswith("cannot check that all runs use the same training data: ")
        for note in compare_study(tmp_path).notes
    )


def test_means_over_different_numbers_of_heads_are_refused(tmp_path: Path) -> None:
    for seed in range(3):
        for heads in (1, 4):
            loss = {"val/head_1_loss": [2.0, 1.0 + seed + heads / 100], "val/mtp_loss": [2.0, 1.0]}
            fake_run(tmp_path / f"{heads}-{seed}", seed=seed, metrics=loss, **{"model.num_heads": heads})
    for metric in ("val/loss", "val/mtp_loss"):
        with pytest.raises(
            InputError, match=r"mean over heads, but model.num_heads is 1 in .* and 4 in .*metric=val/head_1_loss"
        ):
            compare_study(tmp_path, baseline="model.num_heads=1", metric=metric)
    comparison = compare_study(tmp_path, baseline="model.num_heads=1", metric="val/head_1_loss")
    assert comparison.tokens_to_target[0].metric == "val/head_1_loss"


def study_with_results(folder: Path, **passes: Sequence[Sequence[int]]) -> Path:
    """Write a run for each seed of each algorithm, with the result of each test problem."""
    for algo, rows in passes.items():
        for seed, row in enumerate(rows):
            fake_run(folder / algo / str(seed), algo=algo, seed=seed, passes=[bool(each) for each in row])
    return folder


def test_pass_at_1_is_compared_in_addition_to_any_metric(tmp_path: Path) -> None:
    folder = study_with_results(tmp_path, baseline=[[1, 0, 0, 0], [1, 1, 0, 0]], critic=[[1, 1, 1, 0], [1, 0, 0, 1]])
    comparison = compare_study(folder)
    assert [metric.metric for metric in comparison.metrics] == ["val/loss", "pass@1"]
    found = difference(comparison, "critic", metric=1)
    assert list(found.pairs.values()) == [0.5, 0.0]
    assert not comparison.metrics[1].lower_is_better
    single = compare_study(folder, metric="pass@1")
    assert [metric.metric for metric in single.metrics] == ["pass@1"]


def test_pass_at_1_has_an_interval_over_seeds_and_problems(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    base = (generator.random((4, 60)) < 0.4).astype(int)
    group = (generator.random((4, 60)) < 0.6).astype(int)
    folder = study_with_results(tmp_path, baseline=base.tolist(), critic=group.tolist())
    found = difference(compare_study(folder, metric="pass@1"), "critic")
    expected = clustered_estimate((group - base).astype(float))
    assert (found.mean, found.low, found.high) == pytest.approx((expected.mean, expected.low, expected.high))
    low, high = stats.ttest_1samp((group - base).mean(axis=1), 0).confidence_interval()
    assert found.low is not None and found.high is not None
    assert found.high - found.low > high - low  # the t interval does not cover the choice of the problems
    assert found.mcnemar is None  # it would find differences between two sets of runs of one method


def test_with_one_seed_the_problem_test_is_mcnemars_exact_test(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    base, group = generator.random(60) < 0.4, generator.random(60) < 0.7
    folder = study_with_results(tmp_path, baseline=[base.astype(int)], critic=[group.astype(int)])
    found = difference(compare_study(folder, metric="pass@1"), "critic")
    assert found.mcnemar is not None
    won, lost = int((group & ~base).sum()), int((base & ~group).sum())
    assert found.mcnemar.p == stats.binomtest(won, won + lost).pvalue
    assert found.verdict == "too few seeds"


def test_runs_with_different_problems_have_no_common_pass_at_1(tmp_path: Path) -> None:
    folder = study_with_results(tmp_path, baseline=[[1, 0, 0]], critic=[[1, 0]])
    assert [metric.metric for metric in compare_study(folder).metrics] == ["val/loss"]
    with pytest.raises(InputError, match="metric=pass@1: not all runs have it"):
        compare_study(folder, metric="pass@1")


def test_attempts_do_not_change_pass_at_1_and_can_be_compared(tmp_path: Path) -> None:
    for algo, greedy, attempts in (
        ("baseline", [1, 0, 0], [[1, 0], [0, 0], [0, 0]]), ("critic", [1, 0, 1], [[1, 1], [1, 0], [0, 0]]),
    ):  # fmt: skip
        for seed in range(2):
            run = tmp_path / algo / str(seed)
            fake_run(run, algo=algo, seed=seed, passes=list(map(bool, greedy)), attempts=attempts)  # type: ignore[arg-type]
    found = difference(compare_study(tmp_path, metric="pass@1"), "critic")
    assert list(found.pairs.values()) == pytest.approx([1 / 3] * 2)
    comparison = compare_study(tmp_path, metric="sampled_pass@1")
    found = difference(comparison, "critic")
    assert comparison.metrics[0].at == "last model" and not comparison.metrics[0].lower_is_better
    assert list(found.pairs.values()) == pytest.approx([1 / 2 - 1 / 6] * 2)

    fake_run(tmp_path / "rho1" / "0", algo="rho1", passes=[True], attempts=[[True, False]])
    with pytest.raises(
        InputError, match=r"metric=sampled_pass@1: not all runs have it for the same test problems; all"
    ):
        compare_study(tmp_path, metric="sampled_pass@1")


def test_the_measures_of_weights_are_shown_for_each_group_and_can_be_compared(tmp_path: Path) -> None:
    for seed in range(3):
        fake_run(tmp_path / "baseline" / str(seed), seed=seed, weights={}, metrics={"val/canonical_logprob": [-9, -8]})
        for algo, area in (("critic", 0.5), ("rho1", 0.7)):
            weights = {"decisive_wrong_auc": area + seed / 100, "decisive_wrong_top1": area / 10, "noise_auc": None}
            values = {"val/value_explained_variance": [0.3, 0.2]} if algo == "critic" else {}
            fake_run(
                tmp_path / algo / str(seed), algo=algo, seed=seed, weights=weights,
                metrics={"val/canonical_logprob": [-7 - seed, -6 - seed], **values},
            )  # fmt: skip
    comparison = compare_study(tmp_path)
    policy, weights = comparison.means  # type: ignore[assignment]
    assert policy.measures == ["val/canonical_logprob"]
    assert policy.means == {"baseline": [-8.0], "critic": [-7.0], "rho1": [-7.0]}
    assert weights.measures == ["decisive_wrong_auc", "decisive_wrong_top1", "val/value_explained_variance"]
    assert weights.means["baseline"] == [None, None, None]
    assert weights.means["critic"] == pytest.approx([0.51, 0.05, 0.2])
    assert weights.means["rho1"] == [pytest.approx(0.71), pytest.approx(0.07), None]
    text = printed(comparison)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "Weights and values, last model" in text and "0.51" in text and "decisive wrong" in text
    assert comparison_to_dict(comparison)["means"][1]["means"]["critic"][2] == 0.2

    with pytest.raises(InputError, match=r"metric=decisive_wrong_auc: .*critic.* has it, .*baseline.* does not"):
        compare_study(tmp_path, metric="decisive_wrong_auc")
    for seed in range(3):
        (tmp_path / "baseline" / str(seed) / "status.json").unlink()
    better = compare_study(tmp_path, metric="decisive_wrong_auc", baseline="critic")
    assert list(difference(better, "rho1").pairs.values()) == pytest.approx([0.2] * 3)
    assert better.metrics[0].at == "last model" and not better.metrics[0].lower_is_better


def test_pass_at_k_is_from_the_same_evaluation_of_each_run(tmp_path: Path) -> None:
    for algo, share in (("baseline", 1), ("critic", 3)):
        for seed in range(3):
            run = fake_run(tmp_path / algo / str(seed), algo=algo, seed=seed)
            rows = [[sample < share + (seed + number) % 2 for sample in range(5)] for number in range(6)]
            fake_evaluation(run, "first", rows, k=2)
            fake_evaluation(run, "second", rows, k=4, **{"generation.temperature": 0.1 * seed})
    comparison = compare_study(tmp_path, metric="pass@2")
    found = difference(comparison, "critic")
    assert comparison.metrics[0].at == "evaluation first"
    assert found.mean == pytest.approx(np.mean(list(found.pairs.values())))  # of pass@2, not of the pass rate
    assert all(value > 0 for value in found.pairs.values())
    with pytest.raises(InputError, match=r"metric=pass@4: not all runs have it; all of them have pass@2, val/loss"):
        compare_study(tmp_path, metric="pass@4")


@pytest.mark.parametrize(
    ("points", "target", "tokens"),
    [
        ([(100, 3.0), (200, 1.0)], 1.0, 200.0),
        ([(100, 3.0), (200, 1.0), (300, 0.5)], 2.5, 125.0),
        ([(100, 3.0), (200, 4.0), (300, 1.0)], 2.0, 200 + 100 * 2 / 3),
        ([(100, 0.5), (200, 0.4)], 1.0, 100.0),
        ([(100, 3.0), (200, 2.0)], 1.0, None),
    ],
)
def test_tokens_are_interpolated_between_validations(
    points: list[tuple[int, float]], target: float, tokens: float | None
) -> None:
    found = first_reached(points, target)
    assert found == tokens if tokens is None else found == pytest.approx(tokens)


def test_tokens_to_target_include_stage_1(tmp_path: Path) -> None:
    for seed in range(5):
        fake_run(tmp_path / f"b{seed}", seed=seed, val_losses=[3.0, 2.0, 1.0, 1.5])
        fake_run(tmp_path / f"c{seed}", algo="critic", seed=seed, val_losses=[2.0, 0.0, 0.0, 0.0], stage_tokens=1_000)
    reach = compare_study(tmp_path).tokens_to_target[0]
    pair = reach.pairs[0]
    assert (pair.target, pair.baseline_tokens, pair.tokens) == (1.0, 30_000, 16_000)
    assert (pair.stage_tokens, pair.baseline_stage_tokens) == (1_000, 0)
    assert reach.ratio == pytest.approx(16 / 30)
    assert (reach.has_interval, reach.low, reach.high) == (True, pytest.approx(16 / 30), pytest.approx(16 / 30))


def test_a_target_that_is_never_reached_counts_as_infinite(tmp_path: Path) -> None:
    for seed in range(5):
        fake_run(tmp_path / f"b{seed}", seed=seed, val_losses=[3.0, 2.0])
        ends = 4.0 if seed < 2 else 1.0
        fake_run(tmp_path / f"c{seed}", algo="critic", seed=seed, val_losses=[3.0, ends])
        fake_run(tmp_path / f"r{seed}", algo="rho1", seed=seed, val_losses=[3.0, 2.5])
    critic, rho1 = compare_study(tmp_path).tokens_to_target
    assert (critic.never, critic.high) == (2, None)
    assert critic.ratio == critic.low == pytest.approx(0.75)
    assert (rho1.never, rho1.ratio, rho1.low, rho1.has_interval) == (5, None, None, True)


def test_tokens_to_target_are_left_out_with_a_note_if_not_recorded(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    fake_run(tmp_path / "b", algo="critic", tokens=False)
    comparison = compare_study(tmp_path)
    assert comparison.tokens_to_target == []
    assert any("tokens to reach the baseline's best val/loss are left out" in note for note in comparison.notes)


def test_curves_and_tokens_to_target_use_the_requested_loss(tmp_path: Path) -> None:
    for seed in range(3):
        fake_run(tmp_path / f"b{seed}", seed=seed, val_losses=[3.0, 2.0], metrics={"val/clean_loss": [2.0, 1.0]})
        fake_run(tmp_path / f"c{seed}", algo="critic", seed=seed, val_losses=[3.0, 2.9], passes=None,
                 metrics={"val/clean_loss": [1.0, 0.5]})  # fmt: skip
    clean, noisy = (compare_study(tmp_path, metric=metric) for metric in ("val/clean_loss", "val/loss"))
    assert (clean.loss, clean.tokens_to_target[0].metric, clean.tokens_to_target[0].ratio) == (
        "val/clean_loss",
        "val/clean_loss",
        0.5,
    )
    assert (noisy.loss, noisy.tokens_to_target[0].metric, noisy.tokens_to_target[0].ratio) == (
        "val/loss",
        "val/loss",
        None,
    )
    assert comparison_to_dict(clean)["loss"] == "val/clean_loss"
    for comparison in (clean, noisy):
        message = f"Mid-run reading: tokens to the baseline's best {comparison.loss}, relative to the baseline"
        assert message in " ".join(printed(comparison).split())


def test_curves_show_a_loss_if_the_metric_is_not_a_loss(tmp_path: Path) -> None:
    folder = study_with_results(tmp_path, baseline=[[1, 0]] * 3, critic=[[1, 1]] * 3)
    assert compare_study(folder, metric="pass@1").loss == "val/loss"


def test_a_nonfinite_loss_is_not_a_target(tmp_path: Path) -> None:
    for seed in range(3):
        fake_run(tmp_path / f"b{seed}", seed=seed, val_losses=[float("nan"), 3.0, 2.0])
        fake_run(tmp_path / f"c{seed}", algo="critic", seed=seed, val_losses=[3.0, 2.0, 1.0])
    (reach,) = compare_study(tmp_path, at="last").tokens_to_target
    assert [pair.target for pair in reach.pairs] == [2.0] * 3
    assert reach.ratio == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("side", "states", "verdicts"),
    [
        ("critic", [], ("better", "worse")),
        ("critic", ["KILLED"], ("better", "worse")),
        ("critic", ["FAILED"], ("runs failed", "runs failed")),
        ("baseline", ["FAILED"], ("better", "worse")),
    ],
)
def test_no_verdict_favors_a_side_with_failed_runs(
    tmp_path: Path, side: str, states: list[str], verdicts: tuple[str, str]
) -> None:
    study(tmp_path, baseline=BASELINE, critic=BETTER, rho1=SAME)
    for number, state in enumerate(states):
        fake_run(tmp_path / "lost" / str(number), algo=side, seed=5 + number, state=state)
    swapped, original = compare_study(tmp_path), compare_study(tmp_path, baseline="critic")
    assert (difference(swapped, "critic").verdict, difference(original, "baseline").verdict) == verdicts
    num_failed = states.count("FAILED")
    lost = {group.label: (group.lost.failed, group.lost.runs) for group in swapped.metrics[0].groups}
    assert lost == {"baseline": (0, 5), "critic": (0, 5), "rho1": (0, 5)} | {side: (num_failed, 5 + num_failed)}
    assert ("1 of 6 runs failed" in printed(swapped)) == bool(num_failed)
    assert (f"{side}: 1 of 6 runs failed; val/loss covers only the other runs" in swapped.notes) == bool(num_failed)


def test_a_failed_run_is_not_counted_if_its_seed_has_a_finished_run(tmp_path: Path) -> None:
    study(tmp_path, baseline=BASELINE, critic=BETTER)
    for place, started in (("before", "2026-11-20T09:30:00+00:00"), ("after", "2026-11-22T09:30:00+00:00")):
        fake_run(tmp_path / place, algo="critic", seed=2, state="FAILED", started=started)
    assert difference(compare_study(tmp_path), "critic").verdict == "better"


def test_a_nonfinite_value_counts_as_failed(tmp_path: Path) -> None:
    for algo, values in (("baseline", BASELINE), ("critic", BETTER)):
        for seed, value in enumerate(values):
            measured: Any = {"val/value_loss": [value, "nan" if (algo, seed) == ("critic", 4) else value]}
            fake_run(tmp_path / algo / str(seed), algo=algo, seed=seed, metrics=measured)
    last, best = compare_study(tmp_path, metric="val/value_loss", at="last"), compare_study(tmp_path)
    assert (difference(last, "critic").verdict, str(difference(last, "critic").lost)) == (
        "runs failed", "1 of 5 runs failed",
    )  # fmt: skip
    assert difference(best, "critic").lost.failed == 0


def test_a_group_without_finished_runs_is_noted(tmp_path: Path) -> None:
    study(tmp_path, baseline=BASELINE, critic=BETTER)
    for seed in range(2):
        fake_run(tmp_path / "rho1" / str(seed), algo="rho1", seed=seed, state="FAILED")
    assert "rho1 is left out: 2 of 2 runs failed" in compare_study(tmp_path).notes


def test_one_pair_has_no_signed_rank_p(tmp_path: Path) -> None:
    one, two = (compare_study(study(tmp_path / str(n), baseline=BASELINE[:n], critic=BETTER[:n])) for n in (1, 2))
    assert difference(one, "critic").wilcoxon is None and "1.000" not in printed(one)
    assert difference(two, "critic").wilcoxon == 0.5


def test_the_json_has_the_values_of_the_tables(tmp_path: Path) -> None:
    folder = study_with_results(tmp_path, baseline=[[1, 0], [0, 0], [1, 0]], critic=[[1, 1], [1, 0], [1, 1]])
    comparison = compare_study(folder)
    content = json.loads(encode_json(comparison_to_dict(comparison)))
    assert content["metrics"][1]["differences"][0]["pairs"] == {"0": 0.5, "1": 0.5, "2": 0.5}
    assert content["groups"]["critic"][0] == {"name": "0", "folder": str(folder / "critic" / "0"), "seed": 0}
    assert any("is the same for every seed" in note for note in content["notes"])
    assert content["reach"][0]["pairs"][0]["tokens"] == 20_000


def test_tables_fit_80_columns_without_broken_numbers(tmp_path: Path) -> None:
    for algo, values in (("baseline", BASELINE), ("a_long_name_of_an_algorithm", BETTER)):
        for seed, loss in enumerate(values):
            for lr in (1e-3, 1e-2):
                fake_run(
                    tmp_path / f"{algo}{seed}{lr}", algo=algo, seed=seed, val_losses=[3.0, loss + lr * seed],
                    passes=[loss > 1, seed > 1, True], stage_tokens=123_456, **{"optimizer.weight_decay": lr},
                )  # fmt: skip
    comparison = compare_study(tmp_path, baseline="baseline, optimizer.weight_decay=0.001")
    text = printed(comparison)
    assert max(map(len, text.splitlines())) <= 80
    for each in comparison.metrics[0].differences:
        assert each.low is not None and f"{each.mean:+.3g}" in text
        assert f"{each.low:+.3g} to {each.high:+.3g}" in text
    assert "better" in text and "123,456 in " in text
