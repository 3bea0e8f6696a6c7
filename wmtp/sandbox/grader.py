"""Grading of programs with two types of tests.

An assertion runs in a process of its own and calls functions of the program. A stdio test runs the whole program with a
given input, and compares its output with the expected output.
"""

import json
import marshal
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from wmtp.data.records import StdioTest
from wmtp.sandbox.isolation import Isolation, Start, packed
from wmtp.sandbox.limits import Limits
from wmtp.sandbox.process import EXIT_TIMEOUT_S, PipeLoop, Process, SandboxFailure

Outcome = Literal["pass", "fail", "sandbox error"]
Reason = Literal[
    "",  # passed
    "wrong",  # a test does not hold, or the words of the output differ from the expected ones
    "exception",  # the program raised an exception, or lacks a name that the tests use
    "syntax",  # the program does not compile
    "time",  # the program exceeded the limit of elapsed time or processor time
    "memory",  # the program ran out of memory
    "output",  # the output or an answer is too large
    "exit",  # the program exited too early or with an error code, or was killed by a signal
    "protocol",  # the program wrote something that is not a valid answer
    "isolation",  # sandbox error: the sandbox could not be created or broke down
    "tests",  # sandbox error: the tests themselves are wrong
]
MAX_DETAIL = 300
"""Maximum number of characters in the detail of a verdict."""
MAX_REQUEST = 2**24
"""Maximum number of bytes in a request of the assertion worker."""
TOLERANCE = 1e-6
"""Relative and absolute tolerance for the comparison of numbers in the output with expected numbers."""
OTHER_WORDS = "its words differ from the expected output"
"""Beginning of the verdict on other output. It does not say that the answer is wrong, because a problem may have
several valid answers, of which the data contain one."""
CPU_LIMIT_EXIT_CODE = 128 + 24
"""Exit code of a process that the signal SIGXCPU killed because it used too much processor time."""
LOADER = """
import marshal, sys
for name, code in {modules!r}:
    module = sys.modules[name] = type(sys)(name)
    exec(marshal.loads(code), module.__dict__)
module.main()
"""
"""Template of a script that creates modules from their compiled code and calls `main` of the last module."""


@dataclass(frozen=True)
class Program:
    """An untrusted program and its tests.

    Tests pass copies of their arguments to the program. Therefore a test cannot check whether a function changes its
    arguments in place.
    """

    source: str
    tests: tuple[str | StdioTest, ...]
    setup: str = ""
    """Trusted code that runs after the program is loaded and before the tests. It may use definitions of the program.
    """
    preamble: str = ""
    """Trusted code with which `source` begins. The rest of `source` completes the last function or class of the
    preamble. Tests use the other definitions of the preamble, even if the program redefines them."""
    input_file: str = ""
    """Name of the file from which stdio tests let the program read its input, besides standard input."""
    output_file: str = ""
    """Name of the file to which the program may write its output, besides standard output."""
    time_limit: float | None = None
    """Time limit of each stdio test in seconds, which the program's own problem sets."""


@dataclass(frozen=True)
class Verdict:
    """The result of grading a program."""

    outcome: Outcome
    reason: Reason
    detail: str
    """Explanation of the verdict in one line."""
    seconds: float
    """Elapsed time of the grading, in seconds."""


