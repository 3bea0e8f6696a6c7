"""What the tests of the sandbox share."""

import ctypes
import gc
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from wmtp.data.records import StdioTest
from wmtp.sandbox.grader import Program, Verdict, judge
from wmtp.sandbox.isolation import Choice, Isolation, find_isolation
from wmtp.sandbox.limits import Limits
from wmtp.sandbox.mounts import python
from wmtp.sandbox.process import Exchange

SHORT = Limits(wall_seconds=2.0, cpu_seconds=2)
ANSWER = "assert f(3) == 4711"


NO_BUBBLEWRAP = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes `isolation` under each of them. Modules import this.

    Where the judge matters more than what isolates, a module says `ONE_IS_ENOUGH`: the second isolation is slow then.
    """
    if "isolation" in metafunc.fixturenames:
        marks = [pytest.mark.slow] if hasattr(metafunc.module, "ONE_IS_ENOUGH") else []
        second = pytest.param("unshare", marks=marks)
        metafunc.parametrize("isolation", [pytest.param("bubblewrap", marks=NO_BUBBLEWRAP), second])


def judged(program: Program, isolation: Choice | Isolation, limits: Limits = SHORT) -> Verdict:
    """The verdict on a program."""
    return judge(program, isolation if isinstance(isolation, Isolation) else find_isolation(isolation), limits)


def inside(isolation: Choice, script: str, limits: Limits = SHORT) -> str:
    """What a script prints in a sandbox."""
    with find_isolation(isolation).start(python("-c", script), limits) as process, Exchange(process) as exchange:
        process.wait_until_ready()
        process.close_input()
        for _ in exchange.turns(time.monotonic() + 20):
            if process.ended:
                break
        assert process.exit_code(5) == 0, bytes(process.noise)
        return bytes(process.inbox).decode().strip()


def outside(script: str) -> str:
    """What a script prints without any isolation."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def verdict_of(
    source: str, isolation: Choice | Isolation, test: str | StdioTest = ANSWER, limits: Limits = SHORT
) -> Verdict:
    """The verdict on a program with one test."""
    return judged(Program(source, (test,)), isolation, limits)


def resident(field: str) -> float:
    """MB of memory that a line of this process's status tells."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def growth(work: Callable[[], object]) -> float:
    """MB by which the work raises the peak of this process's memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests freed must not serve the work unseen
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before
