"""Tests of commands on a terminal, and of runs whose terminal or pipe disappears."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import TINY
from tests.support.forking import ForkServer
from wmtp.checkpoint.store import find_damage
from wmtp.runtime.run_dir import read_status

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("servers")]
LONG = [*TINY, "tracking=none", "num_epochs=9999", "early_stopping=none", "log_interval=1", "hydra.run.dir=run"]


def wait_for_updates(folder: Path, count: int) -> None:
    """Wait until the metrics of a run have at least `count` lines."""
    metrics, deadline = folder / "run" / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_continues_when_the_reader_of_its_output_ends(
    tmp_path: Path, cache: Path, fork_server: ForkServer
) -> None:
    """This is `train 2>&1 | head -1`. The control is in test_standard_streams."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    command = fork_server.start(
        "wmtp.train", *LONG, "max_steps=8", f"cache_dir={cache}", folder=tmp_path, variables={},
        console=tmp_path / "pipe",
    )  # fmt: skip
    os.set_blocking(reader, True)
    while (tmp_path / "run" / "train.log").exists() is False and command.poll() is None:
        time.sleep(0.02)
    os.close(reader)
    assert command.wait() == 0
    status = read_status(tmp_path / "run")
    assert (status["state"], status["step"]) == ("FINISHED", 8)
    assert "standard output is lost (Broken pipe)" in (tmp_path / "run" / "train.log").read_text()


def test_a_closed_terminal_ends_a_run_with_a_checkpoint(tmp_path: Path, cache: Path, fork_server: ForkServer) -> None:
    """The system and the shell both send SIGHUP. Without a handler, the status would stay RUNNING."""
    terminal, slave = os.openpty()
    command = fork_server.start(
        "wmtp.train", *LONG, f"cache_dir={cache}", folder=tmp_path, variables={}, console=Path(os.ttyname(slave))
    )
    wait_for_updates(tmp_path, 3)
    os.close(slave)
    os.close(terminal)
    os.kill(command.pid, signal.SIGHUP)
    os.kill(command.pid, signal.SIGHUP)
    assert command.wait() == 128 + signal.SIGHUP
    status = read_status(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("KILLED", 129)
    assert find_damage(tmp_path / "run" / "checkpoints" / f"step_{status['step']:08d}") is None
    assert "standard output is lost (Input/output error)" in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize(("arguments", "expected"), [([], b"train: checking the config"), (["--help"], b"Train a ")])
def test_a_terminal_shows_at_once_what_a_command_does(tmp_path: Path, arguments: list[str], expected: bytes) -> None:
    """The control is --help, which writes only its result, after Hydra is imported."""
    terminal, slave = os.openpty()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "wmtp.train", *arguments]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=slave, stderr=slave) as process:
        first = os.read(terminal, 1000)
        used = psutil.Process(process.pid).cpu_times()
        process.kill()
    os.close(terminal)
    os.close(slave)
    assert first.startswith(expected)
    assert (used.user + used.system < 0.4) == (not arguments)


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_a_text_that_cannot_be_written_is_an_error(tmp_path: Path, fork_server: ForkServer, option: str) -> None:
    """The control is a device that can be written. Without a check of the output, both exit codes are 0."""
    for device, exit_code in (("/dev/full", 1), ("/dev/null", 0)):
        command = fork_server.start("wmtp.train", option, folder=tmp_path, variables={}, console=Path(device))
        assert command.wait() == exit_code
