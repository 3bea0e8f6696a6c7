"""Embedded programming tasks: generated, executed, split; no files and no network.

A task is a chain of one to four steps (its difficulty). Its prompt words the chain, its solution
writes each step as one line. A wrong solution changes one decisive token or one step of a right one.
Every right solution is executed and passes all its tests; every wrong one is executed and fails one.
"""

import ast
import random
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

from wmtp.data.records import Record
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
"""The name of the file that a program's code says it comes from."""
WORDS = ("sun", "letters", "Rain", "note", "trees", "A", "lists", "union", "stars", "Olive", "in", "rust")
MARKED = re.compile("«(.*?)»")


@dataclass(frozen=True)
class Line:
    """One step with its constant filled in. `code` still holds «marks», `{v}` and `{e}`."""

    step: Step
    constant: str
    code: str


@dataclass(frozen=True)
class Task:
    """A chain of lines, the names its program uses, and its tests as literal assertions."""

    lines: tuple[Line, ...]
    function: str
    variable: str
    element: str
    prompt: str
    tests: tuple[str, ...] = ()

    @property
    def signature(self) -> str:
        """What the task asks, whatever its wording and names: equal signatures are the same task."""
        return " ; ".join(line.code for line in self.lines)


class StepLimitError(Exception):
    """A generated program ran more lines than `STEP_LIMIT`."""


def execute(program: str, calls: list[str], step_limit: int = STEP_LIMIT) -> list[str]:
    """The literal results of `calls` after `program`, one each; an exception is its class name.

    Only for programs that this module writes: nothing isolates them but the line limit.
    """
    steps = 0

    def count(frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        nonlocal steps
        if frame.f_code.co_filename != PROGRAM:  # what the collection of garbage happens to call in between
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
            except Exception as error:  # noqa: BLE001 - whatever a wrong program raises is its result
                results.append(type(error).__name__)
    finally:
        sys.settrace(previous)
    return results


@lru_cache(maxsize=NUM_TESTS)
def _expression(call: str) -> CodeType:
    """The code of a call; the same calls come again with a task's next program."""
    return compile(call, PROGRAM, "eval")


def render(task: Task, lines: tuple[Line, ...]) -> tuple[str, list[list[tuple[int, int]]]]:
    """The program of `lines` under the task's names, and each line's decisive character spans."""
    text = f"def {task.function}({task.variable}):\n"
    spans: list[list[tuple[int, int]]] = []
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
    """Whether a program written here passes its literal tests."""
    calls, expected = zip(*(test.removeprefix("assert ").split(" == ") for test in tests), strict=True)
    return execute(program, list(calls)) == list(expected)


def draw_task(random_: random.Random, difficulty: int) -> Task:
    """One task of `difficulty` steps, without tests."""
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
    """Literal arguments for the task's tests, near its constants so that comparisons are decided."""
    constants = [int(line.constant) for line in task.lines if line.constant.isdigit()] or [5]

    def integer() -> int:
        near = random_.choice(constants) + random_.randint(-2, 2)
        return near if random_.random() < 0.4 else random_.randint(-20, 40)

    def argument() -> object:
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
    """The task with tests executed from its own solution; None if they could not tell anything."""
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
    """The line with one decisive token exchanged, and the number of its mark.

    The mark is None where the whole step was exchanged for another between the same kinds; the result
    is None where there is no such other step.
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


def wrong_solution(random_: random.Random, task: Task) -> tuple[str, tuple[tuple[int, int], ...]] | None:
    """A program that differs from the task's in one decisive place and fails a test, and that place.

    None where twenty candidates all passed.
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


def difference(program: str, other: str) -> tuple[int, int]:
    """The characters [start, end) of a program outside what it has in common with another at both ends."""
    start = common_length(program, other)
    end = len(program) - common_length(program[start:][::-1], other[start:][::-1])
    return start, max(end, start + 1)  # where something was left out, what stands there instead


def common_length(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def footer(random_: random.Random) -> str:
    """An unpredictable comment, as scraped code carries."""
    match random_.randrange(3):
        case 0:
            return f"# id: {random_.randrange(10**8):08d}"
        case 1:
            year, month, day = random_.randint(2001, 2025), random_.randint(1, 12), random_.randint(1, 28)
            return f"# date: {year}-{month:02d}-{day:02d}"
        case _:
            return f"# hash: {random_.randrange(16**8):08x}"


def solutions(random_: random.Random, task: Task, name: str, noise: float) -> list[Record] | None:
    """The right and a wrong solution of a task; None where no wrong one was found."""
    wrong = wrong_solution(random_, task)
    if wrong is None:
        return None
    program, spans = render(task, task.lines)
    assert passes(program, task.tests)
    candidates = ((program, tuple(span for line in spans for span in line), True), (*wrong, False))
    records = []
    for text, decisive, is_correct in candidates:
        noise_spans: tuple[tuple[int, int], ...] = ()
        if random_.random() < noise:
            comment = footer(random_)
            unpredictable = comment.index(": ") + 2
            noise_spans = ((len(text) + unpredictable, len(text) + len(comment)),)
            text += comment + "\n"
        records.append(
            Record(
                task_id=name, prompt=task.prompt, solution=text, is_correct=is_correct,
                difficulty=len(task.lines), tests=task.tests, decisive=decisive, noise=noise_spans,
            )
        )  # fmt: skip
    return records


def split_of(signature: str) -> str:
    """The split a task belongs to, decided by what it asks alone."""
    bucket = zlib.crc32(signature.encode()) % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def generate(split: str, size: int, difficulties: dict[int, float], noise: float, seed: int) -> list[Record]:
    """A right and a wrong solution to each of `size` tasks of a split.

    Training tasks may ask the same again in other words; held-out tasks all differ.

    Raises:
        InputError: where the chosen difficulties do not have that many different tasks.
    """
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
            pair = tested and solutions(random_, tested, f"tasks/{split}/{number}", noise)
            if pair:
                break
        else:
            raise InputError(
                f"data: only {number} of {size} {split} tasks can differ; ask for fewer (data.num_{split}) "
                f"or for fewer of difficulty {difficulty} (data.difficulties)"
            )
        if split != "train":
            seen.add(task.signature)
        records += pair
    return records
