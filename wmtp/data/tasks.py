"""Embedded programming tasks: generated and executed without files or network.

A task is a chain of one to four steps (its difficulty). The prompt describes the chain, and the solution has one line
for each step. An incorrect solution differs from the correct one in one decisive token or one step. All solutions are
executed: correct ones pass all tests, incorrect ones fail at least one. Noise is added to executed solutions.
"""

import ast
import random
import re
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

from wmtp.data.records import Record, Span
from wmtp.data.task_noise import Noise, NoiseKind
from wmtp.data.task_steps import (
    CLOSINGS,
    CONFUSIONS,
    CONNECTORS,
    FUNCTIONS,
    INTEGER,
    NAMES,
    NUMBERS,
    OPENINGS,
    STEPS,
    TEXT,
    Step,
)  # fmt: skip
from wmtp.errors import InputError

SPLITS = {"train": range(70), "validation": range(70, 85), "test": range(85, 100)}
NUM_TESTS = 5
STEP_LIMIT = 2_000
PROGRAM = "<task>"
"""The file name in the code objects of programs."""
WORDS = ("sun", "letters", "Rain", "note", "trees", "A", "lists", "union", "stars", "Olive", "in", "rust")
MARKED = re.compile("«(.*?)»")
Program = tuple[str, tuple[Span, ...]]
"""A program and its decisive spans."""


@dataclass(frozen=True)
class Line:
    """One step with its constant. `code` still contains «marks», `{v}` and `{e}`."""

    step: Step
    constant: str
    code: str


@dataclass(frozen=True)
class Task:
    """A chain of lines, the names that its program uses, and its tests, which are assertions with literals."""

    lines: tuple[Line, ...]
    function: str
    variable: str
    element: str
    prompt: str
    tests: tuple[str, ...] = ()

    @property
    def signature(self) -> str:
        """The task without its wording and names; tasks with equal signatures are the same."""
        return " ; ".join(line.code for line in self.lines)


class StepLimitError(Exception):
    """A generated program ran more lines than `STEP_LIMIT`."""


