"""Tests of programs with standard input and output: how they read it, and what one test leaves for the next one."""

import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.support.sandboxes import SHORT_LIMITS, grade_program, pytest_generate_tests, run_script, verdict_of  # noqa: F401
from wmtp.data.records import StdioTest
from wmtp.sandbox.grader import Program
from wmtp.sandbox.isolation import Choice, Isolation, Unshare, _self_test_error, find_isolation
from wmtp.sandbox.limits import Limits

LINES = 20_000
"""Number of lines of the input, which does not fit into the buffer of a pipe."""
SUM = "print(sum(int(line) for line in {} if line.strip()))"
READERS = {
    "input": "n = 0\ntry:\n  while True: n += int(input())\nexcept EOFError: print(n)",
    "lines": "import sys\nread = sys.stdin.readline\nprint(sum(int(read()) for _ in range(20_000)))",
    "iteration": "import sys\n" + SUM.format("sys.stdin"),
    "bytes": "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    "open(0)": SUM.format("open(0)"),
    "the device": SUM.format("open('/dev/stdin')"),
    "fileinput": "import fileinput\n" + SUM.format("fileinput.input()"),
}
"""Programs that read any standard input."""
FILE_READERS = {
    "a size": (
        "import io, os, sys\nclass Reader(io.IOBase):\n  def __init__(self):\n    self.buffer = io.BytesIO()\n"
        "    self.buffer.write(os.read(0, os.fstat(0).st_size))\n    self.buffer.seek(0)\n"
        "print(sum(int(line) for line in Reader().buffer))"
    ),
    "one read": "import os\nprint(sum(map(int, os.read(0, 1 << 20).split())))",
    "a map": "import mmap\nwith mmap.mmap(0, 0, access=mmap.ACCESS_READ) as text:\n  "
    + SUM.format("iter(text.readline, b'')"),
    "a private map": (
        "import mmap\ntext = mmap.mmap(0, 0, flags=mmap.MAP_PRIVATE)[:]\nprint(sum(map(int, text.split())))"
    ),
    "a second pass": "import sys\ncount = len(sys.stdin.readlines())\nsys.stdin.seek(0)\n"
    "print(sum(map(int, sys.stdin)) if count else 0)",
}
"""Programs that read standard input only if it is a file, as judges give it."""
TEXT = "".join(f"{number}\n" for number in range(LINES))
RESULT = str(sum(range(LINES)))


def natively(source: str, text: str, folder: Path, through_pipe: bool = False) -> str:
    """Return the output of a program without a sandbox."""
    path = folder / "input"
    path.write_text(text)
    with path.open() as file:
        given = {"input": text} if through_pipe else {"stdin": file}
        command = [sys.executable, "-c", source]
        return subprocess.run(command, **given, capture_output=True, text=True, check=False).stdout.strip()  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("name", READERS | FILE_READERS)
def test_programs_read_their_input_as_a_file(name: str, isolation: Choice, tmp_path: Path) -> None:
    source = (READERS | FILE_READERS)[name]
    assert natively(source, TEXT, tmp_path) == RESULT
    assert (natively(source, TEXT, tmp_path, through_pipe=True) == RESULT) == (name in READERS), "the control"
    verdict = verdict_of(source, isolation, StdioTest(stdin=TEXT, stdout=RESULT))
    assert verdict.outcome == "pass", verdict


IN_USER_NAMESPACE = Unshare(as_root=False)


def methods(isolation: Choice) -> list[Isolation]:
    """Return the isolation method, and one whose programs have the user id of this process, if it is possible here."""
    return [find_isolation(isolation), *([IN_USER_NAMESPACE] if is_isolated(IN_USER_NAMESPACE) else [])]


@cache
def is_isolated(method: Isolation) -> bool:
    """Return whether a method works here, ignoring the number of processes, which is not limited for root."""
    return _self_test_error(method) in (None, "a program can start more than 16 processes")


