"""Helpers for tests of the sandbox."""

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
from wmtp.sandbox.grader import Program, Verdict, grade
from wmtp.sandbox.isolation import Choice, Isolation, Start, find_isolation, packed
from wmtp.sandbox.limits import Limits
from wmtp.sandbox.process import PipeLoop

SHORT_LIMITS = Limits(wall_seconds=2.0, cpu_seconds=2)
ASSERTION = "assert f(3) == 4711"
"""The default test of a program."""


NO_BUBBLEWRAP = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize tests that take `isolation` with both isolation methods. Test modules import this function.

    If a module defines `ONE_IS_ENOUGH`, because it tests the grader and not the isolation, the second method is
    marked deep.
    """
    if "isolation" in metafunc.fixturenames:
        marks = [NO_BUBBLEWRAP, *([pytest.mark.deep] if hasattr(metafunc.module, "ONE_IS_ENOUGH") else [])]
        metafunc.parametrize("isolation", ["unshare", pytest.param("bubblewrap", marks=marks)])


def grade_program(program: Program, isolation: Choice | Isolation, limits: Limits = SHORT_LIMITS) -> Verdict:
    """Return the verdict on a program."""
    return grade(program, isolation if isinstance(isolation, Isolation) else find_isolation(isolation), limits)


def inside(isolation: Choice, script: str, limits: Limits = SHORT_LIMITS) -> str:
    """Return the output of a script in a sandbox."""
    with find_isolation(isolation).starter(limits) as start:
        code, output = run_script(start, script)
    assert code == 0, output
    return output


def run_script(start: Start, script: str) -> tuple[int | None, str]:
    """Return the exit code and the output of a script."""
    with start(packed(script), b"") as process, PipeLoop(process) as pipe_loop:
        process.wait_until_ready()
        for _ in pipe_loop.steps(time.monotonic() + 20):
            if process.output_ended:
                break
        return process.exit_code(5), bytes(process.stdout_data).decode().strip()


def outside(script: str) -> str:
    """Return the output of a script without isolation."""
    command = [sys.executable, "-c", script]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def verdict_of(
    source: str, isolation: Choice | Isolation, test: str | StdioTest = ASSERTION, limits: Limits = SHORT_LIMITS
) -> Verdict:
    """Return the verdict on a program with one test."""
    return grade_program(Program(source, (test,)), isolation, limits)


def status_field_mb(field: str) -> float:
    """Return the value in MB of a field of this process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def peak_memory_growth(work: Callable[[], object]) -> float:
    """Return by how many MB `work` raises the peak memory of this process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # otherwise memory freed by earlier tests would be reused without being counted
    Path("/proc/self/clear_refs").write_text("5")
    before = status_field_mb("VmRSS")
    work()
    return status_field_mb("VmHWM") - before
