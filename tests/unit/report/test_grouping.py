"""Tests of groups of runs, their labels, and the search for runs."""

from pathlib import Path

import pytest

from tests.support.fake_runs import fake_evaluation, fake_run
from wmtp.errors import InputError
from wmtp.report.grouping import group_runs
from wmtp.report.run_record import RunRecord, find_runs


def seeds_by_label(folder: Path) -> dict[str, list[int]]:
    return {label: [run.seed for run in runs] for label, runs in group_runs(find_runs([folder])).items()}


def test_runs_that_differ_only_in_the_seed_are_one_group(tmp_path: Path) -> None:
    for seed in range(3):
        fake_run(tmp_path / str(seed), seed=seed, run_name=f"run {seed}", cache_dir=f"cache{seed}")
    assert seeds_by_label(tmp_path) == {"all": [0, 1, 2]}


def test_groups_are_labeled_by_algorithm(tmp_path: Path) -> None:
    for number, algo in enumerate(["critic", "baseline", "critic"]):
        of_critic = {"algo.beta": 0.9} if algo == "critic" else {}
        fake_run(tmp_path / str(number), algo=algo, seed=number, **of_critic)
    assert seeds_by_label(tmp_path) == {"critic": [0, 2], "baseline": [1]}


def test_values_distinguish_groups_with_the_same_algorithm(tmp_path: Path) -> None:
    fake_run(tmp_path / "0", algo="baseline", **{"optimizer.lr": 0.001})
    for number, lr in enumerate([0.001, 0.01], start=1):
        fake_run(tmp_path / str(number), algo="critic", **{"optimizer.lr": lr})
    assert list(seeds_by_label(tmp_path)) == ["baseline", "critic, optimizer.lr=0.001", "critic, optimizer.lr=0.01"]


def test_a_redundant_key_is_left_out(tmp_path: Path) -> None:
    for number, (lr, epochs) in enumerate([(0.001, 1), (0.01, 2)]):
        fake_run(tmp_path / str(number), **{"optimizer.lr": lr, "num_epochs": epochs})
    assert list(seeds_by_label(tmp_path)) == ["optimizer.lr=0.001", "optimizer.lr=0.01"]


def test_each_group_has_a_unique_label(tmp_path: Path) -> None:
    number = 0
    for algo in ("baseline", "critic"):
        for lr in (0.001, 0.01):
            for model in ("micro", "small"):
                fake_run(tmp_path / str(number), algo=algo, choices={"model": model}, **{"optimizer.lr": lr})
                number += 1
    labels = seeds_by_label(tmp_path)
    assert len(labels) == 8
    assert next(iter(labels)) == "baseline, model=micro, optimizer.lr=0.001"


def test_sweep_jobs_are_sorted_by_number_and_evaluations_are_no_runs(tmp_path: Path) -> None:
    for number in range(11):
        fake_run(tmp_path / "sweep" / str(number), seed=number)
    evaluation = fake_evaluation(tmp_path / "sweep" / "0", "first", [[True]])
    for name in ("status.json", "config.yaml"):
        (evaluation / name).write_text((tmp_path / "sweep" / "0" / name).read_text())
    assert [run.seed for run in find_runs([tmp_path])] == list(range(11))


def test_a_run_given_twice_is_found_once(tmp_path: Path) -> None:
    fake_run(tmp_path / "a")
    assert len(find_runs([tmp_path, tmp_path / "a", tmp_path / "." / "a"])) == 1


@pytest.mark.parametrize(("name", "problem"), [("missing", "does not exist"), ("empty", "contains no run")])
def test_a_folder_without_runs_is_an_error_with_a_remedy(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InputError, match=f"{name}: {problem}; name the folder of a run, of a sweep, or of several runs"
    ):
        find_runs([tmp_path / name])


def test_missing_files_are_read_as_empty(tmp_path: Path) -> None:
    run = RunRecord(fake_run(tmp_path / "a", state="FAILED"))
    assert (run.summary, run.samples, run.pretrain_metrics, run.tokens, run.evaluations) == ({}, [], [], {}, [])
    assert run.series("val/loss") == [(10, 2.0), (20, 1.0)]
    assert run.name == "a"
