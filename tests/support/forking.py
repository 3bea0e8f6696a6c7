"""Commands as separate processes that start quickly: a server that has imported all modules forks them.

python -m tests.support.forking        reads requests, one JSON object per line, and prints one line for each
"""

import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Self

from wmtp.distributed import launcher
from wmtp.runtime.processes import kill_on_parent_death

TIME_LIMIT_S = 120.0
"""Time limit of a command in seconds."""
WARM_MODULES = [
    "boto3", "mlflow", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.nn.parallel",
    "wmtp.cli.s3_paths", "wmtp.distributed.membership", "wmtp.distributed.parallelize", "wmtp.distributed.store",
    "wmtp.evaluation.evaluator", "wmtp.sync", "wmtp.train", "wmtp.training.run",
]  # fmt: skip
"""Modules that the server imports before it forks commands."""


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

    def start(
        self,
        command: str,
        *arguments: str,
        folder: Path,
        variables: Mapping[str, str],
        num_processes: int = 1,
        console: Path | None = None,
    ) -> "Child":
        """Start `python -m <command> …` in a folder, with additional environment variables.

        `command` is the name of a module. With two processes, the second one is forked too; it becomes rank 1 when the
        command starts it. Output is written to `console`, such as a terminal, if it is given, otherwise to files.
        """
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / f"output-{time.monotonic_ns()}"
        for suffix in (".out", ".err"):
            log.with_suffix(suffix).touch()
        request = {
            "command": command, "arguments": arguments, "folder": str(folder), "variables": dict(variables),
            "log": str(log), "num_processes": num_processes, "console": console and str(console),
        }  # fmt: skip
        pid = self.request(**request)
        return Child(pid, log, lambda: self.request(poll=pid))


@dataclass
class Child:
    """A started command, with its output in files."""

    pid: int
    log: Path
    """The path of both files with the output, without their suffixes."""
    find_code: Callable[[], int | None]
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
            self._code = self.find_code()
        return self._code

    def wait(self, seconds: float = TIME_LIMIT_S) -> int:
        """Return the exit code of the command. If it runs for more than `seconds`, kill it and fail."""
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(self.text)
            time.sleep(0.02)
        return code

    def kill(self, signal_number: int = signal.SIGKILL) -> int:
        """Send a signal, wait for the end of the command, and return its exit code."""
        os.kill(self.pid, signal_number)
        return self.wait()


def fork(work: Callable[[], object]) -> int:
    """Start a process that does `work` and exits with the returned code, and return its process id.

    Objects of this process are not freed in the new one, because they may wait for threads that it does not have. For
    example, a process group of gloo would wait forever.
    """
    if pid := os.fork():
        return pid
    gc.freeze()
    code: object = 1
    try:
        code = work()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code or 0))  # type: ignore[call-overload]


def run_request(request: dict[str, Any], server: int) -> object:
    """Run the requested command in this process, which is killed when the server ends, and return its exit code."""
    kill_on_parent_death(server)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.chdir(request["folder"])
    os.environ.update(request["variables"])
    tempfile.tempdir = None  # the folder of temporary files may be another one now
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, suffix in ((1, ".out"), (2, ".err")):
        path = Path(request["log"]).with_suffix(suffix)
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(request["console"], os.O_WRONLY | os.O_NOCTTY) if request["console"] else opened, descriptor)
    if request["num_processes"] > 1:
        fork_worker()
    return run_module(request["command"], request["arguments"])


def run_module(name: str, arguments: list[str]) -> object:
    """Run a command of wmtp with arguments, or the function `main` of another module, and return the exit code."""
    sys.argv = [name, *arguments]
    module = import_module(name)
    if hasattr(module, "COMMAND"):
        return import_module("wmtp.cli.command").run_command(module.COMMAND)
    return module.main()


def fork_worker() -> None:
    """Fork a process that becomes rank 1 when the command of this process starts that rank.

    It is forked before the command has started threads, because a forked process has only one.
    """
    read, write = os.pipe()

    def wait_for_start() -> object:
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        if not text:
            return 0  # the command ended before it started rank 1
        module, environment = json.loads(text)
        os.setsid()
        os.environ.clear()
        os.environ.update(environment)
        return run_module(module, [])

    worker = ForkedWorker(fork(wait_for_start))
    os.close(read)

    def start(self: launcher.Workers, rank: int, entry: list[str], environment: Mapping[str, str]) -> None:
        with os.fdopen(write, "w") as pipe:
            json.dump((entry[-1], dict(environment)), pipe)
        self._processes[rank] = worker  # type: ignore[assignment]

    launcher.Workers.start = start  # type: ignore[method-assign]


@dataclass
class ForkedWorker:
    """A forked rank, with the methods of `Popen` that the launcher calls."""

    pid: int
    _code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while the process runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float = TIME_LIMIT_S) -> None:
        """Wait for the end of the process. Raises TimeoutExpired."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank 1", timeout)
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill the process."""
        os.kill(self.pid, signal.SIGKILL)


def serve() -> None:
    """Handle requests until the input ends, then kill all commands that are still running."""
    for name in WARM_MODULES:
        import_module(name)
    server, running = os.getpid(), set[int]()
    for line in sys.stdin:
        request = json.loads(line)
        answer: int | None = None
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            if pid:
                running.remove(pid)
                answer = os.waitstatus_to_exitcode(status)
        else:
            answer = fork(lambda: run_request(request, server))  # noqa: B023 - called before the next request
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    serve()
