"""Tests of programs with standard input and output: how they read it, and what one test leaves for the next one."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.sandboxes import grade_program, pytest_generate_tests, verdict_of  # noqa: F401
from wmtp.data.records import StdioTest
from wmtp.sandbox.grader import Program
from wmtp.sandbox.isolation import Choice, Isolation, Unshare, _self_test_error, find_isolation

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


def methods(isolation: Choice) -> list[Isolation]:
    """Return the isolation method, and one whose programs have the user id of this process, if it is possible here."""
    in_user_namespace = Unshare(as_root=False)
    problem = _self_test_error(in_user_namespace)
    is_isolated = problem in (None, "a program can start more than 16 processes")  # the kernel does not limit root
    return [find_isolation(isolation), *([in_user_namespace] if is_isolated else [])]


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
    assert verdict.detail == "test 2: 2 words instead of 1"


@pytest.mark.parametrize("target", ["0", "-1", "1"])
def test_a_program_that_kills_all_it_can_fails_only_itself(target: str, isolation: Choice) -> None:
    source = f"import os\ntry:\n  if input() == '2': os.kill({target}, 9)\nexcept OSError: pass\nprint(1)"
    tests = tuple(StdioTest(stdin=f"{number}\n", stdout="1") for number in (1, 2, 3))
    for method in methods(isolation):
        verdict = grade_program(Program(source, tests), method)
        expected = ("fail", "exit") if target == "0" else ("pass", "")
        assert (verdict.outcome, verdict.reason) == expected, verdict
