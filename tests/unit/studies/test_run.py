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
from wmtp.errors import InputError, ProcessFailed
from wmtp.runtime.atomic_files import encode_json
from wmtp.runtime.console import Console
from wmtp.runtime.run_dir import SAVED_OVERRIDES
from wmtp.statistics.token_factor import HorizonPoint, mean_token_factor, token_ratio
from wmtp.statistics.variance import PairingGain
from wmtp.studies.collect import StudyFolder, collect_study
from wmtp.studies.lock import FILE_NAME, complete_lock, model_hashes, read_lock, write_lock
from wmtp.studies.options import Arm, Preparation, StudyOptions
from wmtp.studies.output import to_dict
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


def test_a_killed_run_stops_the_study_until_it_is_repeated(finished: tuple[Path, StudyResult], tmp_path: Path) -> None:
    """Otherwise the arm would be judged with other settings before and after the repetition."""
    folder, killed = tmp_path / "study", "tuning/good/trial-0/seed-100"
    folder.mkdir()
    (folder / "behavior").write_text(json.dumps({killed: "kill"}))
    with pytest.raises(ProcessFailed, match=r"^1 run ended without a result, .*trial-0/seed-100 with exit code -?\d+"):
        run_study(folder)
    assert len(calls(folder)) == len(OPTIONS.arms)  # the other runs of the step have ended, and no step followed
    (folder / "behavior").unlink()
    result = run_study(folder)
    assert calls(folder).count(killed) == 2
    assert [search.trials for search in result.searches] == [search.trials for search in finished[1].searches]


def test_a_failed_preparation_ends_the_study(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "behavior").write_text(json.dumps({"preparations/start": "fail"}))
    start = Preparation(overrides=["algo=baseline", "optimizer.lr=0.01", "max_steps=20", "seed=0"])
    options = replace(OPTIONS, preparations={"start": start})
    with pytest.raises(InputError, match=r"start: the preparation failed; see .*preparations_start.log; to repeat it"):
        run_study(folder, options)
    assert calls(folder) == ["preparations/start"]


def test_the_factor_of_tokens_uses_the_ends_of_each_seed(finished: tuple[Path, StudyResult]) -> None:
    arms = {each.label: each for each in finished[1].horizons}
    found = arms["equal"].factor
    ends = {label: [horizon.values for horizon in arms[label].horizons] for label in ("uniform", "equal")}
    seeds = list(ends["equal"][0])
    ratios = [
        token_ratio(*(
            [HorizonPoint(horizon.tokens, values[seed])
             for horizon, values in zip(arms[label].horizons, ends[label], strict=True)]
            for label in ("uniform", "equal")
        ))
        for seed in seeds
    ]  # fmt: skip
    assert found == mean_token_factor(ratios) and found.num_seeds == len(seeds) > 2
    assert found.low is not None and found.factor is not None and found.low < found.factor


