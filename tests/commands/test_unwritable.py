"""Tests of folders that cannot be written. Each command finds them before it does anything else."""

import errno
import os
from pathlib import Path

import pytest

from tests.conftest import Invoke
from wmtp.runtime.writable import write_problem

BROKEN = {
    "file": "is not a folder",
    "link": "is a link to nowhere/else, which is not a folder",
    "full": "cannot be written: No space left on device",
}


def break_folder(path: Path, kind: str, patch: pytest.MonkeyPatch) -> None:
    """Make it impossible to write files to a folder that does not exist yet."""
    if kind == "file":
        path.touch()
    elif kind == "link":
        path.symlink_to("nowhere/else")
    else:

        def fail(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr("wmtp.runtime.writable.os.fsync", fail)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize(
    ("broken", "arguments", "key"),
    [
        ("outputs", [], "hydra.run.dir"),
        ("outputs", ["dry_run=true"], "hydra.run.dir"),
        ("outputs", ["-m", "seed=0,1"], "hydra.sweep.dir"),
        ("outputs", ["-m", "seed=0,1", "dry_run=true"], "hydra.sweep.dir"),
        ("mine", ["hydra.run.dir=mine/run"], "hydra.run.dir"),
        ("cached", ["cache_dir=cached"], "cache_dir"),
        ("cached", ["cache_dir=cached", "dry_run=true"], "cache_dir"),
    ],
)
def test_a_folder_that_cannot_be_written_is_an_error_of_one_line(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, kind: str, broken: str, arguments: list[str], key: str
) -> None:
    break_folder(Path(broken), kind, monkeypatch)
    before = sorted(Path().rglob("*"))
    outcome = invoke(*arguments)
    assert outcome.code == 2
    (line,) = outcome.err.splitlines()
    assert BROKEN[kind] in line
    assert kind == "full" or f"choose another folder with {key}=DIR" in line
    assert "updates of" not in outcome.out and sorted(Path().rglob("*")) == before, "nothing was done"


@pytest.mark.slow
def test_other_commands_check_their_folders(invoke: Invoke, tmp_path: Path) -> None:
    assert invoke("max_steps=1", "hydra.run.dir=run", "num_samples=0").code == 0
    Path("outputs").symlink_to("nowhere")
    commands = {
        "generate": ["checkpoint=run", "prompt=x", "cache_dir=outputs/cache"],
        "evaluate": ["checkpoint=run", "hydra.run.dir=outputs/evaluation"],
        "export": ["run", "outputs/export", "format=hf"],
    }
    for command, arguments in commands.items():
        outcome = invoke(*arguments, command=command)
        assert (outcome.code, "which is not a folder" in outcome.err) == (2, True), (command, outcome.err)
        assert "Traceback" not in outcome.err


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_the_default_sqlite_file_is_checked_before_the_training(
    invoke: Invoke, monkeypatch: pytest.MonkeyPatch, dry_run: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("outputs").mkdir()
    Path("outputs/mlflow.db").write_text("text of another program")
    outcome = invoke("tracking=mlflow", f"dry_run={dry_run}")
    assert outcome.code == 2 and "outputs/mlflow.db: is not an SQLite database" in outcome.err
    assert "updates of" not in outcome.out


def test_a_folder_that_can_be_written_has_no_problem_and_is_not_created(tmp_path: Path) -> None:
    assert write_problem(tmp_path / "new" / "folder") is None
    assert list(tmp_path.iterdir()) == []
    if os.geteuid() != 0:  # the user root may write everywhere
        tmp_path.chmod(0o500)
        assert write_problem(tmp_path / "new") == "cannot be written: Permission denied"
