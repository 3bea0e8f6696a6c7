"""Tests of verdicts on correct and on faulty programs."""

import math
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from tests.support.sandboxes import grade_program, pytest_generate_tests, verdict_of  # noqa: F401
from wmtp.data.records import StdioTest
from wmtp.sandbox.grader import MAX_DETAIL, Program
from wmtp.sandbox.isolation import Choice, Isolation
from wmtp.sandbox.limits import Limits

ONE_IS_ENOUGH = True


def slow(cases: Iterable[str], *names: str) -> list[Any]:
    """Return the names of the cases; those in `names` take the whole time limit and are marked slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in names else name for name in cases]


CORRECT = {
    "a value": ("def f(x): return x + 1", "assert f(3) == 4"),
    "special numbers": ("def f(): return float('inf'), 10**5000, 1j", "assert f() == (float('inf'), 10**5000, 1j)"),
    "nested collections": (
        "def f(): return {(1, 'a'): [{2, 3}, b'x']}, frozenset({1})",
            "assert f() == ({(1, 'a'): [{2, 3}, b'x']}, frozenset({1}))",
    ),
    "a class of its own": (
        "class Pair:\n  def __init__(self, a, b): self.a, self.b = a, b\n"
            "def f(pairs): return [p.a + p.b for p in pairs]",
        "assert f([Pair(1, 2), Pair(3, b=4)]) == [3, 7]",
    ),
    "attributes, items and lengths": (
        "class Node(dict):\n  pass\nclass Tree:\n  def __init__(self): self.left = None; self.all = [1]\n"
        "  def __getitem__(self, key): return self.all[key]\n  def __len__(self): return 7\n"
        "  def __setitem__(self, key, value): self.all[key] = value",
        "tree = Tree()\ntree.left = Tree()\ntree.left.left = 5\ntree[0] = 'x'\n"
        "assert (tree.left.left, tree[0], len(tree)) == (5, 'x', 7)\n"
        "assert tree.left is tree.left and tree != Tree()",
    ),
    "iterators": ("def f(n): return map(str, range(n))\ndef g():\n  yield 1\n  yield 2",
                  "assert list(f(3)) == ['0', '1', '2'] and set(g()) == {1, 2} and next(iter(g())) == 1"),
    "variables that change": ("n = 0\ndef f():\n  global n\n  n += 1", "assert n == 0\nf()\nassert n == 1"),
    "exceptions": (
        "class Odd(ValueError): pass\ndef f(x): raise (Odd if x else KeyError)('no')",
        "for x, kind in ((1, ValueError), (0, LookupError)):\n  try: f(x)\n"
            "  except kind as error: assert 'no' in str(error)\n"
        "  else: assert False",
    ),
    "exceptions of its own": (
        "class Odd(Exception): pass\ndef f(): raise Odd('no')",
            "try: f()\nexcept Exception as e: assert 'no' in str(e)",
    ),
    "a builtin's name": ("def sum(a, b): return a * b", "assert sum(2, 5) == 10"),
    "its own print": ("import sys\ndef f(x):\n  print('hello', x)\n  sys.stderr.write('x')\n  return x",
        "assert f(3) == 3"),
    "closed outputs": ("import sys\nsys.stdout.close()\nimport os\nos.close(1)\ndef f(x): return x",
        "assert f(3) == 3"),
    "a library that tests use": ("import math\ndef f(): return 0.1 + 0.2", "assert math.isclose(f(), 0.3)"),
    "nested functions in tests": ("def f(x): return x",
        "def check(candidate):\n  assert all(candidate(i) == f(i) for i in range(3))\ncheck(f)"),
    "builtin types": ("def f(x, kind): return isinstance(x, kind), kind", "assert f(1, int) == (True, int)"),
    "values of the library": (
        "from collections import deque\nfrom datetime import date\nfrom decimal import Decimal\n"
            "from fractions import Fraction\n"
        "def f(): return [deque([1]), date(2020, 1, 2), Decimal('1.5'), Fraction(1, 3)]\n"
            "def g(x): return {x: 1}.keys()",
        "from collections import deque\nfrom datetime import date\nfrom decimal import Decimal\n"
            "from fractions import Fraction\n"
        "assert f() == [deque([1]), date(2020, 1, 2), Decimal('1.5'), Fraction(1, 3)]\n"
            "assert g(f()[3]) == {Fraction(1, 3)}",
    ),
    "much output": ("print('x' * 200_000)\ndef f(x): return 4", "assert f(3) == 4"),
    "a guarded main": ("def f(x): return x\nif __name__ == '__main__':\n  raise SystemExit", "assert f(3) == 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRECT)
def test_correct_programs_pass_as_without_a_sandbox(name: str, isolation: Choice) -> None:
    source, test = CORRECT[name]
    exec(f"{source}\n{test}" if "own print" not in name and "closed" not in name else "", {"__name__": "plain"})
    verdict = verdict_of(source, isolation, test, Limits())
    assert verdict.outcome == "pass", verdict


FAULTY = {
    "wrong": ("def f(x): return x", "assert f(3) == 4", "wrong"),
    "raises": ("def f(x): return x[0]", "assert f(3) == 4", "exception"),
    "raises while loading": ("1 / 0", "assert f(3) == 4", "exception"),
    "lacks the function": ("def g(x): return x", "assert f(3) == 4", "exception"),
    "of another type": ("def f(x): return None", "assert f(3) < 4", "exception"),
    "no Python": ("def f(x) return x", "assert f(3) == 4", "syntax"),
    "a null byte": ("\0", "assert f(3) == 4", "syntax"),
    "endless": ("def f(x):\n  while True: pass", "assert f(3) == 4", "time"),
    "endless values": ("import itertools\ndef f(x): return itertools.count()", "assert list(f(3)) == 4", ("time",
        "memory")),
    "too much memory": ("def f(x): return [0] * 10**9", "assert f(3) == 4", "memory"),
    "a recursion": ("def f(x): return f(x)", "assert f(3) == 4", "exception"),
    "nested answers": ("def f(x):\n  for _ in range(10**5): x = [x]\n  return x", "assert f(3) == 4", "output"),
    "an answer within itself": ("def f(x):\n  x = []\n  x.append(x)\n  return x", "assert f(3) == 4", "output"),
    "a long answer": ("def f(x): return 'x' * 70_000", "assert f(3) == 4", "output"),
    "many items": ("def f(x): return [0] * 10**6", "assert f(3) == 4", "output"),
    "a huge integer": ("def f(x): return 1 << 10**6", "assert f(3) == 4", "output"),
    "a large integer": ("def f(x): return 1 << 10**5", "assert f(3) == 4", "wrong"),
    "leaves": ("def f(x): raise SystemExit(0)", "try: f(3)\nexcept: pass", "exit"),
    "interrupts": ("def f(x): raise KeyboardInterrupt", "assert f(3) == 4", "exit"),
    "ends": ("import os\ndef f(x): os._exit(0)", "assert f(3) == 4", "exit"),
    "kills itself": ("import os\ndef f(x): os.kill(os.getpid(), 9)", "assert f(3) == 4", "exit"),
    "crashes": ("import ctypes\ndef f(x): ctypes.string_at(0)", "assert f(3) == 4", "exit"),
    "closes the channel": ("import os\nos.closerange(0, 100)\ndef f(x): return 4", "assert f(3) == 4", "exit"),
    "garbage": ("import os\ndef f(x):\n  for n in range(3, 20):\n    try: os.write(n, b'garbage\\n')\n"
        "    except OSError: pass\n  return 4",
                "assert f(3) == 4", "protocol"),
    "answers twice": (
        "import os\ndef f(x):\n  for n in range(3, 20):\n    try: os.write(n, b'{\"id\":3,\"value\":4}\\n' * 2)\n"
            "    except OSError: pass\n"
        "  return 4", "assert f(3) == 4", "protocol",
    ),
    "answers too deep to be handed back": (
        "def f(x):\n  for _ in range(99): x = [x]\n  return x", "assert f([f(3)]) == 4", "output",
    ),
    "answers without end to be handed back": (
        "import itertools\ndef f(x): return 'x' * 60_000", "assert f(list(f(3) * 4)) == 4", "output",
    ),
    "answers that make questions grow": ("def f(x): return 'x' * 60_000", "assert f(f(3) * 300) == 4", "output"),
    "an end of what is no iterator": (
        "import os\ndef f(x):\n  for n in range(3, 20):\n    try: os.write(n, b'{\"id\":3,\"end\":4}\\n')\n"
            "    except OSError: pass\n  import time\n  time.sleep(60)", "list(map(f, [3]))", "protocol",
    ),
    "a guess at an answer": (
        "import os\nfor n in range(3, 20):\n  try: os.write(n, b'{\"id\":9,\"value\":4}\\n')\n  except OSError: pass\n"
        "import time\ntime.sleep(60)",
        "assert f(3) == 4", "protocol",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", slow(FAULTY, "endless", "endless values"))
def test_faulty_programs_fail_for_their_reason(name: str, isolation: Choice) -> None:
    source, test, reason = FAULTY[name]
    verdict = verdict_of(source, isolation, test)
    assert verdict.outcome == "fail", verdict
    assert verdict.reason in reason, verdict
    assert verdict.reason
    assert 0 < len(verdict.detail) <= MAX_DETAIL
    assert "\n" not in verdict.detail


def test_trusted_definitions_cannot_be_replaced(isolation: Choice) -> None:
    preamble = (
        "import math\nLIMIT = 5\n\ndef poly(xs, x):\n    return sum(c * x**i for i, c in enumerate(xs))\n\n"
        "def root(xs):\n    '''A zero of poly.'''\n"
    )
    test = (
        "def check(candidate):\n    assert math.fabs(poly([-6, 2], candidate([-6, 2]))) < 1e-4 and LIMIT == 5\n"
        "check(root)"
    )
    correct, incorrect = "    return 3.0\n", "    return 1.0\n\ndef poly(xs, x):\n    return 0\n"
    exec(f"{preamble}{incorrect}{test}", {})  # the control: in one process, the program's own `poly` is used

    def outcome(body: str, removed_preamble: str = preamble) -> str:
        return grade_program(Program(preamble + body, (test,), preamble=removed_preamble), isolation).outcome

    assert (outcome(correct), outcome(incorrect)) == ("pass", "fail")
    assert outcome(correct, preamble.replace("    '''A zero of poly.'''\n", "")) == "pass"


def test_setup_code_runs_between_program_and_tests(isolation: Choice) -> None:
    node = (
        "class Node:\n  def __init__(self, n): self.n, self.left = n, None\n"
        "def depth(t): return 1 + depth(t.left) if t else 0"
    )
    setup = "root = Node(1)\nroot.left = Node(2)"
    tests = ("assert depth(root) == 2", "assert depth(root.left) == 1", "assert root.left.n == 2")
    assert grade_program(Program(node, tests, setup=setup), isolation).outcome == "pass"
    verdict = grade_program(Program("def depth(t): return 2", tests, setup=setup), isolation)
    assert (verdict.outcome, verdict.reason) == ("fail", "exception")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (Program("f = 1", ("assert f ==",)), "tests"),
        (Program("f = 1", ("assert f == 1",), setup="1 +"), "tests"),
        (Program("f = 1", ("assert f == 1",), preamble="1 / 0"), "tests"),
        (Program("f = 1", ("import no_such_module\nassert f == 1",)), "tests"),
        (Program("f = 1", ("assert False",)), "tests"),
        (Program("f = 1", ("raise SystemExit",)), "tests"),
        (Program("def f(g): return g()", ("assert f(lambda: 1) == 1",)), "tests"),
        pytest.param(Program("f = 1", ("while True: pass",)), "isolation", marks=pytest.mark.slow),
        (Program("f = 1", ("import os\nos._exit(0)",)), "isolation"),
    ],
)
def test_errors_of_the_tests_are_not_failures_of_the_program(program: Program, reason: str, isolation: Choice) -> None:
    verdict = grade_program(program, isolation)
    assert (verdict.outcome, verdict.reason) == ("sandbox error", reason), verdict


@pytest.mark.parametrize("test", ["assert f(3) == 4", "assert f(3) != f(3) or f(3) < 4", "assert 1 + f(3) == 4"])
def test_the_detail_reports_a_comparison_with_an_object_of_the_program(test: str, isolation: Choice) -> None:
    source = "class A:\n  def __lt__(self, other): return True\nA.f = f = lambda x, a=A(): a\n"
    verdict = verdict_of(source, isolation, test)
    assert verdict.outcome == "fail"
    assert "compare an object of the program" in verdict.detail
    assert "compare" not in verdict_of("def f(x): return x", isolation).detail


def test_requests_above_the_size_limit_are_rejected_at_once(isolation: Choice) -> None:
    started = time.monotonic()
    verdict = verdict_of("def f(x): return 'x' * 60_000", isolation, "assert f(f(3) * 300) == 4", Limits())
    assert (verdict.outcome, verdict.reason) == ("fail", "output")
    assert time.monotonic() - started < 10


class MissingCommand(Isolation):
    """An isolation whose program does not exist."""

    name = "broken"

    def prefix(self, limits: Limits, namespace_fd: int) -> list[str]:
        return ["/no/such/program"]


class SilentFailure(MissingCommand):
    """An isolation that fails without a message."""

    def prefix(self, limits: Limits, namespace_fd: int) -> list[str]:
        return ["/bin/false"]


@pytest.mark.parametrize("kind", [MissingCommand, SilentFailure])
@pytest.mark.parametrize("test", ["assert f == 1", StdioTest(stdin="", stdout="")])
def test_a_broken_sandbox_is_not_a_failure_of_the_program(kind: type[MissingCommand], test: str | StdioTest) -> None:
    verdict = verdict_of("f = 1", kind(as_root=False), test)
    assert (verdict.outcome, verdict.reason) == ("sandbox error", "isolation")


def test_limits_too_small_for_the_sandbox_are_not_a_failure(isolation: Choice) -> None:
    assert verdict_of("f = 1", isolation, "assert f == 1", Limits(memory_mib=1)).outcome == "sandbox error"


def test_a_program_without_tests_is_refused(isolation: Choice) -> None:
    with pytest.raises(ValueError, match="without tests"):
        grade_program(Program("f = 1", ()), isolation)


STDIO = {
    "right": ("print(int(input()) + 1)", "4", ""),
    "words": ("print('  4 ')\nprint()", "4\n", ""),
    "a close number": ("print(4.0000001)", "4.0", ""),
    "a number in other words": ("print('4e0')", "4.00", ""),
    "a far number": ("print(4.001)", "4.0", "wrong"),
    "no decimal point": ("print(4.0)", "4", "wrong"),
    "not a number": ("print('nan')", "4.0", "wrong"),
    "infinity": ("print('inf')", "1.0", "wrong"),
    "too few": ("print(4)", "4 5", "wrong"),
    "too many": ("print(4, 5)", "4", "wrong"),
    "leaves early": ("print(4)\nexit()", "4", ""),
    "a nonzero exit code": ("print(4)\nimport sys\nsys.exit(3)", "4", "exit"),
    "raises after all": ("print(4)\n1 / 0", "4", "exception"),
    "is main": ("if __name__ == '__main__': print(4)", "4", ""),
    "reads all": ("import sys\nprint(len(open(0).read()) + 2)", "4", ""),
    "reads the device": ("print(int(open('/dev/stdin').read()) + 1)", "4", ""),
    "leaves the input": ("print(4)", "4", ""),
    "no Python": ("print(4", "4", "syntax"),
    "waits": ("import time\ntime.sleep(60)", "4", "time"),
    "works for long": ("while True: pass", "4", "time"),
    "classes and functions": ("import dataclasses\n@dataclasses.dataclass\nclass A:\n  n: int\n"
        "def f(): return A(4)\nprint(f().n)", "4", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", slow(STDIO, "waits", "works for long"))
def test_programs_with_standard_input_and_output_get_the_right_verdict(name: str, isolation: Choice) -> None:
    source, stdout, reason = STDIO[name]
    verdict = verdict_of(source, isolation, StdioTest(stdin="3\n", stdout=stdout))
    assert (verdict.outcome, verdict.reason) == ("fail" if reason else "pass", reason), verdict


def test_long_input_and_output_are_complete(isolation: Choice) -> None:
    text = "\n".join(map(str, range(100_000)))
    assert (
        verdict_of("import sys\nprint(sys.stdin.read())", isolation, StdioTest(stdin=text, stdout=text)).outcome
        == "pass"
    )
    assert verdict_of("print(4)", isolation, StdioTest(stdin=text * 5, stdout="4")).outcome == "pass"


@pytest.mark.slow
def test_output_is_complete_when_this_process_is_busy(isolation: Choice) -> None:
    """With busy threads, a program can exit between waiting for its output and checking whether it runs."""
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            sum(range(100))

    threads = [threading.Thread(target=keep_busy) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        test = StdioTest(stdin="1\n", stdout="7 " * 60_000)
        slow = Limits(wall_seconds=60)  # the limit also holds on a busy machine
        verdicts = [verdict_of("print('7 ' * 60_000)", isolation, test, slow) for _ in range(12)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {(verdict.outcome, verdict.detail) for verdict in verdicts} == {("pass", "")}


def test_grading_stops_at_the_first_failure(isolation: Choice) -> None:
    tests = tuple(StdioTest(stdin=str(n), stdout=str(min(n, 1))) for n in range(60))
    verdict = grade_program(Program("print(input())", tests), isolation)
    assert verdict.detail == "test 3: its words differ from the expected output: word 1 is '2', not '1'"


def verdicts(verdict: Callable[[Any], Any], cases: Iterable[Any], num_workers: int) -> list[Any]:
    """Return the verdict on each case; several workers call the function at the same time."""
    with ThreadPoolExecutor(num_workers) as pool:
        return list(pool.map(verdict, cases))


@pytest.mark.slow
def test_verdicts_do_not_depend_on_the_number_of_workers(isolation: Choice) -> None:
    cases = [(source, test) for source, test, _ in FAULTY.values() if "itertools" not in source]
    cases = [case for case in cases if "while True" not in case[0]] + list(CORRECT.values())

    def verdict(case: tuple[str, str | StdioTest]) -> tuple[str, str]:
        found = verdict_of(case[0], isolation, case[1], Limits(wall_seconds=20.0))
        return found.outcome, found.reason

    assert verdicts(verdict, cases, 1) == verdicts(verdict, cases, 4)


def test_control_verdicts_of_programs_in_one_namespace_depend_on_the_number_of_workers() -> None:
    cases = [CORRECT[name] for name in ("a value", "special numbers", "nested collections", "exceptions")]
    namespace: dict[str, Any] = {}

    def verdict(case: tuple[str, str]) -> bool:
        exec(case[0], namespace)
        time.sleep(0.1)  # meanwhile, the other workers load their programs
        with suppress(Exception):
            exec(case[1], namespace)
            return True
        return False

    assert verdicts(verdict, cases, 1) == [True] * 4 != verdicts(verdict, cases, 4)


def test_time_is_measured_from_the_start_of_the_program(isolation: Choice) -> None:
    verdict = verdict_of("def f(x): return x", isolation, "assert f(3) == 3", Limits(wall_seconds=1.0))
    assert verdict.outcome == "pass"
    assert math.isfinite(verdict.seconds)
