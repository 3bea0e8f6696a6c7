"""Tests of the search: the same trials under the same seed, after an interruption, and for every arm."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.studies.test_run import OPTIONS
from wmtp.errors import InputError
from wmtp.studies.options import Arm, StudyOptions, option_issues
from wmtp.studies.search import Search
from wmtp.studies.space import parse_space

SPACE = {"optimizer.lr": "tag(log, interval(1e-3, 1e-1))", "algo.beta": "choice(0.5, 1, 2)"}


def search_options(sampler: str, search_seed: int = 0) -> StudyOptions:
    """Return the options of a study that searches two settings with eight trials."""
    options = replace(OPTIONS, search_seed=search_seed, space=SPACE, trials=8)
    return replace(options, sampler="random" if sampler == "random" else "tpe")


def value(settings: dict[str, object]) -> float:
    """Return the value of a trial, which is best at a learning rate of 0.01."""
    return abs(float(str(settings["optimizer.lr"])) - 0.01)


def run_search(folder: Path, options: StudyOptions, *, restart: bool = False) -> list[dict[str, object]]:
    """Return the settings of all trials of two arms. With `restart`, each trial is made by a new search."""
    folder.mkdir()
    search, found = Search(folder, options, lower_is_better=True), []
    for number in range(options.trials):
        for label in ("good", "bad"):
            if restart:
                search = Search(folder, options, lower_is_better=True)
                search.settings(label, number)  # asked for, but interrupted before its value is known
                search = Search(folder, options, lower_is_better=True)
            settings = search.settings(label, number)
            found.append(settings)
            search.record(label, number, None if number == 2 else value(settings))
    return found


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_trials_are_the_same_under_the_same_seed_also_after_interruptions(tmp_path: Path, sampler: str) -> None:
    first = run_search(tmp_path / "first", search_options(sampler))
    assert run_search(tmp_path / "again", search_options(sampler)) == first
    assert run_search(tmp_path / "restarted", search_options(sampler), restart=True) == first
    assert run_search(tmp_path / "other", search_options(sampler, search_seed=1)) != first
    assert first[0::2][:3] == first[1::2][:3]  # both arms have the same random values
    assert len({str(settings) for settings in first[0::2]}) == 8


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_process_that_is_killed_leaves_no_trial_without_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    expected = run_search(tmp_path / "whole", search_options(sampler))[0]
    folder = tmp_path / "killed"
    folder.mkdir()
    with monkeypatch.context() as patch:  # the first thing after the trial was added, if it is added without settings
        patch.setattr("optuna.trial.Trial._suggest", lambda *arguments: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            Search(folder, search_options(sampler), lower_is_better=True).settings("good", 0)
    assert Search(folder, search_options(sampler), lower_is_better=True).settings("good", 0) == expected


def test_tpe_uses_the_values_of_earlier_trials(tmp_path: Path) -> None:
    random, tpe = (run_search(tmp_path / name, search_options(name)) for name in ("random", "tpe"))
    assert random[:6] == tpe[:6] and random[6:] != tpe[6:]  # three random trials of each of two arms


@pytest.mark.parametrize("text", ["3", "interval(3, 1)", "tag(log, interval(0, 1))", "foo("])
def test_an_invalid_range_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write choice"):
        parse_space({"optimizer.lr": text})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"baseline": "unifrom"}, "study.baseline"),
        ({"judging_seeds": [0, 1, 100]}, "study.judging_seeds"),
        ({"horizons": [20, 20]}, "study.horizons"),
        ({"min_seeds": 9}, "study.min_seeds"),
        ({"delta": 0.3}, "study.delta"),
        ({"space": {"optimizer.lr": "0.1"}}, "study.arms.uniform.space"),
        ({"overrides": ["model.path=$start"]}, "study.overrides"),
        ({"arms": {"uniform": Arm(overrides=["model.path=$start"]), "good": Arm()}}, "study.arms.uniform"),
    ],
)
def test_contradictions_in_the_options_are_issues(changes: dict[str, object], key: str) -> None:
    assert next(option_issues(OPTIONS), None) is None
    assert key in {issue.key for issue in option_issues(replace(OPTIONS, **changes))}  # type: ignore[arg-type]
