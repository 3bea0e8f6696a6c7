"""Tests of `python -m wmtp.sync`: it finds the folders of runs, and records dead runs as KILLED."""

from pathlib import Path

import pytest

from tests.conftest import compose_config
from wmtp.runtime.atomic_files import replace_atomically
from wmtp.runtime.run_dir import SWEEP, FolderLock, JobProgress, RunStatus, read_status
from wmtp.sync import find_run_folders, main
from wmtp.training.provenance import write_run_id


def make_run(folder: Path, state: str = "FINISHED") -> Path:
    """Create the folder of a run without data to upload."""
    from omegaconf import OmegaConf

    folder.mkdir(parents=True)
    write_run_id(folder, None)
    replace_atomically(
        folder / "config.yaml", OmegaConf.to_yaml(compose_config("tracking=none"), resolve=True).encode()
    )
    status = RunStatus(folder)
    if state == "RUNNING":
        status._lock.release()
    else:
        status.end(state, 0, JobProgress())
    return folder


def test_runs_are_found_at_any_depth_but_evaluations_are_not(tmp_path: Path) -> None:
    day = tmp_path / "outputs" / "2026-11-21"
    runs = [make_run(day / name) for name in ("09-30-00-abcd", "08-00-00-efgh", "10-00-00-ijkl-sweep/0")]
    RunStatus(runs[0] / "evaluations" / "tasks-1234").end("FINISHED", 0, JobProgress())
    sweep = runs[2].parent
    (sweep / SWEEP).touch()
    (sweep / "mlflow.json").write_text("{}")
    RunStatus(sweep).end("FINISHED", 0, JobProgress())

    assert find_run_folders([tmp_path / "outputs"]) == [runs[1], runs[0], runs[2], sweep], (
        "a sweep comes after its jobs"
    )
    assert find_run_folders([runs[0], runs[0]]) == [runs[0]]


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_a_folder_without_runs_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / name)]) == 2
    assert "give the folder of a run" in capsys.readouterr().err


def test_running_runs_are_not_changed_and_dead_runs_are_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended, dead, running = make_run(Path("a")), make_run(Path("b"), "RUNNING"), make_run(Path("c"), "RUNNING")
    lock = FolderLock(running)
    lock._file.seek(0)
    lock._file.truncate()
    lock._file.write("process 1 on another machine")  # sync ignores locks of its own process
    lock._file.flush()

    assert main(["."]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "a: nothing to send",
        "b: was RUNNING, but no process is running: recorded as KILLED",
        "c: is running, and uploads its own data",
    ]
    assert [read_status(run)["state"] for run in (ended, dead, running)] == ["FINISHED", "KILLED", "RUNNING"]
    assert main(["."]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "b: nothing to send"
    lock.release()


def test_a_damaged_folder_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        make_run(Path(name), "RUNNING")
    Path("a/status.json").write_text('{"state": "RUNN')
    Path("b/config.yaml").write_text("tracking: [")
    assert main(["."]) == 2
    printed = capsys.readouterr()
    assert (
        "a: cannot be read: JSONDecodeError" in printed.err
        and "b: b/config.yaml: is not a readable config" in printed.err
    )
    assert "c: was RUNNING" in printed.out and "Traceback" not in printed.err


def test_a_run_that_died_before_it_wrote_a_config_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    RunStatus(tmp_path / "early")._lock.release()
    assert main([str(tmp_path)]) == 0 and "recorded as KILLED" in capsys.readouterr().out
    assert read_status(tmp_path / "early")["state"] == "KILLED"
