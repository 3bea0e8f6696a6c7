"""Judges one program: by assertions, which its process never sees, or by what it writes for given input."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from wmtp.data.records import StdioTest
from wmtp.sandbox.isolation import Isolation
from wmtp.sandbox.limits import Limits
from wmtp.sandbox.mounts import python
from wmtp.sandbox.process import END_SECONDS, Exchange, Process, SandboxFailure

Outcome = Literal["pass", "fail", "sandbox error"]
Reason = Literal[
    "",  # passed
    "wrong",  # a test does not hold, or the output differs
    "exception",  # the program raised, or lacks what the tests use
    "syntax",  # it does not compile
    "time",  # it took too long, by the clock or of the processor
    "memory",  # it ran out of memory
    "output",  # it wrote or answered too much
    "exit",  # it ended, by itself or by a signal, where it should not
    "protocol",  # it sent what is no answer to a question
    "isolation",  # sandbox error: the sandbox did not come about or broke down
    "tests",  # sandbox error: the tests themselves are at fault
]
MAX_DETAIL = 300
MAX_QUESTION = 2**24
TOLERANCE = 1e-6
CPU_SIGNAL_CODE = 128 + 24
LOADER = """
import sys, types
for name, source in {sources!r}:
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
module.main()
"""


@dataclass(frozen=True)
class Program:
    """An untrusted program and its tests.

    Tests hand over their arguments as copies, so that no test can examine what a function changes in place.
    `setup` is trusted code that runs once the program is loaded and before the tests, and may use what the program
    defines. `preamble` is trusted code that the program begins with: what it defines completely, tests take from
    there; its last function is the program's.
    """

    source: str
    tests: tuple[str | StdioTest, ...]
    setup: str = ""
    preamble: str = ""


@dataclass(frozen=True)
class Verdict:
    """What became of a program. `detail` is one line for people."""

    outcome: Outcome
    reason: Reason
    detail: str
    seconds: float


class Failed(Exception):
    """The program fails, for this reason."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def judge(program: Program, isolation: Isolation, limits: Limits) -> Verdict:
    """Judge a program. Blocks; any number of threads may do so at once.

    Raises:
        ValueError: there are no tests.
    """
    if not program.tests:
        raise ValueError("a program without tests cannot be judged")
    started = time.monotonic()
    outcome: Outcome
    reason: Reason
    outcome, reason, detail = "pass", "", ""
    try:
        assertions = [test for test in program.tests if isinstance(test, str)]
        if assertions:
            outcome, reason, detail = _judge_assertions(program, assertions, isolation, limits)
        for number, test in enumerate(program.tests, start=1):
            if outcome == "pass" and isinstance(test, StdioTest):
                with _named(f"test {number}"):
                    _judge_output(program.source, test, isolation, limits)
    except Failed as failure:
        outcome, reason, detail = "fail", failure.reason, str(failure)
    except SandboxFailure as failure:
        outcome, reason, detail = "sandbox error", "isolation", str(failure)
    return Verdict(outcome, reason, _one_line(detail), time.monotonic() - started)


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Say in a failure where it happened."""
    try:
        yield
    except Failed as failure:
        raise Failed(failure.reason, f"{place}: {failure}") from None


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_DETAIL else f"{line[: MAX_DETAIL - 1]}…"


@cache
def _script(*modules: str) -> str:
    """The last of these modules as a script that brings the others along."""
    package = files("wmtp.sandbox")
    sources = [(f"wmtp.sandbox.{name}", (package / f"{name}.py").read_text(encoding="utf-8")) for name in modules]
    return LOADER.format(sources=sources)


class Dialogue:
    """A judge's process asking a candidate's process, line by line, through this one."""

    def __init__(self, referee: Process, candidate: Process, limits: Limits) -> None:
        self._referee = referee
        self._candidate = candidate
        self._limits = limits
        self._num_answers = 0

    def verdict(self, task: bytes) -> tuple[Outcome, Reason, str]:
        """Relay until the judge's verdict.

        Raises:
            Failed: the program ended, took too long or sent too much.
            SandboxFailure: the judge's process broke down.
        """
        deadline = time.monotonic() + self._limits.wall_seconds
        self._referee.send(task)
        with Exchange(self._referee, self._candidate) as exchange:
            while not (line := self._question(exchange, deadline)).startswith(b"="):
                self._candidate.send(line)
                self._referee.send(self._answer(exchange, deadline))
                self._num_answers += 1
        outcome, reason, detail = json.loads(line[1:])
        return outcome, reason, detail

    def _question(self, exchange: Exchange, deadline: float) -> bytes:
        inbox = self._referee.inbox
        for _ in exchange.turns(deadline):
            self._check_candidate()
            if self._candidate.inbox:
                raise Failed("protocol", "an answer to no question")
            if line := _take_line(inbox):
                return line
            if max(len(inbox), len(self._referee.noise)) > MAX_QUESTION:
                self._refuse_question()
            if self._referee.ended:
                self._explain_breakdown()
        if self._num_answers > 1:
            raise Failed("time", f"the tests took longer than {self._limits.wall_seconds:g} s")
        raise SandboxFailure(f"the tests asked nothing of the program in {self._limits.wall_seconds:g} s")

    def _answer(self, exchange: Exchange, deadline: float) -> bytes:
        inbox = self._candidate.inbox
        for _ in exchange.turns(deadline):
            self._check_candidate()
            line = _take_line(inbox)
            if max(len(line), len(inbox)) > self._limits.output_bytes:
                raise Failed("output", f"an answer of more than {self._limits.output_kib} KiB")
            if line:
                return line
            if self._candidate.ended:
                code = self._candidate.exit_code(max(0.0, deadline - time.monotonic()))
                if code == CPU_SIGNAL_CODE:
                    raise Failed("time", f"it took more than {self._limits.cpu_seconds} s of the processor")
                raise Failed("exit", f"it ended with code {code} instead of answering")
        raise Failed("time", f"it took longer than {self._limits.wall_seconds:g} s")

    def _check_candidate(self) -> None:
        if len(self._candidate.noise) > self._limits.output_bytes:
            raise Failed("output", f"it wrote more than {self._limits.output_kib} KiB")

    def _refuse_question(self) -> None:
        said = f"the tests hand over or say more than {MAX_QUESTION >> 20} MiB"
        if self._num_answers > 1:
            raise Failed("output", f"by the program's answers {said}")
        raise SandboxFailure(said)

    def _explain_breakdown(self) -> None:
        code = self._referee.exit_code(END_SECONDS)
        if code == CPU_SIGNAL_CODE and self._num_answers > 1:
            raise Failed("time", f"the tests took more than {self._limits.cpu_seconds} s of the processor")
        said = bytes(self._referee.noise[-MAX_DETAIL:]).decode(errors="replace")
        raise SandboxFailure(f"the judge's process ended with code {code}: {said}")


def _take_line(inbox: bytearray) -> bytes:
    """Remove and return the first line, if there is a whole one."""
    length = inbox.find(b"\n") + 1
    line = bytes(inbox[:length])
    del inbox[:length]
    return line


def _judge_assertions(
    program: Program, tests: list[str], isolation: Isolation, limits: Limits
) -> tuple[Outcome, Reason, str]:
    task = {"source": program.source, "setup": program.setup, "preamble": program.preamble, "tests": tests}
    with (
        isolation.start(python("-c", _script("wire", "assertion_worker")), limits) as referee,
        isolation.start(python("-c", _script("wire", "solution_worker")), limits) as candidate,
    ):
        referee.wait_until_ready()
        candidate.wait_until_ready()
        return Dialogue(referee, candidate, limits).verdict(json.dumps(task).encode() + b"\n")


def _judge_output(source: str, test: StdioTest, isolation: Isolation, limits: Limits) -> None:
    """Run a program once, and compare what it writes.

    Raises:
        Failed: it did not end well, or wrote something else.
    """
    expected = test.stdout
    most = limits.output_bytes + 2 * len(expected.encode(errors="replace"))
    code = source.encode(errors="surrogatepass")
    with (
        isolation.start(python("-c", _script("stdio_worker")), limits) as process,
        Exchange(process) as exchange,
    ):
        process.wait_until_ready()
        process.send(b"%d\n" % len(code) + code + test.stdin.encode(errors="surrogatepass"))
        deadline = time.monotonic() + limits.wall_seconds
        exit_code = _run(process, exchange, deadline, most)
        written, noise = bytes(process.inbox).decode(errors="replace"), bytes(process.noise).decode(errors="replace")
    if exit_code is None:
        raise Failed("time", f"it took longer than {limits.wall_seconds:g} s")
    if exit_code == CPU_SIGNAL_CODE:
        raise Failed("time", f"it took more than {limits.cpu_seconds} s of the processor")
    if exit_code:
        raise _bad_end(exit_code, noise)
    _compare(written.split(), expected.split())


def _run(process: Process, exchange: Exchange, deadline: float, most: int) -> int | None:
    """Take in all that a process writes; its exit code, or None where the time is over first."""
    for _ in exchange.turns(deadline):
        if len(process.inbox) + len(process.noise) > most:
            raise Failed("output", f"it wrote more than {most / 1024:g} KiB")
        if not process.has_waiting:
            process.close_input()
        if process.ended:
            break
    return process.exit_code(deadline - time.monotonic())


def _bad_end(exit_code: int, noise: str) -> Failed:
    """Why a program ended with an error, by the last line of its traceback."""
    lines = [line for line in noise.splitlines() if line.strip()]
    last = lines[-1] if lines and "Traceback" in noise else ""
    kind = last.split(":")[0]
    reasons: dict[str, Reason] = {"SyntaxError": "syntax", "IndentationError": "syntax", "TabError": "syntax"}
    reason: Reason = "memory" if kind == "MemoryError" else reasons.get(kind, "exception" if last else "exit")
    return Failed(reason, last or f"it ended with code {exit_code}")


def _compare(written: list[str], expected: list[str]) -> None:
    for place, (got, wanted) in enumerate(zip(written, expected, strict=False), start=1):
        if not _same(got, wanted):
            raise Failed("wrong", f"word {place} is {got[:80]!r}, not {wanted[:80]!r}")
    if len(written) != len(expected):
        raise Failed("wrong", f"{len(written)} words instead of {len(expected)}")


def _same(got: str, wanted: str) -> bool:
    """Whether two words are equal, or close numbers where the expected one has a decimal point."""
    if got == wanted:
        return True
    if "." not in wanted:
        return False
    try:
        pair = float(got), float(wanted)
    except ValueError:
        return False
    return all(map(math.isfinite, pair)) and math.isclose(*pair, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