CHANGES = """
import mmap, os
changes = [
    lambda: os.write(0, b"9"),
    lambda: os.fchmod(0, 0o777),
    lambda: os.write(os.open("/dev/stdin", os.O_RDWR), b"9"),
    lambda: os.write(os.open("/proc/self/fd/0", os.O_WRONLY), b"9"),
    lambda: os.ftruncate(os.open("/dev/stdin", os.O_RDWR), 0),
    lambda: os.truncate("/dev/stdin", 0),
    lambda: mmap.mmap(os.open("/dev/stdin", os.O_RDWR), 1)[0:1].__class__ and mmap.mmap(0, 1).write(b"9"),
]
for change in changes:
    try: change()
    except OSError: pass
print(os.pread(0, 100, 0).decode())
"""


def test_a_program_cannot_change_its_input(isolation: Choice, tmp_path: Path) -> None:
    assert natively(CHANGES, "123", tmp_path) == "", "the control: it can change a file of its own"
    for method in methods(isolation):
        verdict = verdict_of(CHANGES, method, StdioTest(stdin="123", stdout="123"))
        assert verdict.outcome == "pass", verdict


LEAVER = """
import os, signal, socket, sys, time
start, address, files = os.lseek(0, 0, 1), "\\0left", ["/tmp/left", "left", "/dev/shm/left"]
if input() == "leave":
    for path in files:
        try: open(path, "w").write("left")
        except OSError: pass
    os.environ["LEFT"] = "1"
    sys.modules["left"] = sys
    for descriptor in range(3, 64):
        try: os.write(descriptor, b"0 left")
        except OSError: pass
    for number in (-1, os.getppid()):
        try: os.kill(number, signal.SIGKILL)
        except OSError: pass
    ready, told = os.pipe()
    if not os.fork():
        os.setsid()
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(address)
        os.write(told, b".")
        time.sleep(60)
    os.read(ready, 1)
    print("left")
else:
    found = ["offset"] * start + [path for path in files if os.path.exists(path)]
    found += [name for name in ("LEFT",) if name in os.environ] + [name for name in ("left",) if name in sys.modules]
    found += [pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) > 8]
    try:
        socket.socket(socket.AF_UNIX).connect(address)
        found.append("socket")
    except OSError: pass
    print("found", *found)
"""
LEAVES_AND_LOOKS = (StdioTest(stdin="leave\n", stdout="left"), StdioTest(stdin="look\n", stdout="found"))


def test_a_test_leaves_nothing_for_the_next_one(isolation: Choice) -> None:
    verdict = grade_program(Program(LEAVER, LEAVES_AND_LOOKS), isolation)
    assert verdict.outcome == "pass", verdict


def test_control_without_isolation_a_test_finds_what_the_one_before_left() -> None:
    harmless = LEAVER.replace("(-1, os.getppid())", "()").replace("    if not os.fork():", "    if not 1:")
    harmless = harmless.replace("    os.read(ready, 1)\n", "").replace(
        '["/tmp/left", "left", "/dev/shm/left"]', '["left"]'
    )
    harmless = harmless.replace("pid.isdigit() and int(pid) > 8", "False")
    verdict = grade_program(Program(harmless, LEAVES_AND_LOOKS), find_isolation("none"))
    assert verdict.detail == "test 2: its words differ from the expected output: 2 words instead of 1"


@pytest.mark.parametrize("target", ["0", "-1", "1"])
def test_a_program_that_kills_all_it_can_ends_only_itself(target: str, isolation: Choice) -> None:
    kill = f"import os\nos.kill({target}, 9)"
    for method in methods(isolation):
        with method.starter(SHORT_LIMITS) as start:
            code, _ = run_script(start, kill)
            assert (code == 137) == (target == "0")
            assert run_script(start, "print(1)") == (0, "1")


DIGITS = "print(len(str(7**10_000)), int('8' * 5_000) % 10)"


