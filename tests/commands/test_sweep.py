"""Tests of sweeps: the grid of jobs, the states of jobs, and resuming jobs that did not finish."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.conftest import TINY, run_command
from tests.support.fake_runs import fake_run
from tests.support.forking import ForkServer
from wmtp.config.schema import ConfigError, ConfigIssue
from wmtp.distributed.launcher import start_workers
from wmtp.errors import InputError, PendingError
from wmtp.report.run_record import find_runs
from wmtp.runtime.processes import CORES_VARIABLE, limit_threads, num_cores
from wmtp.runtime.run_dir import SWEEP, read_status
from wmtp.runtime.sweep_jobs import job_labels
from wmtp.sweep import slurm_launcher as slurm
from wmtp.sweep.grid import SweepOptions, parse_grid
from wmtp.sweep.local_launcher import run_local
from wmtp.sweep.progress import SweepProgress
from wmtp.sweep.results import print_results
from wmtp.sweep.sweep import PreparedJob, Sweep

GRID = ["algo=critic", "algo.beta=0.5,0.9,1.2", "early_stopping.patience=5,10", "seed=0,1,2"]
"""Overrides of a sweep with 18 jobs."""
FAKE_JOB = ["-m", "tests.support.fake_job"]
"""Arguments of Python that start a fake job."""
LINKED_FAKE_JOB = (
    "import os, sys; from wmtp.runtime.processes import kill_on_parent_death; "
    "from wmtp.runtime.processes import PARENT_VARIABLE; "
    "kill_on_parent_death(int(os.environ[PARENT_VARIABLE])); "
    "from tests.support.fake_job import main; main(sys.argv[1:])"
)
"""The code of a fake job that is killed when the process of its sweep dies."""
IMPORTS = "import sys, time, os, signal; "
"""The imports of the small programs that tests start."""


# Grid of jobs


def test_a_grid_has_one_job_per_combination_and_overrides_replace_experiment_values() -> None:
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


def test_each_arm_becomes_one_job_per_seed() -> None:
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


def no_issues(overrides: list[str]) -> PreparedJob:
    """Return a job without config issues."""
    return PreparedJob([], {"overrides": overrides})


@pytest.fixture
def sent_states(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Change to an empty folder, use fake jobs, and return an empty list for the states sent to MLflow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("wmtp.sweep.sweep.module_arguments", lambda name: FAKE_JOB)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    return []


def run(arguments: list[str], sent_states: list[str]) -> int:
    """Run a sweep of fake jobs and return its exit code; append the state sent to MLflow to `sent_states`."""
    return Sweep("train", arguments, no_issues).run(lambda folder, state: sent_states.append(state))


def read_jobs(folder: str) -> list[dict[str, Any]]:
    """Return the jobs that are recorded in a sweep's folder."""
    jobs: list[dict[str, Any]] = json.loads((Path(folder) / SWEEP).read_text())["jobs"]
    return jobs


def read_calls(folder: str) -> list[dict[str, Any]]:
    """Return one record for each start of a fake job."""
    path = Path(folder) / "calls"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.slow
