"""Tests of running a study with fake runs: its phases, its stop rule, interruptions, and departures from its lock."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from tests.support.fake_runs import fake_run
from tests.support.fake_study_job import end_loss
from wmtp.config.schema import CheckedConfig
from wmtp.errors import InputError
from wmtp.runtime.console import Console
from wmtp.runtime.run_dir import SAVED_OVERRIDES
from wmtp.studies.collect import collect_study
from wmtp.studies.lock import FILE_NAME, read_lock
from wmtp.studies.options import Arm, StudyOptions
from wmtp.studies.plan import Plan
from wmtp.studies.results import StudyResult
from wmtp.studies.run import StudyRun
from wmtp.studies.start import open_lock

ROOT = Path(__file__).parents[3]
FAKE_JOB = ["-m", "tests.support.fake_study_job"]
FINGERPRINTS = {
    "tokenizer": "bpe", "train_fingerprint": "train",
    "validation_fingerprint": "validation", "test_fingerprint": "test",
}  # fmt: skip
OPTIONS = StudyOptions(
    question="Which arm is best?",
    arms={name: Arm(overrides=[f"algo={algo}"]) for name, algo in
          {"uniform": "baseline", "good": "good", "equal": "equal", "bad": "bad"}.items()},
    baseline="uniform", overrides=[], space={"optimizer.lr": "tag(log, interval(0.005, 0.02))"}, preparations={},
    metric="val/loss", at="last", delta=0.1, effect=0.2, deviation=0.05, horizons=[20, 40], tuning_horizon=20,
    trials=3, sampler="tpe", search_seed=0, tuning_seeds=[100], judging_seeds=[0, 1, 2, 3, 4, 5], min_seeds=3,
    variance_runs=0,
)  # fmt: skip


def compose_fake(overrides: list[str]) -> CheckedConfig:
    """Return the config that the fake run of these overrides has."""
    values = dict(override.partition("=")[::2] for override in overrides)
    folder = Path(os.environ["FAKE_CONFIGS"]) / str(time.monotonic_ns())
    fake_run(folder, algo=values["algo"], seed=int(values["seed"]), **{"optimizer.lr": 0.01, "max_steps": 1})
    return CheckedConfig(OmegaConf.create(yaml.safe_load((folder / "config.yaml").read_text())), [])


@pytest.fixture(autouse=True)
def fake_jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run fake jobs instead of trainings."""
    monkeypatch.setattr("wmtp.studies.jobs.module_arguments", lambda name: FAKE_JOB)
    monkeypatch.setattr("wmtp.studies.start.read_fingerprints", lambda checked: FINGERPRINTS)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("FAKE_CONFIGS", str(tmp_path / "configs"))


def run_study(folder: Path, options: StudyOptions = OPTIONS) -> StudyResult:
    """Run or continue a study with two fake runs at a time."""
    console = Console(quiet=True)
    lock = open_lock(folder, "fake", options, console)
    return StudyRun(folder, lock, 2, console).run(compose_fake)


def calls(folder: Path) -> list[str]:
    """Return the names of the runs that were started, in order."""
    return [json.loads(line)["name"] for line in (folder / "calls").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyResult]:
    """Return the folder and the result of a study that has run without interruption."""
    with pytest.MonkeyPatch.context() as patch:
        fake_jobs.__wrapped__(patch, tmp_path_factory.mktemp("fake"))  # type: ignore[attr-defined]
        folder = tmp_path_factory.mktemp("study")
        return folder, run_study(folder)


def test_a_study_reaches_the_right_verdicts_and_spends_no_seeds_on_decided_arms(
    finished: tuple[Path, StudyResult],
) -> None:
    folder, result = finished
    assert result.comparison is not None
    verdicts = {each.label: each.verdict for each in result.comparison.metrics[0].differences}
    assert (verdicts["good"], verdicts["bad"]) == ("better", "worse")
    assert verdicts["equal"] in ("the same", "undecided")
    assert result.departures == [] and result.open_arms == []
    seeds = {each.label: len(each.pairs) for each in result.comparison.metrics[0].differences}
    judged = [name for name in calls(folder) if name.startswith("judging/good/")]
    assert len(judged) == seeds["good"] * 2 and seeds["good"] < len(OPTIONS.judging_seeds)