class ProgramFailed(Exception):
    """Exception that means that the graded program failed for the given reason."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def grade(program: Program, isolation: Isolation, limits: Limits) -> Verdict:
    """Grade a program and return the verdict. Several threads can call this function at the same time.

    Raises:
        ValueError: the program has no tests.
    """
    if not program.tests:
        raise ValueError("a program without tests cannot be graded")
    started = time.monotonic()
    limits = limits.with_time_limit(program.time_limit)
    outcome: Outcome
    reason: Reason
    outcome, reason, detail = "pass", "", ""
    try:
        assertions = [test for test in program.tests if isinstance(test, str)]
        with isolation.starter(limits) as start:
            if assertions:
                outcome, reason, detail = _grade_assertions(program, assertions, start, limits)
            worker = packed(_worker("stdio_worker"), program.source, program.input_file, program.output_file)
            for number, test in enumerate(program.tests, start=1):
                if outcome == "pass" and isinstance(test, StdioTest):
                    with _failures_at(f"test {number}"):
                        _grade_stdio(worker, test, start, limits, started + limits.total_seconds)
    except ProgramFailed as failure:
        outcome, reason, detail = "fail", failure.reason, str(failure)
    except SandboxFailure as failure:
        outcome, reason, detail = "sandbox error", "isolation", str(failure)
    return Verdict(outcome, reason, _one_line(detail), time.monotonic() - started)


@contextmanager
def _failures_at(place: str) -> Iterator[None]:
    """Prepend `place` to the message of a `ProgramFailed` that is raised in this context."""
    try:
        yield
    except ProgramFailed as failure:
        raise ProgramFailed(failure.reason, f"{place}: {failure}") from None


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_DETAIL else f"{line[: MAX_DETAIL - 1]}…"


@cache
def _worker(*modules: str) -> str:
    """Return a script that contains the given modules of the sandbox and calls `main` of the last one."""
    package = files("wmtp.sandbox")
    sources = {f"wmtp.sandbox.{name}": (package / f"{name}.py").read_text(encoding="utf-8") for name in modules}
    compiled = [(name, marshal.dumps(compile(source, name, "exec"))) for name, source in sources.items()]
    return LOADER.format(modules=compiled)


class Relay:
    """Relay between an assertion worker and a solution worker.

    It forwards each request to the solution worker, and each answer to the assertion worker, line by line.
    """

    def __init__(self, assertion_worker: Process, solution_worker: Process, limits: Limits) -> None:
        self._assertion_worker = assertion_worker
        self._solution_worker = solution_worker
        self._limits = limits
        self._num_answers = 0

    def verdict(self, job: bytes) -> tuple[Outcome, Reason, str]:
        """Send the job to the assertion worker, relay lines until this worker sends a verdict, and return the verdict.

        Raises:
            ProgramFailed: the program ended, took too long, sent too much or violated the protocol.
            SandboxFailure: the assertion worker failed.
        """
        deadline = time.monotonic() + self._limits.wall_seconds
        self._assertion_worker.send(job)
        with PipeLoop(self._assertion_worker, self._solution_worker) as pipe_loop:
            while not (line := self._next_request(pipe_loop, deadline)).startswith(b"="):
                self._solution_worker.send(line)
                self._assertion_worker.send(self._next_answer(pipe_loop, deadline))
                self._num_answers += 1
        outcome, reason, detail = json.loads(line[1:])
        return outcome, reason, detail

    def _next_request(self, pipe_loop: PipeLoop, deadline: float) -> bytes:
        received = self._assertion_worker.stdout_data
        for _ in pipe_loop.steps(deadline):
            if self._solution_worker.stdout_data:
                raise ProgramFailed("protocol", "an answer without a request")
            if line := _take_line(received):
                return line
            if len(received) > MAX_REQUEST:
                self._reject_request()
            if self._assertion_worker.output_ended:
                self._explain_breakdown()
        if self._num_answers > 1:
            raise ProgramFailed("time", f"the tests took longer than {self._limits.wall_seconds:g} s")
        raise SandboxFailure(f"the tests did not use the program within {self._limits.wall_seconds:g} s")

    def _next_answer(self, pipe_loop: PipeLoop, deadline: float) -> bytes:
        received = self._solution_worker.stdout_data
        for _ in pipe_loop.steps(deadline):
            line = _take_line(received)
            if max(len(line), len(received)) > self._limits.output_bytes:
                raise ProgramFailed("output", f"an answer of more than {self._limits.output_kib} KiB")
            if line:
                return line
            if self._solution_worker.output_ended:
                code = self._solution_worker.exit_code(max(0.0, deadline - time.monotonic()))
                if code == CPU_LIMIT_EXIT_CODE:
                    raise ProgramFailed("time", f"it took more than {self._limits.cpu_seconds} s of processor time")
                raise ProgramFailed("exit", f"it ended with code {code} instead of answering")
        raise ProgramFailed("time", f"it took longer than {self._limits.wall_seconds:g} s")

    def _reject_request(self) -> None:
        message = f"the tests pass more than {MAX_REQUEST >> 20} MiB"
        if self._num_answers > 1:
            raise ProgramFailed("output", f"because of the program's answers, {message}")
        raise SandboxFailure(message)

    def _explain_breakdown(self) -> None:
        code = self._assertion_worker.exit_code(EXIT_TIMEOUT_S)
        if code == CPU_LIMIT_EXIT_CODE and self._num_answers > 1:
            raise ProgramFailed("time", f"the tests took more than {self._limits.cpu_seconds} s of processor time")
        stderr = bytes(self._assertion_worker.stderr_data[-MAX_DETAIL:]).decode(errors="replace")
        raise SandboxFailure(f"the assertion worker ended with code {code}: {stderr}")


def _take_line(buffer: bytearray) -> bytes:
    """Remove the first line of a buffer and return the line. Return b"" if the buffer contains no complete line."""
    length = buffer.find(b"\n") + 1
    line = bytes(buffer[:length])
    del buffer[:length]
    return line


def _grade_assertions(program: Program, tests: list[str], start: Start, limits: Limits) -> tuple[Outcome, Reason, str]:
    job = {"source": program.source, "setup": program.setup, "preamble": program.preamble, "tests": tests}
    with (
        start(packed(_worker("wire", "assertion_worker"))) as assertion_worker,
        start(packed(_worker("wire", "solution_worker"))) as solution_worker,
    ):
        assertion_worker.wait_until_ready()
        solution_worker.wait_until_ready()
        return Relay(assertion_worker, solution_worker, limits).verdict(json.dumps(job).encode() + b"\n")


def _grade_stdio(program: bytes, test: StdioTest, start: Start, limits: Limits, end: float) -> None:
    """Run a program once and compare its output with the expected output.

    `end` is the time at which all tests of the program must have ended.

    Raises:
        ProgramFailed: the program failed, or its output differs from the expected output.
    """
    expected = test.stdout
    max_bytes = limits.output_bytes + 2 * len(expected.encode(errors="replace"))
    with (
        start(program, test.stdin.encode(errors="surrogatepass")) as process,
        PipeLoop(process) as pipe_loop,
    ):
        process.wait_until_ready()
        deadline = min(time.monotonic() + limits.wall_seconds, end)
        exit_code = _run(process, pipe_loop, deadline, max_bytes)
        stdout, stderr = (bytes(data).decode(errors="replace") for data in (process.stdout_data, process.stderr_data))
    if exit_code is None and deadline == end:
        raise ProgramFailed("time", f"all tests together took longer than {limits.total_seconds:g} s")
    if exit_code is None:
        raise ProgramFailed("time", f"it took longer than {limits.wall_seconds:g} s")
    if exit_code == CPU_LIMIT_EXIT_CODE:
        raise ProgramFailed("time", f"it took more than {limits.cpu_seconds} s of processor time")
    if exit_code:
        raise _exit_failure(exit_code, stderr)
    _compare(stdout.split(), expected.split())


def _run(process: Process, pipe_loop: PipeLoop, deadline: float, max_bytes: int) -> int | None:
    """Receive the output of a process until it ends, and return the exit code of the process.

    Return None if the process did not end before the deadline.

    Raises:
        ProgramFailed: the output is larger than `max_bytes`.
    """
    for _ in pipe_loop.steps(deadline):
        if len(process.stdout_data) > max_bytes:
            raise ProgramFailed("output", f"it wrote more than {max_bytes / 1024:g} KiB")
        if process.output_ended:
            break
    return process.exit_code(deadline - time.monotonic())


def _exit_failure(exit_code: int, stderr: str) -> ProgramFailed:
    """Return the failure of a program that ended with an error exit code.

    The reason is determined from the last line of the traceback in `stderr`, if there is one.
    """
    lines = [line for line in stderr.splitlines() if line.strip()]
    last = lines[-1] if lines and "Traceback" in stderr else ""
    kind = last.split(":")[0]
    reasons: dict[str, Reason] = {"SyntaxError": "syntax", "IndentationError": "syntax", "TabError": "syntax"}
    reason: Reason = "memory" if kind == "MemoryError" else reasons.get(kind, "exception" if last else "exit")
    return ProgramFailed(reason, last or f"it ended with code {exit_code}")


def _compare(words: list[str], expected: list[str]) -> None:
    """Compare the words of the output with the expected words.

    Raises:
        ProgramFailed: a word or the number of words differs.
    """
    for number, (actual, expected_word) in enumerate(zip(words, expected, strict=False), start=1):
        if not _is_equal(actual, expected_word):
            difference = f"word {number} is {actual[:80]!r}, not {expected_word[:80]!r}"
            raise ProgramFailed("wrong", f"{OTHER_WORDS}: {difference}")
    if len(words) != len(expected):
        raise ProgramFailed("wrong", f"{OTHER_WORDS}: {len(words)} words instead of {len(expected)}")


def _is_equal(actual: str, expected: str) -> bool:
    """Return whether a word of the output is equal to the expected word.

    If the expected word has a decimal point, two numbers also count as equal if they differ by at most `TOLERANCE`.
    """
    if actual == expected:
        return True
    if "." not in expected:
        return False
    try:
        pair = float(actual), float(expected)
    except ValueError:
        return False
    return all(map(math.isfinite, pair)) and math.isclose(*pair, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
