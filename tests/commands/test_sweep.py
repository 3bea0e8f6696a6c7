"""Sweeps: which jobs there are, what becomes of them, and how those that did not finish are tried again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import TINY, run_command, start_training
from wmtp.config.schema import ConfigError, ConfigIssue
from wmtp.distributed.launcher import _worker_environment
from wmtp.errors import InputError, PendingError
from wmtp.runtime.processes import CORES_VARIABLE, limit_threads, num_cores
from wmtp.runtime.run_dir import SWEEP, read_status
from wmtp.sweep import slurm_launcher as slurm
from wmtp.sweep.grid import job_labels, parse_grid
from wmtp.sweep.local_launcher import run_local
from wmtp.sweep.sweep import Sweep

GRID = ["algo=critic", "algo.beta=0.5,0.9,1.2", "early_stopping.patience=5,10", "seed=0,1,2"]
FAKE = ["-m", "tests.support.fake_job"]
SHELL = "import sys, time, os, signal; "


# Grid of jobs


def test_a_grid_has_one_job_per_combination_and_overrides_replace_the_experiment() -> None:
    grid = parse_grid("train", GRID)
    assert grid.jobs[0] == ["algo=critic", "algo.beta=0.5", "early_stopping.patience=5", "seed=0"]
    assert len({tuple(job) for job in grid.jobs}) == 18
    assert job_labels(grid.jobs)[-1] == "algo.beta=1.2 early_stopping.patience=10 seed=2"
    named = parse_grid("train", ["experiment=sweep/critic_beta"])
    assert len(named.jobs) == 9 and all("experiment=sweep/critic_beta" in job for job in named.jobs)
    fewer = parse_grid("train", ["experiment=sweep/critic_beta", "seed=7", "max_steps=3"])
    assert [job.count("seed=7") for job in fewer.jobs] == [1, 1, 1]
    assert not any("seed=0" in job for job in fewer.jobs)


def test_sweep_settings_are_not_job_overrides() -> None:
    grid = parse_grid("train", ["seed=0,1", "sweep.jobs=2", "hydra.sweep.dir='a folder'", "sweep.metric=val/mtp_loss"])
    assert grid.jobs == [["seed=0"], ["seed=1"]]
    assert (grid.options.jobs, grid.options.metric, grid.folder) == (2, "val/mtp_loss", Path("a folder"))
    assert parse_grid("train", ["sweep.resume=here"]).has_job_overrides is False


def test_arms_outside_the_grid_become_separate_jobs() -> None:
    arms = "sweep.arms=['algo=baseline pretrain=critic','algo=critic algo.beta=0.5']"
    assert job_labels(parse_grid("train", [arms, "seed=0,1"]).jobs) == [
        "algo=baseline pretrain=critic seed=0", "algo=critic algo.beta=0.5 seed=0",
        "algo=baseline pretrain=critic seed=1", "algo=critic algo.beta=0.5 seed=1",
    ]  # fmt: skip


def test_short_group_syntax_works_in_arms_and_lists() -> None:
    arms = parse_grid("train", ["sweep.arms=['algo=shuffled algo.of=rho1','']"])
    assert arms.jobs == [["algo=shuffled", "algo/of=rho1"], []]
    stage = parse_grid("train", ["algo=critic", "pretrain.early_stopping=none,patience"])
    assert [job[1] for job in stage.jobs] == [
        f"early_stopping@pretrain.early_stopping={n}" for n in ("none", "patience")
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("sweep.jobs=0", "greater than or equal to 1"),
        ("hello", "is not an override"),
        ("sweep.job=2", "did you mean sweep.jobs?"),
        ("dry_run=true,false", "has one value for all jobs"),
        ("hydra.sweep.subdir=x", "under its number"),
        ("hydra/launcher=submitit_nowhere", "wmtp[slurm]"),
        ("seed=interval(0,1)", "does not support sweep type"),
    ],
)
def test_an_invalid_sweep_is_refused(argument: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_grid("train", ["seed=0,1", argument])
    assert message in str(error.value)


# Sweeps of fake jobs


def sound(overrides: list[str]) -> list[ConfigIssue]:
    return []


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Change to an empty folder, use fake jobs, and record the calls to MLflow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wmtp.sweep.sweep.module_arguments", lambda name: FAKE)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return []


def run(arguments: list[str], told: list[str]) -> int:
    return Sweep("train", arguments, sound).run(lambda folder, state: told.append(state))


def jobs_of(folder: str) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = json.loads((Path(folder) / SWEEP).read_text())["jobs"]
    return jobs


def calls(folder: str) -> list[dict[str, Any]]:
    path = Path(folder) / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_failed_and_killed_jobs_run_again_on_resume(told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    behaviors = {7: "fail", 12: "die"}
    Path("sweep").mkdir()
    for number, behavior in behaviors.items():
        Path(f"sweep/behavior-{number}").write_text(behavior)
    assert run([*GRID, "hydra.sweep.dir=sweep", "sweep.jobs=2"], told) == 137
    jobs = jobs_of("sweep")
    assert [job["number"] for job in jobs if job["state"] != "FINISHED"] == [7, 12] and len(calls("sweep")) == 18
    assert (jobs[7]["state"], jobs[7]["exit_code"], jobs[7]["error"]) == ("FAILED", 1, "ValueError: no luck")
    assert jobs[7]["traceback"].startswith("Traceback") and "somewhere" in jobs[7]["traceback"]
    assert (jobs[12]["state"], jobs[12]["exit_code"]) == ("KILLED", 137)
    assert read_status(Path("sweep/12"))["state"] == "KILLED"
    out = capsys.readouterr().out
    assert "16 of 18 jobs finished" in out and "sweep.resume=sweep" in out and "no luck" in out

    for number in behaviors:
        Path(f"sweep/behavior-{number}").unlink()
    assert run([*GRID, "sweep.resume=sweep"], told) == 0
    again = calls("sweep")[18:]
    assert [(call["job"], bool(call["resume"])) for call in again] == [("7", False), ("12", True)]
    assert all(job["state"] == "FINISHED" for job in jobs_of("sweep")) and Path("sweep/7.attempt-1/train.log").exists()
    assert told == ["KILLED", "FINISHED"] and read_status(Path("sweep"))["state"] == "FINISHED"
    assert run(["sweep.resume=sweep"], told) == 0 and len(calls("sweep")) == 20, "nothing was left to do"


def test_the_table_has_one_row_per_group_of_seeds_best_first(
    told: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["algo=critic", "algo.beta=0.9,0.5", "seed=0,1,2", "hydra.sweep.dir=sweep", "sweep.jobs=4"], told) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row.split("│")[1:5] for row in rows] == [
        [" algo.beta=0.5 ", " 0, 1, 2 ", "        0.5100 ", "  ± 0.0100 "],
        [" algo.beta=0.9 ", " 0, 1, 2 ", "        0.9100 ", "  ± 0.0100 "],
    ]
    assert {call["cores"] for call in calls("sweep")} == {str(max(1, num_cores() // 4))}


def sweep_with_a_job_that_waits(number: int, seeds: str, module: list[str]) -> "subprocess.Popen[str]":
    """Start a sweep in a separate process, and return it as soon as this job waits."""
    Path("sweep").mkdir()
    Path(f"sweep/behavior-{number}").write_text("wait")
    script = (
        "import sys; from wmtp.runtime.signals import raise_on_signals; import wmtp.sweep.sweep as r; "
        f"r.module_arguments = lambda name: {module!r}\n"
        "with raise_on_signals():\n    sys.exit(r.run_sweep('train', sys.argv[1:], lambda o: [], lambda f, s: None))\n"
    )
    command = [sys.executable, "-c", script, seeds, "hydra.sweep.dir=sweep"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "waiting" not in (line := process.stdout.readline()):
        assert line, "it ended early"
    return process


def test_an_interruption_ends_running_jobs_and_keeps_the_others_for_resume(told: list[str]) -> None:
    process = sweep_with_a_job_that_waits(1, "seed=0,1,2", FAKE)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert [(job["state"], job["exit_code"]) for job in jobs_of("sweep")] == [
        ("FINISHED", 0), ("KILLED", 130), ("PENDING", None),
    ]  # fmt: skip
    assert read_status(Path("sweep"))["state"] == "KILLED"
    Path("sweep/behavior-1").unlink()
    assert run(["seed=0,1,2", "sweep.resume=sweep"], told) == 0
    assert [call["job"] for call in calls("sweep")] == ["0", "1", "1", "2"]


def test_a_killed_sweep_kills_its_jobs_and_can_be_resumed(told: list[str]) -> None:
    """Otherwise an orphaned job would write to the same files as the resumed job."""
    process = sweep_with_a_job_that_waits(0, "seed=0,1", ["-c", ORPHAN])
    with pytest.raises(InputError, match="in use"):
        run(["sweep.resume=sweep"], told)
    process.kill()
    process.wait()
    Path("sweep/behavior-0").unlink()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            code = run(["sweep.resume=sweep"], told)
            break
        except InputError:  # the killed job has not exited yet
            time.sleep(0.1)
    assert code == 0 and [job["attempts"] for job in jobs_of("sweep")] == [2, 1]


ORPHAN = (
    "import os, sys; from wmtp.runtime.processes import kill_on_parent_death; "
    "from wmtp.sweep.local_launcher import SWEEP_PID_VARIABLE; "
    "kill_on_parent_death(int(os.environ[SWEEP_PID_VARIABLE])); "
    "from tests.support.fake_job import main; main(sys.argv[1:])"
)


def test_a_sweep_with_other_jobs_or_in_a_used_folder_is_refused(told: list[str]) -> None:
    assert run(["seed=0,1", "hydra.sweep.dir=sweep"], told) == 0
    with pytest.raises(ConfigError, match="sweep of other jobs"):
        run(["seed=0,1,2", "sweep.resume=sweep"], told)
    with pytest.raises(ConfigError, match="already contains a sweep"):
        run(["seed=0,1", "hydra.sweep.dir=sweep"], told)
    with pytest.raises(InputError, match="is not the folder of a sweep"):
        run(["sweep.resume=elsewhere"], told)
    assert len(calls("sweep")) == 2


def test_sweeps_started_together_have_separate_folders(told: list[str]) -> None:
    sweeps = [Sweep("train", ["seed=0,1"], sound) for _ in range(5)]
    assert len({sweep.folder for sweep in sweeps}) == 5
    assert all(sweep.folder.name.endswith("-sweep") for sweep in sweeps)


def test_invalid_jobs_are_refused_singly_or_all_together(told: list[str]) -> None:
    def check(overrides: list[str]) -> list[ConfigIssue]:
        return [ConfigIssue("seed", "1", "is wrong")] if "seed=1" in overrides else []

    sweep = Sweep("train", ["seed=0,1,2", "hydra.sweep.dir=sweep"], check)
    assert sweep.run(lambda folder, state: told.append(state)) == 2 and told == ["FAILED"]
    jobs = jobs_of("sweep")
    assert [job["state"] for job in jobs] == ["FINISHED", "FAILED", "FINISHED"]
    assert jobs[1]["error"] == "seed=1: is wrong" and not Path("sweep/1").exists()
    with pytest.raises(ConfigError, match="is wrong"):
        Sweep("train", ["seed=1", "hydra.sweep.dir=other"], check)
    assert not Path("other").exists()


def test_a_sweep_with_a_running_job_is_not_changed(told: list[str]) -> None:
    Path("sweep").mkdir()
    Path("sweep/behavior-0").write_text("fail")
    assert run(["seed=0", "hydra.sweep.dir=sweep"], told) == 1
    manifest = json.loads(Path("sweep", SWEEP).read_text())
    manifest["jobs"][0]["state"] = "RUNNING"
    Path("sweep", SWEEP).write_text(json.dumps(manifest))
    Path("sweep/0/status.json").write_text('{"state": "RUNNING", "exit_code": null, "error": null}')
    script = (
        "from tests.support.fake_job import *; "
        "hold = FolderLock(Path('sweep/0')); print('holds', flush=True); time.sleep(30)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and "holds" in holder.stdout.readline()
    with pytest.raises(InputError, match="in use"):
        run(["sweep.resume=sweep"], told)
    holder.kill()
    holder.wait()
    assert read_status(Path("sweep"))["state"] == "FAILED"


@pytest.mark.parametrize("error", [PendingError("the server is away"), RuntimeError("out of luck")])
def test_a_tracker_error_does_not_change_the_end_of_a_sweep(told: list[str], error: Exception) -> None:
    def tell(folder: Path, state: str) -> None:
        raise error

    Path("sweep").mkdir()
    Path("sweep/behavior-0").write_text("fail")
    sweep = Sweep("train", ["seed=0,1", "hydra.sweep.dir=sweep"], sound)
    if isinstance(error, PendingError):
        assert sweep.run(tell) == 1, "a failed job is worse than a server that is away"
    else:
        with pytest.raises(RuntimeError):
            sweep.run(tell)
    assert read_status(Path("sweep"))["state"] == "FAILED"


def test_a_job_without_a_summary_failed_and_the_others_continue(told: list[str]) -> None:
    Path("sweep").mkdir()
    Path("sweep/behavior-0").write_text("forget")
    assert run(["seed=0,1", "hydra.sweep.dir=sweep"], told) == 1
    assert [job["state"] for job in jobs_of("sweep")] == ["FAILED", "FINISHED"]
    assert "summary.json cannot be read" in jobs_of("sweep")[0]["error"] and told == ["FAILED"]


# Processes


def test_the_requested_number_of_jobs_runs_at_once(tmp_path: Path) -> None:
    note = "open(sys.argv[1], 'a').write(f'{time.time()} %s\\n'); "
    code = SHELL + note % "+" + "time.sleep(0.4); " + note % "-"

    def most_at_once(limit: int) -> int:
        path = tmp_path / f"times-{limit}"
        commands = {n: [sys.executable, "-S", "-c", code, str(path)] for n in range(4)}
        consoles = {n: tmp_path / str(n) for n in commands}
        run_local(commands, consoles, limit, lambda n: None, lambda n, code, words: None)
        steps = [line.split()[1] for line in sorted(path.read_text().splitlines())]
        return max(steps[:i].count("+") - steps[:i].count("-") for i in range(len(steps) + 1))

    assert most_at_once(1) == 1 and most_at_once(2) == 2


def test_the_last_stderr_lines_of_a_process_are_kept(tmp_path: Path) -> None:
    code = SHELL + "print('on the screen'); print('some words', file=sys.stderr); os.kill(os.getpid(), signal.SIGTERM)"
    ends: list[tuple[int, int, str]] = []
    run_local({3: [sys.executable, "-c", code]}, {3: tmp_path / "c"}, 1, lambda n: None, lambda *end: ends.append(end))
    assert ends == [(3, 143, "some words\n")]


def test_a_process_that_cannot_start_failed_and_the_others_continue(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    commands = {n: [sys.executable, "-S", "-c", "pass"] for n in range(3)}
    consoles = {0: tmp_path / "0", 1: tmp_path / "taken" / "console", 2: tmp_path / "2"}
    ends: dict[int, tuple[int, str]] = {}
    run_local(commands, consoles, 2, lambda n: None, lambda n, code, words: ends.update({n: (code, words)}))
    assert {n: code for n, (code, _) in ends.items()} == {0: 0, 1: 1, 2: 0} and "cannot be started" in ends[1][1]


def test_a_jobs_processes_share_its_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CORES_VARIABLE, "4")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        limit_threads()
        assert (num_cores(), torch.get_num_threads()) == (4, 4)
        with _worker_environment(tmp_path, size=2):
            assert os.environ["OMP_NUM_THREADS"] == "2"
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(3)
        limit_threads()
        assert torch.get_num_threads() == 3, "the user has said how many"
    finally:
        torch.set_num_threads(before)


# In Slurm


def test_the_dry_run_shows_the_batch_script(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    grid = parse_grid(
        "train",
        ["seed=0,1", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=4",
         "hydra.launcher.timeout_min=600", "hydra.launcher.mem_gb=64", "hardware=cpu"],
    )  # fmt: skip
    assert slurm.is_submitted(grid.launcher) and grid.jobs == [["seed=0", "hardware=cpu"], ["seed=1", "hardware=cpu"]]
    text = slurm.batch_script(grid.launcher, tmp_path, ["python", "-m", "wmtp.train", "seed=0"], 2)
    wanted = "--partition=gpu", "--gpus-per-node=4", "--time=600", "--mem=64GB", "--array=0-1", "python -m wmtp.train"
    assert [each for each in wanted if each not in text] == []


def test_hardware_of_the_cluster_only_is_not_an_error(told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")

    def check(overrides: list[str]) -> list[ConfigIssue]:
        return [ConfigIssue("hardware.device", "cuda", "this machine has no cuda device")]

    arguments = ["seed=0,1", "hardware=a100x4", "dry_run=true"]
    submitted = Sweep("train", [*arguments, "hydra/launcher=submitit_slurm"], check)
    assert submitted.dry_run() == 0 and "#SBATCH --array=0-1" in capsys.readouterr().out
    assert Sweep("train", arguments, check).dry_run() == 2, "the control: here it is one"
    assert not list(Path().iterdir()), "a rehearsal keeps nothing"


@pytest.mark.slow
def test_jobs_are_submitted_like_hydras_launcher(told: list[str]) -> None:
    """Uses the local executor of submitit."""
    pytest.importorskip("submitit")
    Path("sweep").mkdir()
    Path("sweep/behavior-1").write_text("fail")
    arguments = ["seed=0,1", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep"]
    assert run(arguments, told) == 1
    assert [job["state"] for job in jobs_of("sweep")] == ["FINISHED", "FAILED"]
    Path("sweep/behavior-1").unlink()
    assert run([*arguments[:2], "sweep.resume=sweep"], told) == 0 and len(calls("sweep")) == 3


# Real trainings


@pytest.mark.slow
def test_killed_trainings_resume_from_their_checkpoints(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second job is killed after its first checkpoint; the resumed sweep gives the same result."""
    overrides = [*TINY, "tracking=none", f"cache_dir={cache}", "report=false", "num_samples=0", "save_interval=5",
                 "max_steps=40", "num_epochs=100", "log_interval=1", "early_stopping=none"]  # fmt: skip
    process = start_training(tmp_path, "-m", *overrides, "seed=0,1", "hydra.sweep.dir=sweep", "sweep.jobs=2")
    victim = tmp_path / "sweep" / "1"
    deadline = time.monotonic() + 180
    while not list(victim.glob("checkpoints/step_*/manifest.json")):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(read_status(victim)["pid"], signal.SIGKILL)
    out, _ = process.communicate(timeout=180)
    states = [job["state"] for job in jobs_of(str(tmp_path / "sweep"))]
    assert process.returncode == 137 and states == ["FINISHED", "KILLED"], out
    monkeypatch.chdir(tmp_path)
    assert run_command(["-m", "sweep.resume=sweep"], monkeypatch) == 0
    assert read_status(victim)["step"] == 40 and (victim / "resumes.jsonl").exists()
    assert "2 of 2 jobs finished" in capsys.readouterr().out