def test_every_arm_has_the_same_number_of_trials_and_is_judged_with_its_best_one(
    finished: tuple[Path, StudyResult],
) -> None:
    folder, result = finished
    assert {search.label: len(search.trials) for search in result.searches} == dict.fromkeys(OPTIONS.arms, 3)
    for search in result.searches:
        assert search.chosen is not None
        means = [trial.mean for trial in search.trials]
        assert search.chosen.mean == min(mean for mean in means if mean is not None)
        used = {
            yaml.safe_load(path.read_text())["optimizer"]["lr"]
            for path in (folder / "judging" / search.label).rglob("config.yaml")
        }
        assert {f"{lr!r}" for lr in used} == {search.chosen.settings["optimizer.lr"]}


def test_the_lock_was_written_before_the_first_run_and_is_intact(finished: tuple[Path, StudyResult]) -> None:
    folder, _ = finished
    lock = read_lock(folder)
    assert lock is not None and lock.is_intact and lock.is_complete
    assert lock.options == OPTIONS and lock.data["good"] == FINGERPRINTS
    content = json.loads((folder / FILE_NAME).read_text())
    content["options"]["delta"] = 0.2
    (folder / FILE_NAME).write_text(json.dumps(content))
    try:
        assert any("edited" in departure for departure in collect_study(folder).departures)
    finally:
        content["options"]["delta"] = 0.1
        (folder / FILE_NAME).write_text(json.dumps(content))


