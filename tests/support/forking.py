"""The commands as processes of their own that start in a moment: forked from one that has imported everything.

python -m tests.support.forking        reads requests, a JSON object a line, and answers each with a line
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

from wmtp.runtime.processes import die_with

LONGEST = 120.0
"""Seconds in which every command must have ended."""


class Nursery:
    """The process that the commands are forked from. Use it in a `with` block, which leaves none of them alive."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forking"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, **request: Any) -> Any:
        """What the process answers to a request."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, command: str, *arguments: str, folder: Path, variables: dict[str, str]) -> "Child":
        """`python -m wmtp.<command> …` in a folder, with these variables besides those of the tests."""
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"output-{time.monotonic_ns()}"
        request = {"command": command, "arguments": arguments, "folder": str(folder), "variables": variables}
        return Child(self, self.ask(**request, log=str(log)), log)


@dataclass
class Child:
    """A command that was started."""

    nursery: Nursery
    pid: int
    log: Path
    _code: int | None = None

    @property
    def out(self) -> str:
        """What it wrote to standard output until now."""
        return self.log.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        """What it wrote to standard error until now."""
        return self.log.with_suffix(".err").read_text()

    @property
    def text(self) -> str:
        """All that it wrote until now."""
        return self.out + self.err

    def poll(self) -> int | None:
        """Its exit code, negative if a signal ended it; None while it runs."""
        if self._code is None:
            self._code = self.nursery.ask(poll=self.pid)
        return self._code

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        deadline = time.monotonic() + LONGEST
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, self.text
            time.sleep(0.02)
        return code

    def kill(self, number: int = signal.SIGKILL) -> int:
        """End it by a signal; its exit code."""
        os.kill(self.pid, number)
        return self.wait()


def fork(request: dict[str, Any]) -> int:
    """Start a command; its process id. It does not outlive this process."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = 1
    try:
        die_with(parent)
        os.chdir(request["folder"])
        os.environ.update(request["variables"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, suffix in ((1, ".out"), (2, ".err")):
            path = Path(request["log"]).with_suffix(suffix)
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        sys.argv = [f"wmtp.{request['command']}", *request["arguments"]]
        module = import_module(f"wmtp.{request['command']}")
        if hasattr(module, "COMMAND"):
            import_module("wmtp.cli.runner").main(module.COMMAND)
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
    """Answer requests until there are no more, then end what was started."""
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
