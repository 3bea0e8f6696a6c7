"""Commands as separate processes with their workers, for tests of the launcher and of signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.support.forking import Child, ForkServer
from wmtp.runtime.processes import is_alive

ROOT = Path(__file__).parents[2]
TWO_PROCESSES = ["hardware=cpu", "hardware.num_processes=2", "hardware.strategy=ddp", "hardware.timeout=10"]
ONE_PROCESS = ["hardware=cpu"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]


def start_interpreter(arguments: list[str], folder: Path, variables: dict[str, str]) -> Child:
    """Start Python with arguments, as a user does."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    log = folder / f"output-{time.monotonic_ns()}"
    with log.with_suffix(".out").open("w") as out, log.with_suffix(".err").open("w") as err:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, stdout=out, stderr=err, env=environment | variables
        )
    return Child(process.pid, log, process.poll)


class StartedCommand:
    """A command that is started in a folder, with `run` as the run's folder.

    `without` names mechanisms of wmtp that `tests.support.launched` disables. The command is forked from the server
    if there is one, otherwise a new interpreter starts, as for a user.
    """

    def __init__(
        self,
        folder: Path,
        *overrides: str,
        server: ForkServer | None = None,
        torchrun: bool = False,
        without: str = "",
        module: str = "tests.support.launched",
    ) -> None:
        self.folder, self.run = folder, folder / "run"
        folder.mkdir(parents=True, exist_ok=True)
        variables = {"PYTHONPATH": str(ROOT), "WITHOUT": without, "TMPDIR": str(folder)}
        arguments = ["hydra.run.dir=run", *overrides]
        self.process = (
            server.start(module, *arguments, folder=folder, variables=variables, num_processes=2)
            if server
            else start_interpreter([*(TORCHRUN if torchrun else []), "-m", module, *arguments], folder, variables)
        )
        self.children: list[int] = []

    def wait_for(self, *names: str, timeout: float = 60) -> None:
        """Wait until these files exist in the run's folder."""
        deadline = time.monotonic() + timeout
        while not all((self.run / name).exists() for name in names):
            assert time.monotonic() < deadline, f"{names} were not written"
            assert self.process.poll() is None, self.process.text
            time.sleep(0.02)
        self.children = [child.pid for child in psutil.Process(self.process.pid).children(recursive=True)]

    def worker(self, rank: int) -> int:
        """Return the process id of a rank."""
        return int((self.run / f"pid-{rank}").read_text())

    def send(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to the command, or to one of its workers."""
        os.kill(self.process.pid if rank is None else self.worker(rank), number)

    def end(self, timeout: float = 40) -> tuple[int, str, float]:
        """Wait for the end of the command; return the exit code, the output and the seconds waited."""
        started = time.monotonic()
        code = self.process.wait(timeout)
        return code, self.process.text, time.monotonic() - started

    def survivors(self, seconds: float = 0) -> list[int]:
        """Return the process ids of workers that are still alive after `seconds`."""
        deadline = time.monotonic() + seconds
        while (alive := [pid for pid in self.children if is_alive(pid)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        return alive

    def status(self) -> dict[str, Any]:
        """Return the content of status.json."""
        status: dict[str, Any] = json.loads((self.run / "status.json").read_text())
        return status

    def log(self) -> str:
        """Return the content of train.log."""
        return (self.run / "train.log").read_text()

    def kill(self) -> None:
        """Kill the command and its workers if they are still alive."""
        for pid in [self.process.pid, *self.children]:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