def test_an_arm_without_any_value_is_closed_at_the_first_look(
    finished: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    study = _copy(finished[0], tmp_path / "study")
    for status in (study / "judging" / "good" / "updates-40").rglob("status.json"):
        status.write_text(json.dumps(json.loads(status.read_text()) | {"state": "FAILED", "exit_code": 1}))
    result = StudyFolder(study)
    assert "good" not in result.open_arms(result.comparison(3), 3)
    comparison = result.comparison()
    assert comparison is not None
    bad = next(each for each in comparison.metrics[0].differences if each.label == "bad")
    assert bad.level == pytest.approx(0.05 / 3), "the arm without a value is still one of three comparisons"


def test_a_run_that_fails_after_the_decision_does_not_change_it(
    finished: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    study = _copy(finished[0], tmp_path / "study")
    _add_run(study, "judging/uniform/updates-40/seed-5", "uniform", 5, 0.01, state="FAILED")
    status = study / "judging/uniform/updates-40/seed-5/status.json"
    status.write_text(json.dumps(json.loads(status.read_text()) | {"exit_code": 1}))
    comparison = StudyFolder(study).comparison()
    assert comparison is not None
    assert {each.label: each.verdict for each in comparison.metrics[0].differences}["bad"] == "worse"


def test_a_change_of_the_validation_data_is_a_departure_and_no_comparison_is_made(
    finished: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    study = _copy(finished[0], tmp_path / "study")
    name = "judging/good/updates-40/seed-0"
    lr = float(yaml.safe_load((study / name / "config.yaml").read_text())["optimizer"]["lr"])
    subprocess.run(["rm", "-rf", str(study / name)], check=True)
    _add_run(study, name, "good", 0, lr, provenance={"validation_fingerprint": "other"})
    result = collect_study(study)
    assert result.comparison is None
    assert result.departures[0].startswith("the runs cannot be compared: ")
    assert "good: validation fingerprint differs from the lock in 1 run" in result.departures


def test_numbers_that_are_not_finite_are_null_in_study_json(finished: tuple[Path, StudyResult]) -> None:
    gain = PairingGain(1.0, 0.0, float("inf"))  # of an arm that is equal to the baseline
    content = json.loads(encode_json(to_dict(replace(finished[1], pairing={"good": gain}))))
    assert content["pairing"]["good"] == {"correlation": 1.0, "variance_ratio": 0.0, "seeds_saved": None}
    assert content["departures"] == [] and len(content["searches"][0]["trials"]) == 3


def test_other_options_are_refused(finished: tuple[Path, StudyResult]) -> None:
    with pytest.raises(InputError, match=r"locked with other options \(trials\); .*folder=DIR"):
        open_lock(finished[0], "fake", replace(OPTIONS, trials=12), Console(quiet=True))


def test_an_edited_lock_is_refused(finished: tuple[Path, StudyResult], tmp_path: Path) -> None:
    study = _copy(finished[0], tmp_path / "study")
    content = json.loads((study / FILE_NAME).read_text())
    content["options"]["delta"] = 0.15
    (study / FILE_NAME).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"study.lock.json: was edited after it was written; restore it"):
        open_lock(study, "fake", replace(OPTIONS, delta=0.15), Console(quiet=True))


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


def test_a_study_with_fewer_trials_of_the_baseline_is_found_out(
    finished: tuple[Path, StudyResult], tmp_path: Path
) -> None:
    study = _copy(finished[0], tmp_path / "unfair")
    for number in (1, 2):
        subprocess.run(["rm", "-rf", str(study / f"tuning/uniform/trial-{number}")], check=True)
    assert "unequal search: uniform has 1 trial, and the lock says 3 for every arm" in collect_study(study).departures


def test_another_model_of_a_preparation_is_found_out(finished: tuple[Path, StudyResult], tmp_path: Path) -> None:
    study = _copy(finished[0], tmp_path / "study")
    lock = read_lock(study)
    assert lock is not None
    start = replace(lock.options, preparations={"start": Preparation(overrides=[])})
    manifest = study / "preparations/start/checkpoints/step_000020/manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    locked = complete_lock(replace(lock, options=start), lock.data, lock.configs, model_hashes(Plan(start, study)))
    write_lock(study, locked)
    assert collect_study(study).departures == []
    manifest.write_text('{"files": {}}')
    assert collect_study(study).departures == ["the model of the preparation start differs from the lock"]
    manifest.unlink()
    assert collect_study(study).departures == ["the model of the preparation start is missing"]


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
        ("judging/good/updates-40/seed-0", 0, {"max_steps": 160}, "good: 1 run with another limit of updates"),
        ("tuning/good/trial-0/seed-100", 100, {"max_steps": 80}, "good: 1 run with another limit of updates"),
        ("tuning/good/trial-0/seed-100", 100, {"lr": 0.5}, "good: trial 0 is not in the search space of the lock"),
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
