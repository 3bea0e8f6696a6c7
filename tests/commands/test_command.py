"""Tests of the train command: valid and invalid arguments, and the files of a run."""

import json
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, Invoke, compose_config
from tests.support.forking import ForkServer
from wmtp.checkpoint.store import find_damage
from wmtp.config.overrides import quote
from wmtp.config.schema import CheckedConfig, ConfigError
from wmtp.runtime.processes import CORES_VARIABLE
from wmtp.runtime.run_dir import SAVED_OVERRIDES, create_run_folder
from wmtp.train import resume_hint, run_folder

INVALID = {
    "algo.betta=1": "algo.betta=1: unknown key",
    "num_epochs=-1": "num_epochs=-1: must be greater than 0",
    "max_steps=abc": "max_steps=abc: must be a valid integer",
    "model.num_heads=0": "model.num_heads=0: must be greater than or equal to 1",
    "data.path=/nowhere": "data.path=/nowhere: ",
    "resume=/nowhere": "resume=/nowhere: does not exist",
    "hardware=a100x4": "hardware.device=cuda: this machine has no cuda device; found: cpu",
}
"""Invalid overrides, and a part of the error message of each."""
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the errors of a machine without GPUs")


@without_gpu
@pytest.mark.parametrize("override", INVALID)
def test_each_config_error_names_its_key_and_the_reason(invoke: Invoke, override: str) -> None:
    outcome = invoke(override)
    assert outcome.code == 2
    assert INVALID[override] in outcome.err
    assert "Traceback" not in outcome.err
    assert not Path("outputs").exists(), "no run is started"


@without_gpu
def test_all_config_errors_are_reported_together(invoke: Invoke) -> None:
    outcome = invoke(*INVALID)
    assert outcome.code == 2
    assert [message for message in INVALID.values() if message not in outcome.err] == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.rl=1", "did you mean optimizer.lr"),
        ("+model.hidden=3", "did you mean model.hidden_dim"),
        ("nun_epochs=1", "did you mean num_epochs?"),
        ("model=mikro", "did you mean micro?"),
        ("lr=0.1", "lr=0.1: unknown key; did you mean optimizer.lr?"),
        ("algo=shuffled beta=1", "did you mean algo.of.beta?"),
        ("dropout=0.1", "did you mean model.dropout?"),
        ("data=jsonl", "data.path: missing"),
        ("data=mbpp data.path=/nowhere", "data.path=/nowhere: does not exist"),
        ("optimizer.lr=-1", "Invalid learning rate: -1"),
        ("optimizer._target_=os.system", "a target must begin with one of"),
        ("model.dim=100", "model.dim=100: must be a multiple of"),
        ("log_interval=true", "log_interval=True: must be a valid integer"),
        ("micro_batch_size=99", "micro_batch_size=99: must be at most batch_size"),
        ("data.balance_correct=true", "data.balance_correct=true: contradicts data.correct_ratio"),
        ("data.difficulty_bins={hard:1}", "is not a difficulty bin"),
        ("seed=0,1", "add -m"),
        ("hello", "hello: is not an override"),
        ("resume=.", "is not a run's folder"),
    ],
)
def test_config_errors_explain_what_to_change(invoke: Invoke, override: str, message: str) -> None:
    outcome = invoke(*override.split())
    assert outcome.code == 2
    assert message in outcome.err


def test_a_run_writes_all_files_to_its_folder(invoke: Invoke) -> None:
    outcome = invoke("max_steps=4", "log_interval=2", "eval_interval=2", "tags.note=first")
    assert outcome.code == 0, outcome.err
    (folder,) = Path("outputs").glob("*-*/*-????")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".hydra",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "provenance.json",
        "run.json",
        "samples.jsonl",
        "status.json",
        "summary.json",
        "tokens.json",
        "train.log",
    }
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("FINISHED", 0, 4)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 3, 4, 4]
    train_metrics = {f"train/{name}" for name in (
        "loss", "mtp_loss", "head_1_loss", "head_4_loss", "weight_mean", "weight_min", "weight_max", "weight_std",
        "valid_target_ratio", "grad_norm", "lr", "tokens_per_second",
    )}  # fmt: skip
    assert train_metrics <= set(lines[0])
    assert {"val/loss", "val/mtp_loss", "val/head_1_loss", "val/head_4_loss"} <= set(lines[1])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["total_steps"] == 4 and summary["early_stopped"] is False
    assert summary["last"]["val/loss"] == summary["final_loss"] == lines[-1]["val/loss"]
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in samples] == [(4, "test")] * 2
    assert summary["pass@1"]["problems"] == 2
    assert all(find_damage(path) is None for path in (folder / "checkpoints").glob("step_*"))
    assert f"resume={folder} " in outcome.out and "head_4_loss" in outcome.out
    assert max(map(len, outcome.out.splitlines())) < 400