def test_failed_and_killed_jobs_run_again_on_resume(sent_states: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    behaviors = {7: "fail", 12: "die"}
    Path("sweep").mkdir()
    for number, behavior in behaviors.items():
        Path(f"sweep/behavior-{number}").write_text(behavior)
    assert run([*GRID, "hydra.sweep.dir=sweep", "sweep.jobs=2"], sent_states) == 137
    jobs = read_jobs("sweep")
    assert [job["number"] for job in jobs if job["state"] != "FINISHED"] == [7, 12] and len(read_calls("sweep")) == 18
    assert (jobs[7]["state"], jobs[7]["exit_code"], jobs[7]["error"]) == ("FAILED", 1, "ValueError: no luck")
    assert jobs[7]["traceback"].startswith("Traceback") and "somewhere" in jobs[7]["traceback"]
    assert (jobs[12]["state"], jobs[12]["exit_code"]) == ("KILLED", 137)
    assert read_status(Path("sweep/12"))["state"] == "KILLED"
    out = capsys.readouterr().out
    assert "16 of 18 jobs finished" in out and " -m sweep.resume=sweep\n" in out and "no luck" in out

    for number in behaviors:
        Path(f"sweep/behavior-{number}").unlink()
    assert run([*GRID, "sweep.resume=sweep"], sent_states) == 0
    again = read_calls("sweep")[18:]
    assert [(call["job"], bool(call["resume"])) for call in again] == [("7", False), ("12", True)]
    assert all(job["state"] == "FINISHED" for job in read_jobs("sweep"))
    assert Path("sweep/7.attempt-1/train.log").exists()
    assert sent_states == ["KILLED", "FINISHED"] and read_status(Path("sweep"))["state"] == "FINISHED"
    assert run(["sweep.resume=sweep"], sent_states) == 0 and len(read_calls("sweep")) == 20, "no job is left to run"


def test_the_table_has_one_row_per_group_of_seeds_best_first(
    sent_states: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    grid = ["algo=critic", "algo.beta=0.9,0.5", "seed=0,1,2"]
    assert run([*grid, "hydra.sweep.dir=sweep", "sweep.jobs=4"], sent_states) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [row.split("│")[1:5] for row in rows] == [
        [" algo.beta=0.5 ", " 0, 1, 2 ", "        0.5100 ", "  ± 0.0100 "],
        [" algo.beta=0.9 ", " 0, 1, 2 ", "        0.9100 ", "  ± 0.0100 "],
    ]
    assert {call["cores"] for call in read_calls("sweep")} == {str(max(1, num_cores() // 4))}


def test_measures_of_the_end_of_a_run_are_printed_and_can_sort_the_table(tmp_path: Path) -> None:
    probabilities = {"val/canonical_probability": [0.5, 0.25]}
    for algo, top1 in (("critic", 0.25), ("rho1", 0.75)):
        for seed in (0, 1):
            fake_run(
                tmp_path / algo / str(seed), algo=algo, seed=seed, metrics=probabilities,
                weights={"decisive_wrong_top1": top1, "noise_auc": None},
            )  # fmt: skip
    state = SimpleNamespace(finished_runs=lambda: find_runs([tmp_path]), jobs=[])
    texts = {}
    for metric in ("decisive_wrong_top1", "val/loss"):
        console = Console(width=80, record=True, file=io.StringIO())
        print_results(console, state, SweepOptions(metric=metric))  # type: ignore[arg-type]
        texts[metric] = console.export_text()
    rows = [line.split("│")[1:5] for line in texts["decisive_wrong_top1"].splitlines() if line.startswith("│")]
    assert [row[0].strip() for row in rows] == ["rho1", "critic"] and [row[2].strip() for row in rows] == [
        "0.7500",
        "0.2500",
    ]
    for text in texts.values():
        policy, weights = (
            text.split(title)[1] for title in ("Policy, best checkpoint", "Weights and values, last model")
        )
        assert "0.25" in policy.split("Weights")[0] and "probability" in policy
        assert "0.75" in weights and "noise" not in weights
    assert all(len(line) <= 80 for text in texts.values() for line in text.splitlines())


def start_sweep_with_waiting_job(number: int, seeds: str, module: list[str]) -> "subprocess.Popen[str]":
    """Start a sweep in a separate process, and return the process as soon as job `number` waits."""
    Path("sweep").mkdir()
    Path(f"sweep/behavior-{number}").write_text("wait")
    script = (
        "import sys; from wmtp.runtime.signals import raise_on_signals; import wmtp.sweep.sweep as r; "
        f"r.module_arguments = lambda name: {module!r}\n"
        "prepare = lambda overrides: r.PreparedJob([], {'overrides': overrides})\n"
        "with raise_on_signals():\n    sys.exit(r.run_sweep('train', sys.argv[1:], prepare, lambda f, s: None))\n"
    )
    command = [sys.executable, "-c", script, seeds, "hydra.sweep.dir=sweep"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while "waiting" not in (line := process.stdout.readline()):
        assert line, "the sweep ended before the job waited"
    return process


@pytest.mark.slow
def test_an_interruption_stops_running_jobs_and_leaves_the_others_pending(sent_states: list[str]) -> None:
    process = start_sweep_with_waiting_job(1, "seed=0,1,2", FAKE_JOB)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=20) == 130
    assert [(job["state"], job["exit_code"]) for job in read_jobs("sweep")] == [
        ("FINISHED", 0), ("KILLED", 130), ("PENDING", None),
    ]  # fmt: skip
    assert read_status(Path("sweep"))["state"] == "KILLED"
    Path("sweep/behavior-1").unlink()
    assert run(["seed=0,1,2", "sweep.resume=sweep"], sent_states) == 0
    assert [call["job"] for call in read_calls("sweep")] == ["0", "1", "1", "2"]


@pytest.mark.slow
def test_a_sweep_of_an_earlier_version_is_resumed_with_the_current_keys(sent_states: list[str]) -> None:
    assert run(["seed=0,1", "hydra.sweep.dir=sweep"], sent_states) == 0
    content = json.loads(Path("sweep", SWEEP).read_text())
    content["jobs"][1] |= {"state": "PENDING", "overrides": ["checkpoint=s3", "checkpoint.remote=s3://bucket"]}
    Path("sweep", SWEEP).write_text(json.dumps(content))
    assert run(["sweep.resume=sweep"], sent_states) == 0
    assert read_jobs("sweep")[1]["overrides"] == ["checkpoint=s3", "checkpoint.s3.url=s3://bucket"]


@pytest.mark.slow
def test_a_killed_sweep_kills_its_jobs_and_can_be_resumed(sent_states: list[str]) -> None:
    """An orphaned job would write to the same files as the resumed job."""
    process = start_sweep_with_waiting_job(0, "seed=0,1", ["-c", LINKED_FAKE_JOB])
    with pytest.raises(InputError, match="in use"):
        run(["sweep.resume=sweep"], sent_states)
    process.kill()
    process.wait()
    Path("sweep/behavior-0").unlink()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            code = run(["sweep.resume=sweep"], sent_states)
            break
        except InputError:  # the killed job has not exited yet
            time.sleep(0.1)
    assert code == 0 and [job["attempts"] for job in read_jobs("sweep")] == [2, 1]


def test_a_sweep_with_other_jobs_or_in_a_used_folder_is_refused(sent_states: list[str]) -> None:
    assert run(["seed=0,1", "hydra.sweep.dir=sweep"], sent_states) == 0
    with pytest.raises(ConfigError, match="sweep of other jobs"):
        run(["seed=0,1,2", "sweep.resume=sweep"], sent_states)
    with pytest.raises(ConfigError, match="already contains a sweep"):
        run(["seed=0,1", "hydra.sweep.dir=sweep"], sent_states)
    with pytest.raises(InputError, match="is not the folder of a sweep"):
        run(["sweep.resume=elsewhere"], sent_states)
    assert len(read_calls("sweep")) == 2


def test_sweeps_started_together_have_separate_folders(sent_states: list[str]) -> None:
    sweeps = [Sweep("train", ["seed=0,1"], no_issues) for _ in range(5)]
    assert len({sweep.folder for sweep in sweeps}) == 5
    assert all(sweep.folder.name.endswith("-sweep") for sweep in sweeps)


def test_an_invalid_job_fails_and_a_sweep_of_only_invalid_jobs_is_refused(sent_states: list[str]) -> None:
    def check(overrides: list[str]) -> PreparedJob:
        issues = [ConfigIssue("seed", "1", "is wrong")] if "seed=1" in overrides else []
        return PreparedJob(issues, {"overrides": overrides})

    sweep = Sweep("train", ["seed=0,1,2", "hydra.sweep.dir=sweep"], check)
    assert sweep.run(lambda folder, state: sent_states.append(state)) == 2 and sent_states == ["FAILED"]
    jobs = read_jobs("sweep")
    assert [job["state"] for job in jobs] == ["FINISHED", "FAILED", "FINISHED"]
    assert jobs[1]["error"] == "seed=1: is wrong" and not Path("sweep/1").exists()
    with pytest.raises(ConfigError, match="is wrong"):
        Sweep("train", ["seed=1", "hydra.sweep.dir=other"], check)
    assert not Path("other").exists()


@pytest.mark.slow
def test_a_sweep_with_a_running_job_cannot_be_resumed(sent_states: list[str]) -> None:
    Path("sweep").mkdir()
    Path("sweep/behavior-0").write_text("fail")
    assert run(["seed=0", "hydra.sweep.dir=sweep"], sent_states) == 1
    manifest = json.loads(Path("sweep", SWEEP).read_text())
    manifest["jobs"][0]["state"] = "RUNNING"
    Path("sweep", SWEEP).write_text(json.dumps(manifest))
    Path("sweep/0/status.json").write_text('{"state": "RUNNING", "exit_code": null, "error": null}')
    script = (
        "from tests.support.fake_job import *; "
        "lock = FolderLock(Path('sweep/0')); print('locked', flush=True); time.sleep(30)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None and "locked" in holder.stdout.readline()
    with pytest.raises(InputError, match="in use"):
        run(["sweep.resume=sweep"], sent_states)
    holder.kill()
    holder.wait()
    assert read_status(Path("sweep"))["state"] == "FAILED"


@pytest.mark.parametrize("error", [PendingError("the server is unavailable"), RuntimeError("simulated error")])
def test_a_tracker_error_does_not_change_the_state_of_a_sweep(sent_states: list[str], error: Exception) -> None:
    def fail_to_send(folder: Path, state: str) -> None:
        raise error

    Path("sweep").mkdir()
    Path("sweep/behavior-0").write_text("fail")
    sweep = Sweep("train", ["seed=0,1", "hydra.sweep.dir=sweep"], no_issues)
    if isinstance(error, PendingError):
        assert sweep.run(fail_to_send) == 1, "the failed job determines the exit code, not the unavailable server"
    else:
        with pytest.raises(RuntimeError):
            sweep.run(fail_to_send)
    assert read_status(Path("sweep"))["state"] == "FAILED"


def test_a_job_without_a_summary_fails_and_the_others_continue(sent_states: list[str]) -> None:
    Path("sweep").mkdir()
    Path("sweep/behavior-0").write_text("forget")
    assert run(["seed=0,1", "hydra.sweep.dir=sweep"], sent_states) == 1
    assert [job["state"] for job in read_jobs("sweep")] == ["FAILED", "FINISHED"]
    assert "summary.json cannot be read" in read_jobs("sweep")[0]["error"] and sent_states == ["FAILED"]


# Processes of local jobs


@pytest.mark.slow
def test_the_requested_number_of_jobs_runs_at_once(tmp_path: Path) -> None:
    append_time = "open(sys.argv[1], 'a').write(f'{time.time()} %s\\n'); "
    code = IMPORTS + append_time % "+" + "time.sleep(0.4); " + append_time % "-"

    def most_at_once(limit: int) -> int:
        path = tmp_path / f"times-{limit}"
        commands = {n: [sys.executable, "-S", "-c", code, str(path)] for n in range(4)}
        consoles = {n: tmp_path / str(n) for n in commands}
        run_local(commands, consoles, limit, lambda n: None, lambda n, code, stderr_tail: None)
        steps = [line.split()[1] for line in sorted(path.read_text().splitlines())]
        return max(steps[:i].count("+") - steps[:i].count("-") for i in range(len(steps) + 1))

    assert most_at_once(1) == 1 and most_at_once(2) == 2


def test_the_last_stderr_lines_of_a_process_are_kept(tmp_path: Path) -> None:
    code = (
        IMPORTS + "print('on the screen'); print('some words', file=sys.stderr); os.kill(os.getpid(), signal.SIGTERM)"
    )
    ends: list[tuple[int, int, str]] = []
    run_local({3: [sys.executable, "-c", code]}, {3: tmp_path / "c"}, 1, lambda n: None, lambda *end: ends.append(end))
    assert ends == [(3, 143, "some words\n")]


def test_a_process_that_cannot_start_fails_and_the_others_continue(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    commands = {n: [sys.executable, "-S", "-c", "pass"] for n in range(3)}
    consoles = {0: tmp_path / "0", 1: tmp_path / "taken" / "console", 2: tmp_path / "2"}
    ends: dict[int, tuple[int, str]] = {}
    run_local(commands, consoles, 2, lambda n: None, lambda n, code, stderr_tail: ends.update({n: (code, stderr_tail)}))
    assert {n: code for n, (code, _) in ends.items()} == {0: 0, 1: 1, 2: 0} and "cannot be started" in ends[1][1]


def test_the_processes_of_a_job_share_its_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(CORES_VARIABLE, "4")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        limit_threads()
        assert (num_cores(), torch.get_num_threads()) == (4, 4)
        with start_workers(["-c", "pass"], size=2):
            assert (os.environ["OMP_NUM_THREADS"], torch.get_num_threads()) == ("2", 2)
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        torch.set_num_threads(3)
        limit_threads()
        assert torch.get_num_threads() == 3, "OMP_NUM_THREADS takes precedence over the number of cores"
    finally:
        torch.set_num_threads(before)


# Slurm


def test_the_dry_run_shows_the_batch_script() -> None:
    pytest.importorskip("submitit")
    grid = parse_grid(
        "train",
        ["seed=0,1", "hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu", "hydra.launcher.gpus_per_node=4",
         "hydra.launcher.timeout_min=600", "hydra.launcher.mem_gb=64", "hardware=cpu"],
    )  # fmt: skip
    assert slurm.is_submitted(grid.launcher) and grid.jobs == [["seed=0", "hardware=cpu"], ["seed=1", "hardware=cpu"]]
    text = slurm.batch_script(grid.launcher, ["python", "-m", "wmtp.train", "seed=0"], 2)
    expected = "--partition=gpu", "--gpus-per-node=4", "--time=600", "--mem=64GB", "--array=0-1", "python -m wmtp.train"
    assert [option for option in expected if option not in text] == []


def test_a_slurm_sweep_can_use_hardware_that_this_machine_lacks(
    sent_states: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")

    def check(overrides: list[str]) -> PreparedJob:
        issue = ConfigIssue("hardware.device", "cuda", "this machine has no cuda device")
        return PreparedJob([issue], {"overrides": overrides})

    arguments = ["seed=0,1", "hardware=a100x4", "dry_run=true"]
    submitted = Sweep("train", [*arguments, "hydra/launcher=submitit_slurm"], check)
    assert submitted.dry_run() == 0 and "#SBATCH --array=0-1" in capsys.readouterr().out
    assert Sweep("train", arguments, check).dry_run() == 2, "control: it is an error if the jobs run on this machine"
    assert not list(Path().iterdir()), "a dry run leaves no files"


@pytest.mark.slow
def test_submitted_jobs_can_fail_and_be_resumed(sent_states: list[str]) -> None:
    """The jobs are submitted with the local executor of submitit, not with Slurm."""
    pytest.importorskip("submitit")
    Path("sweep").mkdir()
    Path("sweep/behavior-1").write_text("fail")
    arguments = ["seed=0,1", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep"]
    assert run(arguments, sent_states) == 1
    assert [job["state"] for job in read_jobs("sweep")] == ["FINISHED", "FAILED"]
    Path("sweep/behavior-1").unlink()
    assert run([*arguments[:2], "sweep.resume=sweep"], sent_states) == 0 and len(read_calls("sweep")) == 3


# Sweeps of real runs


@pytest.mark.slow
@pytest.mark.xdist_group("servers")
def test_a_killed_job_resumes_from_its_checkpoint(
    tmp_path: Path, cache: Path, fork_server: ForkServer, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Job 1 is killed after its first checkpoint; the resumed sweep finishes it."""
    overrides = [*TINY, "tracking=none", f"cache_dir={cache}", "report=false", "num_samples=0", "save_interval=5",
                 "max_steps=40", "num_epochs=100", "log_interval=1", "early_stopping=none"]  # fmt: skip
    arguments = ["-m", *overrides, "seed=0,1", "hydra.sweep.dir=sweep", "sweep.jobs=2"]
    sweep = fork_server.start("wmtp.train", *arguments, folder=tmp_path, variables={})
    killed_run = tmp_path / "sweep" / "1"
    deadline = time.monotonic() + 180
    while not list(killed_run.glob("checkpoints/step_*/manifest.json")):
        assert time.monotonic() < deadline and sweep.poll() is None, sweep.text
        time.sleep(0.02)
    os.kill(read_status(killed_run)["pid"], signal.SIGKILL)
    code = sweep.wait()
    states = [job["state"] for job in read_jobs(str(tmp_path / "sweep"))]
    assert code == 137 and states == ["FINISHED", "KILLED"], sweep.text
    monkeypatch.chdir(tmp_path)
    assert run_command(["-m", "sweep.resume=sweep"], monkeypatch) == 0
    assert read_status(killed_run)["step"] == 40 and (killed_run / "resumes.jsonl").exists()
    assert "2 of 2 jobs finished" in capsys.readouterr().out


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_shows_how_many_jobs_of_a_sweep_have_ended(is_terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=80, color_system=None)
    with SweepProgress(console, total=4, done=1, is_live=False) as progress:
        progress.advance()
    assert ("2/4 0:00:00" in screen.getvalue()) == is_terminal
    with SweepProgress(console, total=4, done=1, is_live=True) as progress:
        for _ in range(3):
            progress.advance()
    assert ("4/4 0:00:00" in screen.getvalue()) == is_terminal
    assert bool(screen.getvalue()) == is_terminal