def execute(program: str, calls: list[str], step_limit: int = STEP_LIMIT) -> list[str]:
    """Run a program and return the literal result of each call, or the class name of its exception.

    Use this function only for programs that this module generated. They are not isolated; only the number of executed
    lines is limited.

    Raises:
        StepLimitError: more than `step_limit` lines were executed.
    """
    steps = 0

    def count(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        """Count the executed lines and enforce the limit."""
        nonlocal steps
        if frame.f_code.co_filename != PROGRAM:  # called by the garbage collector
            return None
        steps += 1
        if steps > step_limit:
            raise StepLimitError
        return count

    results = []
    previous = sys.gettrace()
    sys.settrace(count)
    try:
        scope: dict[str, Any] = {}
        exec(compile(program, PROGRAM, "exec"), scope)
        for call in calls:
            try:
                results.append(repr(eval(_expression(call), scope)))
            except StepLimitError:
                raise
            except Exception as error:  # noqa: BLE001 - any exception of a program is its result
                results.append(type(error).__name__)
    finally:
        sys.settrace(previous)
    return results


@lru_cache(maxsize=NUM_TESTS)
def _expression(call: str) -> CodeType:
    """Return the code of a call; cached, because all programs of a task get the same calls."""
    return compile(call, PROGRAM, "eval")


def render(task: Task, lines: tuple[Line, ...]) -> tuple[str, list[list[Span]]]:
    """Return the program of `lines` with the task's names, and the decisive character spans of each line."""
    text = f"def {task.function}({task.variable}):\n"
    spans: list[list[Span]] = []
    for line in lines:
        text += f"    {task.variable} = "
        code = line.code.replace("{v}", task.variable).replace("{e}", task.element)
        spans.append([])
        position = 0
        for mark in MARKED.finditer(code):
            text += code[position : mark.start()]
            spans[-1].append((len(text), len(text) + len(mark[1])))
            text += mark[1]
            position = mark.end()
        text += code[position:] + "\n"
    return text + f"    return {task.variable}\n", spans


def passes(program: str, tests: tuple[str, ...]) -> bool:
    """Return whether a generated program passes its literal tests."""
    calls, expected = zip(*(test.removeprefix("assert ").split(" == ") for test in tests), strict=True)
    return execute(program, list(calls)) == list(expected)


def draw_task(random_: random.Random, difficulty: int) -> Task:
    """Return a random task of `difficulty` steps, without tests."""
    kind = random_.choice((NUMBERS, NUMBERS, INTEGER, TEXT))
    lines: list[Line] = []
    current = kind
    while len(lines) < difficulty:
        step = random_.choice([s for s in STEPS if s.source == current and s not in [line.step for line in lines]])
        constant = random_.choice(step.constants) if step.constants else ""
        lines.append(Line(step, constant, step.code.replace("{c}", constant)))
        current = step.result
    function, (variable, element) = random_.choice(FUNCTIONS), random_.choice(NAMES[kind])
    opening = random_.choice(OPENINGS).format(call=f"{function}({variable})", kind=kind, name=variable)
    phrases = [random_.choice(line.step.wordings).replace("{c}", line.constant) for line in lines]
    sentences = phrases[0] + "".join(", " + random_.choice(CONNECTORS) + phrase for phrase in phrases[1:])
    prompt = f"{opening} {sentences[0].upper()}{sentences[1:]}. {random_.choice(CLOSINGS)}"
    return Task(tuple(lines), function, variable, element, prompt)


def draw_arguments(random_: random.Random, task: Task) -> list[str]:
    """Return literal arguments for the task's tests, near its constants so that comparisons matter."""
    constants = [int(line.constant) for line in task.lines if line.constant.isdigit()] or [5]

    def integer() -> int:
        """Return a random integer, often near a constant of the task."""
        near = random_.choice(constants) + random_.randint(-2, 2)
        return near if random_.random() < 0.4 else random_.randint(-20, 40)

    def argument() -> object:
        """Return a random argument of the kind that the task takes."""
        match task.lines[0].step.source:
            case kind if kind == INTEGER:
                return integer()
            case kind if kind == NUMBERS:
                return [integer() for _ in range(random_.randint(4, 12))]
            case kind if kind == TEXT:
                return " ".join(random_.choices(WORDS, k=random_.randint(2, 5)))
            case kind:
                raise AssertionError(kind)

    return [repr(argument()) for _ in range(NUM_TESTS)]


def with_tests(random_: random.Random, task: Task) -> Task | None:
    """Return the task with tests, whose expected results are those of the task's own solution.

    The result is None if the tests would be uninformative.
    """
    program, _ = render(task, task.lines)
    calls = [f"{task.function}({argument})" for argument in draw_arguments(random_, task)]
    results = execute(program, calls)
    if len(set(results)) < 3 or any(len(result) > 120 for result in results):
        return None
    for result in results:
        ast.literal_eval(result)
    tests = tuple(f"assert {call} == {result}" for call, result in zip(calls, results, strict=True))
    return Task(task.lines, task.function, task.variable, task.element, task.prompt, tests)


def wrong_line(random_: random.Random, line: Line) -> tuple[Line, int | None] | None:
    """Return a variant of a line in which one decisive token is replaced, and the number of this token in the line.

    The number is None if the whole step was replaced by another step with the same kinds of values. The result is None
    if there is no such step.
    """
    marks = list(MARKED.finditer(line.code))
    if marks and random_.random() < 0.8:
        number = random_.randrange(len(marks))
        mark = marks[number]
        others = line.step.constants if mark[1] == line.constant else CONFUSIONS[mark[1]]
        token = random_.choice([other for other in others if other != mark[1]])
        return Line(line.step, line.constant, f"{line.code[: mark.start()]}«{token}»{line.code[mark.end() :]}"), number
    kinds = (line.step.source, line.step.result)
    siblings = [step for step in STEPS if (step.source, step.result) == kinds and step != line.step]
    if not siblings:
        return None
    step = random_.choice(siblings)
    constant = line.constant if line.constant in step.constants else random_.choice(step.constants or ("",))
    return Line(step, constant, step.code.replace("{c}", constant)), None


def wrong_solution(random_: random.Random, task: Task) -> Program | None:
    """Return an incorrect program, and the one decisive span in which it differs from the task's solution.

    The result is None if none of twenty candidates failed a test.
    """
    for _ in range(20):
        index = random_.randrange(len(task.lines))
        changed = wrong_line(random_, task.lines[index])
        if changed is None:
            continue
        line, mark = changed
        lines = (*task.lines[:index], line, *task.lines[index + 1 :])
        program, spans = render(task, lines)
        if passes(program, task.tests):
            continue
        if mark is not None:
            return program, (spans[index][mark],)
        return program, (difference(program, render(task, task.lines)[0]),)
    return None


def difference(program: str, other: str) -> Span:
    """Return the range [start, end) of characters in which a program differs from another one.

    The range excludes the common prefix and the common suffix of the two programs.
    """
    start = common_length(program, other)
    end = len(program) - common_length(program[start:][::-1], other[start:][::-1])
    return start, max(end, start + 1)  # at least one character, also if something was left out


def common_length(one: str, other: str) -> int:
    """Return the length of the common prefix of two texts."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def wrong_solutions(random_: random.Random, task: Task, number: int) -> list[Program] | None:
    """Return `number` different results of `wrong_solution`; None if fewer were found in twenty draws for each."""
    found: dict[str, tuple[Span, ...]] = {}
    for _ in range(20 * number):
        wrong = wrong_solution(random_, task)
        if wrong is None:
            return None
        found.setdefault(*wrong)
        if len(found) == number:
            return list(found.items())
    return None


def solutions(random_: random.Random, task: Task, name: str, noise: Noise, num_wrong: int) -> list[Record] | None:
    """Return the correct solution of a task and different incorrect ones; None if too few incorrect ones were found."""
    wrong = wrong_solutions(random_, task, num_wrong)
    if wrong is None:
        return None
    program, spans = render(task, task.lines)
    assert passes(program, task.tests)
    records = []
    for number, candidate in enumerate([(program, tuple(span for line in spans for span in line)), *wrong]):
        text, decisive, noise_spans = noise.add(random_, *candidate)
        records.append(
            Record(
                task_id=name, prompt=task.prompt, solution=text, is_correct=number == 0,
                difficulty=len(task.lines), tests=task.tests, decisive=decisive, noise=noise_spans,
            )
        )  # fmt: skip
    return records


def split_of(signature: str) -> str:
    """Return the split of a task, which depends on its signature only."""
    bucket = zlib.crc32(signature.encode()) % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def generate(
    split: str,
    size: int,
    difficulties: dict[int, float],
    noise: float,
    seed: int,
    *,
    noise_kinds: Sequence[NoiseKind] = ("footer",),
    noise_lines: int = 4,
    wrong_variants: int = 1,
) -> list[Record]:
    """Return a correct solution and `wrong_variants` different incorrect ones to each of `size` tasks of a split.

    Training tasks can repeat with other wordings; validation and test tasks all differ. If a drawn task has too few
    incorrect solutions, another task is drawn instead. `Noise` describes the arguments for noise.

    Raises:
        InputError: there are not enough different tasks of these difficulties with so many incorrect solutions.
    """
    comments = Noise(noise, tuple(noise_kinds), noise_lines)
    random_ = random.Random(f"{seed}/{split}")
    levels, weights = list(difficulties), list(difficulties.values())
    seen: set[str] = set()
    records: list[Record] = []
    for number in range(size):
        difficulty = random_.choices(levels, weights)[0]
        for _ in range(1_000):
            task = draw_task(random_, difficulty)
            if task.signature in seen or split_of(task.signature) != split:
                continue
            tested = with_tests(random_, task)
            found = tested and solutions(random_, tested, f"tasks/{split}/{number}", comments, wrong_variants)
            if found:
                break
        else:
            raise InputError(
                f"data: only {number} of {size} {split} tasks can differ; ask for fewer (data.num_{split}) "
                f"or for fewer of difficulty {difficulty} (data.difficulties)"
                f"{', or for fewer incorrect solutions (data.wrong_variants)' if wrong_variants > 1 else ''}"
            )
        if split != "train":
            seen.add(task.signature)
        records += found
    return records
