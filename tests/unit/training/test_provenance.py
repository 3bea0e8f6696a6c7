"""Tests of the id of a run, its URL in S3, its final status and its Git revision."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from wmtp.errors import InputError
from wmtp.runtime import versions
from wmtp.runtime.run_dir import SWEEP, JobProgress, RunStatus, mark_dead_run, read_run, read_status
from wmtp.runtime.versions import git_revision, untracked_files
from wmtp.training.provenance import remote_url, write_run_id

HOLD = """
import os, sys, time
from pathlib import Path
from wmtp.runtime.run_dir import RunStatus
status = RunStatus(Path(sys.argv[1]))
print("holds the lock", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/home/me/outputs/2026-11-21/09-30-00-abcd", "s3://b/p/2026-11-21/09-30-00-abcd"),
        ("/home/me/outputs/2026-11-21/09-30-00-abcd-sweep/3", "s3://b/p/2026-11-21/09-30-00-abcd-sweep/3"),
        ("/scratch/first try", "s3://b/p/first try"),
    ],
)
def test_the_url_of_a_run_ends_with_its_folder(folder: str, expected: str) -> None:
    assert remote_url(Path(folder), "s3://b/p") == remote_url(Path(folder), "s3://b/p/") == expected


def test_the_url_of_a_job_contains_the_sweep(tmp_path: Path) -> None:
    """The name of a job's folder is only a number. The control is a parent folder that is not a sweep."""
    (tmp_path / "first" / "0").mkdir(parents=True)
    assert remote_url(tmp_path / "first" / "0", "s3://b") == "s3://b/0"
    (tmp_path / "first" / SWEEP).touch()
    assert remote_url(tmp_path / "first" / "0", "s3://b") == "s3://b/first/0"


def test_the_id_is_permanent_and_the_url_is_kept_for_the_same_remote(tmp_path: Path) -> None:
    write_run_id(tmp_path, None)
    first = read_run(tmp_path)
    assert first is not None and len(first["id"]) == 32 and first["remote"] is None

    write_run_id(tmp_path, "s3://b/p")
    moved = tmp_path.rename(tmp_path.with_name("another name"))
    write_run_id(moved, "s3://b/p")
    assert read_run(moved) == {"id": first["id"], "remote": f"s3://b/p/{tmp_path.name}"}, (
        "the URL of a renamed run changed"
    )

    write_run_id(moved, None)
    assert read_run(moved) == {"id": first["id"], "remote": None}, "a run without remote has a URL"
    write_run_id(moved, "s3://b/other")
    assert read_run(moved) == {"id": first["id"], "remote": "s3://b/other/another name"}


def test_a_dead_run_with_status_running_becomes_killed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "holds the lock\n"
    with pytest.raises(InputError, match="is in use by process"):
        mark_dead_run(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert read_status(tmp_path)["state"] == "RUNNING"

    assert mark_dead_run(tmp_path) == "KILLED"
    status = read_status(tmp_path)
    assert (
        status["state"] == "KILLED"
        and "without a final status" in status["error"]
        and status["ended"] >= status["started"]
    )
    assert mark_dead_run(tmp_path) == "KILLED"


@pytest.mark.parametrize("state", ["FINISHED", "FAILED", "KILLED"])
def test_an_ended_run_keeps_its_state(tmp_path: Path, state: str) -> None:
    RunStatus(tmp_path).end(state, 0, JobProgress(step=3))
    before = (tmp_path / "status.json").read_bytes()
    assert mark_dead_run(tmp_path) == state and (tmp_path / "status.json").read_bytes() == before
    assert json.loads(before)["step"] == 3


def test_code_installed_in_an_unrelated_repository_has_no_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is the same file after the repository tracks it."""

    def git(*arguments: str) -> str:
        author = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
        done = subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    installed = tmp_path / "venv" / "wmtp" / "versions.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("# ours\n")
    monkeypatch.setattr(versions, "__file__", str(installed))
    assert git_revision() is None, "a revision without a repository"
    git("init")
    git("commit", "--allow-empty", "--message", "theirs")
    assert git_revision() is None, "a revision of a repository that does not track the file"

    git("add", "venv")
    git("commit", "--message", "ours")
    assert git_revision() == git("rev-parse", "HEAD")
    installed.write_text("# changed\n")
    assert git_revision() == git("rev-parse", "HEAD") + "+changes"


def test_files_that_git_does_not_track_are_named_and_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control is git's own list of changes, in which ignored files are missing."""

    def git(*arguments: str) -> str:
        """Run git, and return its output."""
        author = ["-c", "user.name=Ada", "-c", "user.email=ada@example.org"]
        done = subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def write(name: str, content: str) -> None:
        """Write a file."""
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)

    monkeypatch.setenv("WMTP_GIT_REVISION", "abc")
    write("wmtp/runtime/versions.py", "# ours\n")
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "wmtp" / "runtime" / "versions.py"))
    assert (git_revision(), untracked_files()) == ("abc", {}), "the revision of an image without git"
    write(".gitignore", "*ignored*\n")
    git("init")
    git("add", ".")
    git("commit", "--message", "ours")
    write("outputs/metrics.jsonl", "")
    write("wmtp/__pycache__/a.pyc", "")
    assert (git_revision(), untracked_files()) == (git("rev-parse", "HEAD"), {})
    write("wmtp/algorithms/focal ü.py", "a = 1\n")
    write("conf/algo/ignored.yaml", "b: 1\n")
    assert "ignored" not in git("status", "--porcelain")
    first = untracked_files()["untracked"]
    assert first["files"] == ["conf/algo/ignored.yaml", "wmtp/algorithms/focal ü.py"]
    write("conf/algo/ignored.yaml", "b: 2\n")
    second = untracked_files()["untracked"]
    assert second["files"] == first["files"] and second["sha256"] != first["sha256"]
    assert git_revision() == git("rev-parse", "HEAD")