@pytest.mark.slow
def test_a_dry_run_prints_the_plan_and_losses_and_leaves_no_files(invoke: Invoke, tmp_path: Path) -> None:
    outcome = invoke("dry_run=true", "cache_dir=kept")
    assert outcome.code == 0, outcome.err
    assert "num_epochs: 3" in outcome.out and "updates of 16 samples" in outcome.out
    assert "train/loss" in outcome.out and "val/loss" in outcome.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("learning_rate", ["0.001", "1e20"])
def test_successful_and_failed_runs_write_a_report(invoke: Invoke, learning_rate: str) -> None:
    options = ["max_steps=4", "log_interval=1", "max_grad_norm=1e9", "scheduler=constant", "hydra.run.dir=here"]
    outcome = invoke(*options, f"optimizer.lr={learning_rate}", "report=true")
    page = Path("here/report.html").read_text()
    succeeds = learning_rate == "0.001"
    assert outcome.code == (0 if succeeds else 1)
    assert ("FINISHED" if succeeds else "FAILED") in page and "RUNNING" not in page
    assert ("the update was not made" in page) != succeeds and "optimizer.lr" in page


@pytest.mark.slow
def test_a_sweep_job_uses_as_many_threads_as_its_cores(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv(CORES_VARIABLE, str(before + 2))
    try:
        assert invoke("max_steps=1").code == 0
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_the_run_folder_can_be_chosen_and_must_be_new(invoke: Invoke) -> None:
    assert invoke("max_steps=1", "hydra.run.dir=here", "run_name=mine").code == 0
    assert (Path("here") / "summary.json").exists() and not (Path("here") / "report.html").exists()
    again = invoke("max_steps=1", "hydra.run.dir=here")
    assert again.code == 2
    assert "already contains a run" in again.err


@pytest.mark.parametrize("key", ["batch_size", "seed", "log_interval"])
def test_the_error_names_a_removed_key(invoke: Invoke, key: str) -> None:
    outcome = invoke(f"~{key}")
    assert outcome.code == 2 and f"{key}: is missing" in outcome.err


def test_a_sweep_refuses_resume(invoke: Invoke) -> None:
    """Without this check, the sweep would start new runs with the default config."""
    outcome = invoke("-m", "resume=run", "max_steps=1,2")
    assert outcome.code == 2 and "resume an earlier sweep with sweep.resume=DIR" in outcome.err
    assert not Path("outputs").exists()


@pytest.mark.parametrize("override", ["experiment=sweep/critic_beta", "sweep.arms=['algo=rho1','algo=critic']"])
def test_a_sweep_without_m_is_refused(invoke: Invoke, override: str) -> None:
    """Without this check, the command would train one baseline."""
    outcome = invoke(override, "max_steps=1")
    assert outcome.code == 2 and "-m: is missing" in outcome.err
    assert not Path("outputs").exists()


@pytest.mark.parametrize("option", ["--config-dir=other", "--config-name=other", "--run", "-m1"])
def test_an_option_that_is_not_supported_is_refused(invoke: Invoke, option: str) -> None:
    """Hydra would take some of these options and start no job, and the command would seem to have succeeded."""
    outcome = invoke(option, "max_steps=1")
    assert outcome.code == 2 and f"{option}: is not an option of this command" in outcome.err


def test_an_error_before_the_job_starts_is_not_lost(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("wmtp.cli.runner.RunStatus", fail)
    outcome = invoke("max_steps=1")
    assert outcome.code == 2 and "No space left" in outcome.err and "Traceback" not in outcome.err


def test_run_folders_created_in_the_same_second_differ(tmp_path: Path) -> None:
    folders = {create_run_folder(tmp_path) for _ in range(50)}
    assert len(folders) == 50


def test_a_nonfinite_loss_fails_the_run(invoke: Invoke) -> None:
    outcome = invoke(
        "max_steps=9", "optimizer.lr=1e20", "scheduler=constant", "hydra.run.dir=here", "max_grad_norm=1e9"
    )
    assert outcome.code == 1
    status = json.loads(Path("here/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("FAILED", 1)
    assert "the update was not made" in status["error"] and "; records: tasks/train/" in status["error"]
    assert "Traceback" not in outcome.err and "Traceback" in Path("here/train.log").read_text()


@pytest.mark.slow
def test_a_crash_is_recorded_and_its_traceback_is_in_the_log(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("simulated error")

    monkeypatch.setattr("wmtp.training.trainer.Trainer.validate", fail)
    outcome = invoke("hydra.run.dir=here")
    assert outcome.code == 1 and "RuntimeError: simulated error" in outcome.err and "Traceback" not in outcome.err
    assert "simulated error" in Path("here/train.log").read_text()
    assert json.loads(Path("here/status.json").read_text())["state"] == "FAILED"


@pytest.mark.slow
def test_a_resumed_run_continues_its_mlflow_run(invoke: Invoke) -> None:
    from mlflow import MlflowClient

    first = invoke("tracking=mlflow", "max_steps=4", "log_interval=1", "hydra.run.dir=outputs/one", "run_name=first",
                   "tags.note=mine")  # fmt: skip
    assert first.code == 0, first.err
    assert invoke("tracking=mlflow", "resume=outputs/one", "max_steps=6", tiny=False).code == 0
    client = MlflowClient(f"sqlite:///{Path('outputs/mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("wmtp")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.tags["note"] == "mine" and run.data.params["model.num_heads"] == "4"
    history = client.get_metric_history(run.info.run_id, "train/head_4_loss")
    assert [metric.step for metric in history] == [1, 2, 3, 4, 5, 6]
    assert {"config.yaml", "summary.json", "samples.jsonl"} <= {f.path for f in client.list_artifacts(run.info.run_id)}


@pytest.mark.slow
def test_help_takes_less_than_two_seconds_of_cpu_time() -> None:
    def cpu_seconds() -> float:
        """Return the CPU time of one call; its elapsed time would depend on tests that run at the same time."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "wmtp.train", "--help"], capture_output=True, text=True, timeout=15
        )
        assert done.returncode == 0
        assert "python -m wmtp.train num_epochs=1" in done.stdout
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_seconds() for _ in range(3)) < 2


@pytest.mark.slow
@pytest.mark.xdist_group("servers")
@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_with_a_checkpoint_to_resume_from(
    tmp_path: Path, cache: Path, invoke: Invoke, fork_server: ForkServer, signal_number: signal.Signals, code: int
) -> None:
    overrides = [*TINY, "tracking=none", f"cache_dir={cache}", "num_epochs=100000", "log_interval=1"]
    child = fork_server.start("wmtp.train", *overrides, "hydra.run.dir=run", folder=tmp_path, variables={})
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.05)
    assert child.kill(signal_number) == code, child.text
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("KILLED", code)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob(f"step_{status['step']:08d}")
    assert find_damage(checkpoint) is None
    assert "Traceback" not in child.text
    outcome = invoke("resume=run", f"max_steps={status['step'] + 2}", tiny=False)
    assert outcome.code == 0, outcome.err


def test_the_advice_after_an_interruption_can_be_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which no run has started can be used again; otherwise, the run is resumed.

    The printed commands are whole words of a shell. The control is torchrun, whose own options are not known.
    """
    tmp_path /= "my run (1)"
    tmp_path.mkdir()
    checked, arguments = CheckedConfig(compose_config(), []), [f"hydra.run.dir={quote(tmp_path)}"]
    (tmp_path / "status.json").touch()
    assert run_folder(checked, arguments) == tmp_path
    assert resume_hint(tmp_path) == "Nothing was saved; start again."
    (tmp_path / SAVED_OVERRIDES).parent.mkdir()
    for file in (tmp_path / SAVED_OVERRIDES, tmp_path / "config.yaml"):
        file.touch()
    with pytest.raises(ConfigError, match="already contains a run"):
        run_folder(checked, arguments)
    advice, _, command = resume_hint(tmp_path).partition(": ")
    python, *words = shlex.split(command)
    assert advice == "Nothing was saved. Start again with" and Path(python).absolute() == Path(sys.executable)
    assert words == ["-m", "wmtp.train", f"resume={tmp_path}"]
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_00000001" / "manifest.json").touch()
    assert resume_hint(tmp_path) == f"Resume with: {command}"
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert resume_hint(tmp_path) == f"Resume with: {shlex.quote(f'resume={tmp_path}')}"


@pytest.mark.slow
def test_a_run_without_a_checkpoint_starts_again_when_it_is_resumed(invoke: Invoke) -> None:
    assert invoke("max_steps=2", "hydra.run.dir=run").code == 0
    metrics = Path("run/metrics.jsonl")
    before = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    shutil.rmtree("run/checkpoints")
    outcome = invoke("resume=run", tiny=False)
    assert outcome.code == 0, outcome.err
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == before
    assert Path("run/checkpoints/best.json").exists()