def test_an_interrupted_study_resumes_without_a_run_that_ended_being_run_again(
    finished: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    expected, folder = finished[1], tmp_path / "study"
    folder.mkdir()
    (folder / "behavior").write_text(json.dumps({"tuning/bad/trial-1/seed-100": "wait"}))
    (folder / "options.json").write_text("{}")
    code = (
        "import sys; from pathlib import Path; from tests.unit.studies import test_run as t; "
        "from wmtp.runtime.signals import raise_on_signals\n"
        "import wmtp.studies.jobs as jobs, wmtp.studies.start as start\n"
        "jobs.module_arguments = lambda name: t.FAKE_JOB\n"
        "start.read_fingerprints = lambda checked: t.FINGERPRINTS\n"
        "with raise_on_signals():\n    t.run_study(Path(sys.argv[1]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(folder)], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (folder / "tuning/bad/trial-1/seed-100/status.json").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)  # its runs are killed with it
    process.wait()
    before = calls(folder)
    assert "tuning/bad/trial-1/seed-100" in before
    (folder / "behavior").unlink()
    time.sleep(0.5)
    result = run_study(folder)
    again = [name for name in calls(folder) if calls(folder).count(name) > 1]
    assert set(again) <= {"tuning/bad/trial-1/seed-100", *before[-2:]}
    assert [s.trials for s in result.searches] == [s.trials for s in expected.searches]
    assert result.comparison is not None and expected.comparison is not None
    assert result.comparison.metrics == expected.comparison.metrics
    count = len(calls(folder))
    run_study(folder)  # a finished study starts nothing
    assert len(calls(folder)) == count


def test_a_failed_trial_counts_as_a_trial_and_is_not_repeated(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "behavior").write_text(json.dumps({"tuning/good/trial-0/seed-100": "fail"}))
    result = run_study(folder)
    good = next(search for search in result.searches if search.label == "good")
    assert [trial.mean is None for trial in good.trials] == [True, False, False]
    assert len(good.best_of_n) == 2
    run_study(folder)
    assert calls(folder).count("tuning/good/trial-0/seed-100") == 1


def test_other_options_are_refused(finished: tuple[Path, StudyResult]) -> None:
    with pytest.raises(InputError, match=r"locked with other options \(trials\); .*folder=DIR"):
        open_lock(finished[0], "fake", replace(OPTIONS, trials=12), Console(quiet=True))


def _copy(folder: Path, target: Path) -> Path:
    subprocess.run(["cp", "-r", str(folder), str(target)], check=True)
    return target


def _add_run(study: Path, name: str, arm: str, seed: int, lr: float, **options: Any) -> None:
    algo = OPTIONS.arms[arm].overrides[0].removeprefix("algo=")
    updates = int(name.split("/")[2].removeprefix("updates-")) if name.startswith("judging") else 20
    losses = [3.0] * (updates // 10 - 1) + [end_loss(algo, lr, updates, seed)]
    values = {"optimizer.lr": lr, "max_steps": updates, **options}
    fake_run(study / name, algo=algo, seed=seed, val_losses=losses, **values)
    (study / name / SAVED_OVERRIDES).write_text(json.dumps([f"optimizer.lr={lr}"]))


def test_a_study_with_more_trials_of_one_arm_is_found_out(finished: tuple[Path, StudyResult], tmp_path: Path) -> None:
    study = _copy(finished[0], tmp_path / "unfair")
    assert collect_study(study).departures == []  # the control: the copy alone departs from nothing
    for number in range(3, 12):
        _add_run(study, f"tuning/good/trial-{number}/seed-100", "good", 100, 0.01, started="2099-01-01T00:00:00+00:00")
    assert collect_study(study).departures[0] == (
        "unequal search: good has 12 trials, and the lock says 3 for every arm"
    )


@pytest.mark.parametrize(
    ("name", "seed", "options", "departure"),
    [
        ("judging/good/updates-40/seed-100", 100, {}, "good has judging runs with the seeds 100"),
        ("judging/good/updates-80/seed-0", 0, {}, "good has judged runs with other horizons: updates-80"),
        ("judging/equal/updates-40/seed-0", 0, {"lr": 0.012}, "equal: 1 run with other settings than its best trial"),
        ("tuning/good/trial-0/seed-100", 100, {"provenance": {"train_fingerprint": "more"}},
         "good: train fingerprint differs from the lock in 1 run"),
        ("tuning/good/trial-0/seed-100", 100, {"data.num_train": 400},
         "good: data.num_train differs from the lock in 1 of"),
        ("tuning/good/trial-0/seed-100", 100, {"started": "2000-01-01T00:00:00+00:00"},
         "1 run started before the lock was written"),
        ("judging/new/updates-40/seed-0", 0, {}, "new is not an arm of the lock"),
    ],
)  # fmt: skip
def test_departures_from_the_lock_are_found(
    finished: tuple[Path, StudyResult], tmp_path: Path, name: str, seed: int, options: dict[str, Any], departure: str
) -> None:
    study = _copy(finished[0], tmp_path / "study")
    subprocess.run(["rm", "-rf", str(study / name)], check=True)
    arm = name.split("/")[1] if name.split("/")[1] in OPTIONS.arms else "good"
    found = next(search for search in finished[1].searches if search.label == arm)
    assert found.chosen is not None
    settings = found.trials[0] if name.startswith("tuning") else found.chosen
    lr = options.pop("lr", float(settings.settings["optimizer.lr"]))
    _add_run(study, name, arm, seed, lr, **{"started": "2099-01-01T00:00:00+00:00", **options})
    assert any(each.startswith(departure) for each in collect_study(study).departures)


def test_the_plan_gives_each_stage_its_share_of_the_updates(tmp_path: Path) -> None:
    arms = {"uniform": Arm(), "critic": Arm(overrides=["algo=critic"], updates=0.6, stage_1=0.4)}
    plan = Plan(replace(OPTIONS, arms=arms, overrides=["data=tasks"]), tmp_path)
    overrides = plan.judged("critic", {"optimizer.lr": 0.01}, 3)[0].overrides
    assert overrides[:3] == ["data=tasks", "algo=critic", "optimizer.lr=0.01"]
    assert {"max_steps=24", "pretrain.max_steps=16", "seed=3", "early_stopping=none"} <= set(overrides)
    assert not any(each.startswith("pretrain") for each in plan.judged("uniform", {}, 3)[0].overrides)