def test_integers_may_have_any_number_of_digits(isolation: Choice, tmp_path: Path) -> None:
    assert natively(DIGITS, "", tmp_path) == "", "the control: Python's own limit"
    for test in (StdioTest(stdin="", stdout="8451 8"), "assert str(f()) == '7' * 5_000"):
        verdict = verdict_of(f"{DIGITS}\ndef f(): return int('7' * 5_000)", isolation, test)
        assert verdict.outcome == "pass", verdict


def test_messages_on_standard_error_are_not_limited(isolation: Choice) -> None:
    source = "import sys\nsys.stderr.write('x' * 300_000)\nprint(4)"
    assert verdict_of(source, isolation, StdioTest(stdin="", stdout="4")).outcome == "pass"
    control = verdict_of(source.replace("stderr", "stdout"), isolation, StdioTest(stdin="", stdout="4"))
    assert control.reason == "output"


def test_the_cause_is_found_behind_many_messages(isolation: Choice) -> None:
    source = "import sys\nsys.stderr.write('x\\n' * 100_000)\nraise KeyError(4711)"
    verdict = verdict_of(source, isolation, StdioTest(stdin="", stdout="4"))
    assert (verdict.reason, verdict.detail) == ("exception", "test 1: KeyError: 4711")


@pytest.mark.parametrize(("time_limit", "seconds"), [(None, 1), (2.5, 3)])
def test_the_time_limit_of_a_record_is_kept(time_limit: float | None, seconds: int) -> None:
    source = "import resource\nprint(resource.getrlimit(resource.RLIMIT_CPU)[0])"
    program = Program(source, (StdioTest(stdin="", stdout=f"{seconds}"),), time_limit=time_limit)
    assert grade_program(program, "auto", Limits(cpu_seconds=1)).outcome == "pass"


def test_the_time_limit_of_a_record_is_bounded() -> None:
    limits = Limits(wall_seconds=5.0, cpu_seconds=5)
    assert limits.with_time_limit(None) == limits
    bounded = [limits.with_time_limit(seconds) for seconds in (0.001, 2.5, 20.0, 1e9)]
    assert [(found.cpu_seconds, found.wall_seconds) for found in bounded] == [(1, 5), (3, 5), (20, 20), (60, 60)]


def test_all_tests_together_have_a_time_limit() -> None:
    tests = tuple(StdioTest(stdin="", stdout="4") for _ in range(1000))
    program = Program("import time\ntime.sleep(0.3)\nprint(4)", tests)
    assert grade_program(Program(program.source, tests[:2]), "auto").outcome == "pass"
    verdict = grade_program(program, "auto", Limits(total_seconds=1.0))
    assert (verdict.reason, verdict.detail[-39:]) == ("time", "all tests together took longer than 1 s")


def test_programs_use_the_files_that_their_record_names(isolation: Choice) -> None:
    source = (
        "import os\nwith open('sum.in') as file, open('sum.out', 'w') as out:\n"
        "  assert os.path.getsize('sum.in') == 4\n  print(sum(map(int, file.read().split())), file=out)"
    )
    tests = StdioTest(stdin="1 2\n", stdout="3\n"), StdioTest(stdin="5 6\n", stdout="11\n")
    named = Program(source, tests, input_file="sum.in", output_file="sum.out")
    for method in (find_isolation(isolation), find_isolation("none")):
        assert grade_program(named, method).outcome == "pass"
        control = grade_program(Program(source, tests), method)
        assert (control.reason, control.detail[:25]) == ("exception", "test 1: FileNotFoundError")
    simple = "print(sum(map(int, input().split())))"
    redirected = f"import sys\nsys.stdin, sys.stdout = open('sum.in'), open('sum.out', 'w')\n{simple}"
    for source in (simple, redirected):
        assert grade_program(replace(named, source=source), isolation).outcome == "pass"
