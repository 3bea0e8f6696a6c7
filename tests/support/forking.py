"""Commands as separate processes that start quickly: a server that has imported all modules forks them.

python -m tests.support.forking        reads requests, one JSON object per line, and prints one line for each
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from wmtp.runtime.processes import kill_on_parent_death

TIME_LIMIT_S = 120.0
"""Time limit of a command in seconds."""


class ForkServer:
    """The process from which commands are forked. Use it in a `with` block; all commands are killed at its end."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forking"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def request(self, **request: Any) -> Any:
        """Send a request to the server, and return its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, command: str, *arguments: str, folder: Path, variables: dict[str, str]) -> "Child":
        """Start `python -m wmtp.<command> …` in a folder, with additional environment variables."""
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"output-{time.monotonic_ns()}"
        request = {"command": command, "arguments": arguments, "folder": str(folder), "variables": variables}
        return Child(self, self.request(**request, log=str(log)), log)


@dataclass
class Child:
    """A started command."""

    fork_server: ForkServer
    pid: int
    log: Path
    _code: int | None = None

    @property
    def out(self) -> str:
        """Standard output so far."""
        return self.log.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        """Standard error so far."""
        return self.log.with_suffix(".err").read_text()

    @property
    def text(self) -> str:
        """Standard output and standard error so far."""
        return self.out + self.err

    def poll(self) -> int | None:
        """Return the exit code, negative after a signal; None while the command runs."""
        if self._code is None:
            self._code = self.fork_server.request(poll=self.pid)
        return self._code

    def wait(self) -> int:
        """Wait for the end of the command, and return its exit code."""
        deadline = time.monotonic() + TIME_LIMIT_S
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)
        return code

    def kill(self, signal_number: int = signal.SIGKILL) -> int:
        """Send a signal, wait for the end of the command, and return its exit code."""
        os.kill(self.pid, signal_number)
        return self.wait()


def fork(request: dict[str, Any]) -> int:
    """Start a command that is killed when this process ends, and return its process id."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = 1
    try:
        kill_on_parent_death(parent)
        os.chdir(request["folder"])
        os.environ.update(request["variables"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, suffix in ((1, ".out"), (2, ".err")):
            path = Path(request["log"]).with_suffix(suffix)
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = [f"wmtp.{request['command']}", *request["arguments"]]
        module = import_module(f"wmtp.{request['command']}")
        if hasattr(module, "COMMAND"):
            import_module("wmtp.cli.runner").run(module.COMMAND)
            code = 0
        else:
            code = module.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Handle requests until the input ends, then kill all commands that are still running."""
    for name in (
        "torch",
        "boto3",
        "mlflow",
        "wmtp.training.run",
        "wmtp.evaluation.evaluator",
        "wmtp.cli.s3_paths",
        "wmtp.train",
        "wmtp.sync",
    ):
        import_module(name)
    running: set[int] = set()
    for line in sys.stdin:
        request = json.loads(line)
        answer: int | None = None
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            if pid:
                running.remove(pid)
                answer = os.waitstatus_to_exitcode(status)
        else:
            answer = fork(request)
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    serve()
