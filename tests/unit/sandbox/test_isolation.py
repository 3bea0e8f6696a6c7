"""Tests with incorrect programs that try to pass. Each of them passes if it shares a process with its tests."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.sandboxes import ASSERTION, pytest_generate_tests, verdict_of  # noqa: F401
from wmtp.sandbox.isolation import Choice

CHEATS = {
    "sys.exit": ("import sys\nsys.exit(0)", ASSERTION),
    "os._exit": ("import os\nos._exit(0)", ASSERTION),
    "os._exit when called": ("import os\ndef f(x): os._exit(0)", ASSERTION),
    "always equal": ("class A:\n  def __eq__(self, other): return True\ndef f(x): return A()", ASSERTION),
    "equal by the metaclass": (
        "class M(type):\n  def __eq__(s, o): return True\n  __hash__ = type.__hash__\n"
        "class A(metaclass=M): pass\ndef f(x): return A", ASSERTION,
    ),
    "an integer that equals all": (
        "class A(int):\n  def __eq__(s, o): return True\n  __hash__ = int.__hash__\ndef f(x): return A(1)", ASSERTION,
    ),
    "a string that equals all": (
        "class A(str):\n  def __eq__(s, o): return True\n  __hash__ = str.__hash__\ndef f(x): return A()",
        "assert f(3) == 'yes'",
    ),
    "a list that equals all": ("class A(list):\n  def __eq__(s, o): return True\ndef f(x): return A()",
        "assert f(3) == [1]"),
    "an object in a list": ("class A:\n  def __eq__(s, o): return True\ndef f(x): return [A()]", "assert f(3) == [4]"),
    "a walk through the frames": (
        "import sys\ndef f(x):\n  frame = sys._getframe(1)\n  while frame:\n"
        "    for found in frame.f_code.co_consts:\n      if type(found) is int and found > 1000: return found\n"
        "    frame = frame.f_back", ASSERTION,
    ),
    "a search of all objects": (
        "import gc\ndef f(x):\n  for thing in gc.get_objects():\n"
        "    if type(thing) is dict and 'EXPECTED' in thing: return thing['EXPECTED']",
        "EXPECTED = [4711]\nassert f(3) == EXPECTED[0] or f(3) == EXPECTED",
    ),
    "reading what is in /proc": (
        "import glob, re\ndef f(x):\n  for path in glob.glob('/proc/*/cmdline') + glob.glob('/proc/*/environ') "
        "+ glob.glob('/proc/*/fd/*') + glob.glob('/tmp/*') + ['/proc/self/cmdline']:\n    try:\n"
        "      import os\n      if '/fd/' in path and not os.path.isfile(path): continue\n"
        "      found = re.search(r'f\\(3\\) == (\\d{4})', open(path, errors='replace').read(1 << 20))\n"
        "      if found: return int(found[1])\n    except OSError: pass", ASSERTION,
    ),
    "writing verdicts": (
        "import os\nfor line in (b'PASSED\\n', b'=[\"pass\",\"\",\"\"]\\n', b'{\"id\":1,\"value\":4711}\\n'):\n"
        "  for number in range(1, 200):\n    try: os.write(number, line)\n    except OSError: pass\ndef f(x): return 0",
        ASSERTION,
    ),
    "other builtins": ("import builtins\nbuiltins.sorted = lambda items: [1, 2]\ndef f(x): return 5",
        "assert sorted(f(3)) == [1, 2]"),
    "builtins of its own": ("def sorted(items): return [1, 2]\ndef f(x): return 5", "assert sorted(f(3)) == [1, 2]"),
    "another library": (
        "import math\nmath.isclose = lambda *values, **options: True\ndef f(x): return 5",
        "assert math.isclose(f(3), 4711.0)",
    ),
    "another assertion": ("AssertionError = SystemExit\nimport builtins\n"
        "builtins.AssertionError = type('E', (Exception,), {})\n"
                          "import sys\nsys.excepthook = lambda *a: __import__('os')._exit(0)\n"
                              "def f(x): return 5", ASSERTION),
    "emptying the arguments": ("def f(xs):\n  xs.clear()\n  return []", "xs = [2, 1]\nassert f(xs) == sorted(xs)"),
    "the end of the tests' own loop": (
        "def f(x): raise StopIteration", "assert all(map(lambda p: f(p) == 1, [1, 2, 3]))",
    ),
    "at exit": ("import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): return 5", ASSERTION),
}  # fmt: skip


def naive(source: str, test: str, folder: Path) -> bool:
    """Return whether a program seems to pass if it shares one process with its tests."""
    program = f"{source}\n{test}\nprint('PASSED')"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, cwd=folder, timeout=30, check=False)
    return ended.returncode == 0 or b"PASSED" in ended.stdout


@pytest.mark.parametrize("name", CHEATS)
def test_no_program_cheats_the_grader(name: str, isolation: Choice, tmp_path: Path) -> None:
    source, test = CHEATS[name]
    assert naive(source, test, tmp_path), "the control: the program does not pass in one process"
    verdict = verdict_of(source, isolation, test)
    assert verdict.outcome == "fail", verdict
