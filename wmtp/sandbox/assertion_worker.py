"""The judge's side: runs the tests, and asks the candidate's process for whatever the program defines.

A script that imports the standard library only. It reads its task from standard input, then answers to its questions;
it writes questions, and at last the verdict, which begins with "=".

Only exact builtin values come back, and arguments go as copies: a program cannot change what the tests compare with.
What is no such value is a `Handle`: tests can pass it on, call it and take it apart, but whether it equals something
is never asked of the program that made it.
"""

import ast
import builtins
import importlib
import os
import sys
from types import CodeType, FunctionType
from typing import Any, BinaryIO, cast

from wmtp.sandbox.wire import CannotSend, Malformed, decode, dumps, encode, loads

SHOWN = 80
COMPARED = "the tests compare an object of the program, which cannot be judged here"


class CandidateError(Exception):
    """An exception of the program that is none of the builtin ones."""


class Ended(BaseException):
    """The program can answer no more, or the tests cannot go on; no `except Exception` may hide it."""


class Handle:
    """An object in the candidate's process."""

    __slots__ = ("__number", "__wire")

    def __init__(self, wire: "Wire", number: int) -> None:
        object.__setattr__(self, "_Handle__wire", wire)
        object.__setattr__(self, "_Handle__number", number)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Handle):
            self.__wire.compared = True
        return NotImplemented

    __hash__ = object.__hash__

    def __call__(self, *positional: Any, **named: Any) -> Any:
        """Call it there."""
        return self.__wire.ask("call", self, list(positional), named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__wire.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__wire.ask("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self.__wire.ask("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__wire.ask("put", self, key, value)

    def __iter__(self) -> Any:
        return self.__wire.ask("iterate", self)

    def __next__(self) -> Any:
        return self.__wire.ask("next", self)

    def __len__(self) -> int:
        length = self.__wire.ask("length", self)
        if type(length) is not int:
            raise TypeError("the program gives a length that is no integer")
        return length

    def __repr__(self) -> str:
        return "<an object of the program>"


class Wire:
    """Questions to the candidate's process and the answers to them."""

    def __init__(self, questions: BinaryIO, answers: BinaryIO) -> None:
        self._questions = questions
        self._answers = answers
        self._handles: dict[int, Handle] = {}
        self._numbers: dict[Handle, int] = {}
        self._num_asked = 0
        self.ended: tuple[str, str, str] | None = None
        self.was_used = False
        self.was_answered = False
        self.compared = False
        self.last = ""

    def load(self, source: str) -> None:
        """Let the program be executed."""
        self._ask({"do": "load", "source": source})
        self.was_used = False

    def finish(self) -> None:
        """Make sure that no answers are left over, and that the program still gives some."""
        self._ask({"do": "end"})

    def ask(self, operation: str, *operands: Any) -> Any:
        """The value that an operation gives; raises what it raised."""
        sent = [self._encode(operand) for operand in operands]
        self.was_answered = True
        return self._value(self._ask({"do": operation, "with": sent}))

    def name(self, name: str) -> Any:
        """The program's global variable; raises KeyError where it has none of that name."""
        answer = self._ask({"do": "name", "name": name})
        if "missing" in answer:
            raise KeyError(name)
        value = self._value(answer)
        self.was_answered |= not isinstance(value, Handle)
        return value

    def end(self, outcome: str, reason: str, detail: str) -> None:
        """Settle the verdict, for good."""
        self.ended = self.ended or (outcome, reason, detail)
        raise Ended

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        if self.ended:
            raise Ended
        self._num_asked += 1
        self._questions.write(dumps({"id": self._num_asked, **question}))
        self._questions.flush()
        line = self._answers.readline()
        self.was_used = True
        try:
            answer = loads(line)
        except Malformed as error:
            self.end("fail", "protocol", f"an answer that is none: {error}")
        if not isinstance(answer, dict) or answer.get("id") != self._num_asked:
            self.end("fail", "protocol", "an answer to no question")
        for reason in ("syntax", "exit", "unsendable"):
            if reason in answer:
                self.end("fail", "output" if reason == "unsendable" else reason, str(answer[reason]))
        if "error" in answer:
            raise self._exception(answer)
        if "end" in answer and question["do"] == "next":
            raise StopIteration
        return cast(dict[str, Any], answer)

    def _value(self, answer: dict[str, Any]) -> Any:
        if "value" not in answer:
            self.end("fail", "protocol", "an answer without a value")
        value = self._decode(answer["value"])
        self.last = _shown(value)
        return value

    def _encode(self, value: Any) -> Any:
        try:
            return encode(value, self._number)
        except CannotSend as error:
            said = f"the tests hand over what cannot be sent: {error}"
            if self.was_answered:  # by what the program answered, as far as anyone can tell
                self.end("fail", "output", said)
            self.end("sandbox error", "tests", said)

    def _decode(self, node: Any) -> Any:
        try:
            return decode(node, self._handle)
        except Malformed as error:
            self.end("fail", "protocol", f"an answer that is none: {error}")

    def _exception(self, answer: dict[str, Any]) -> Exception:
        """The builtin exception nearest to the program's, else a general one."""
        message = str(answer.get("message"))
        self.last = f"{answer.get('kind')}: {message}"[:SHOWN]
        known = answer["error"]
        for name in known if isinstance(known, list) else []:
            kind = getattr(builtins, name, None) if isinstance(name, str) else None
            if not isinstance(kind, type) or issubclass(kind, (StopIteration, StopAsyncIteration)):
                continue  # these would end loops of the tests
            if issubclass(kind, Exception) and kind is not Exception:
                try:
                    return kind(message)
                except TypeError:  # one that takes more than a message
                    continue
        return CandidateError(self.last)

    def _number(self, value: Any) -> int:
        if isinstance(value, Handle) and value in self._numbers:
            return self._numbers[value]
        if isinstance(value, FunctionType):  # no answer becomes one: it is the tests' own
            self.end("sandbox error", "tests", "the tests hand over a function")
        raise CannotSend(f"a {type(value).__name__}")

    def _handle(self, number: Any) -> Handle:
        if type(number) is not int or number < 0:
            raise TypeError(f"handle {number!r}")
        if number not in self._handles:
            handle = self._handles[number] = Handle(self, number)
            self._numbers[handle] = number
        return self._handles[number]


class Namespace(dict[str, Any]):
    """The tests' global variables. What neither they nor Python define is asked of the program."""

    def __init__(self, wire: Wire, setup: str, tests: list[str]) -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self._wire = wire
        self._shadowed = _shadowed(tests)
        self._modules = _modules([setup, *tests])

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or (hasattr(builtins, name) and name not in self._shadowed):
            raise KeyError(name)
        found = self._wire.name(name)
        return importlib.import_module(name) if name in self._modules else found


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        text = "a large integer"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def _parse_preamble(preamble: str) -> ast.Module:
    """The definitions that a preamble completes: all but a last function or class, which the solution continues."""
    try:
        tree = ast.parse(preamble)
    except SyntaxError:
        tree = ast.parse(preamble.rstrip() + "\n    pass")
    if tree.body and isinstance(tree.body[-1], (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        del tree.body[-1]
    return tree


def _shadowed(tests: list[str]) -> frozenset[str]:
    """Names of builtin functions that must mean the program's, as the tests use no other name that it could define."""
    mentioned = [{node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)} for test in tests]
    if any(not hasattr(builtins, name) for name in set().union(*mentioned)):
        return frozenset()
    return frozenset.intersection(*map(frozenset, mentioned))


def _modules(tests: list[str]) -> frozenset[str]:
    """Modules of the standard library that the tests use: the judge's own, even where the program imports them."""
    return (
        frozenset(
            node.value.id
            for test in tests
            for node in ast.walk(ast.parse(test))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        )
        & sys.stdlib_module_names
    )


class Referee:
    """Runs the tests of one task."""

    def __init__(self, task: dict[str, Any], wire: Wire) -> None:
        self._task = task
        self._wire = wire
        self._sources = [task["setup"], *task["tests"]]
        self._tests: list[CodeType] = []

    def verdict(self) -> tuple[str, str, str]:
        """Outcome, reason and detail."""
        try:
            self._prepare()
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return "sandbox error", "tests", f"the tests cannot be compiled: {type(error).__name__}: {error}"
        except BaseException as error:  # noqa: BLE001 - trusted code may fail in any way
            return "sandbox error", "tests", f"the preamble fails: {type(error).__name__}: {error}"
        place = -1
        try:
            self._wire.load(self._task["source"])
            for place, code in enumerate(self._tests):  # noqa: B007
                self._wire.compared = False
                exec(code, self._namespace)
            self._wire.finish()
        except BaseException as error:  # noqa: BLE001 - whatever the tests raise
            return self._failure(error, place)
        return self._wire.ended or ("pass", "", "")

    def _prepare(self) -> None:
        self._tests = [compile(source, "<tests>", "exec") for source in self._sources]
        self._namespace = Namespace(self._wire, self._task["setup"], self._task["tests"])
        exec(compile(_parse_preamble(self._task["preamble"]), "<preamble>", "exec"), self._namespace)

    def _failure(self, error: BaseException, index: int) -> tuple[str, str, str]:
        """The verdict that an exception leads to, which came up in this part of the tests, or before them."""
        place = "loading" if index < 0 else f"test {index}" if index else "setup"
        if self._wire.ended:
            outcome, reason, detail = self._wire.ended
            return outcome, reason, f"{place}: {detail}"
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        where = f"{place}: {_line(error, self._sources[index]) if index >= 0 else ''}".rstrip(": ")
        if index >= 0 and not self._wire.was_used and not isinstance(error, NameError):
            return "sandbox error", "tests", f"{where}: {said}, before anything was asked of the program"
        if isinstance(error, AssertionError):
            known = COMPARED if self._wire.compared else f"the last answer was {self._wire.last}"
            return "fail", "wrong", f"{where}; {known}"
        if isinstance(error, TypeError) and "'Handle'" in said:
            return "fail", "exception", f"{where}; {COMPARED}: {said}"
        if isinstance(error, Exception):
            return "fail", "memory" if isinstance(error, MemoryError) else "exception", f"{where}: {said}"
        return "sandbox error", "tests", f"{where}: the tests end themselves: {said}"


def _line(error: BaseException, source: str) -> str:
    """The line of the tests at which an exception came up."""
    found, trace = "", error.__traceback__
    lines = source.splitlines()
    while trace:
        if trace.tb_frame.f_code.co_filename == "<tests>" and trace.tb_lineno <= len(lines):
            found = lines[trace.tb_lineno - 1].strip()
        trace = trace.tb_next
    return found


def main() -> None:
    """Read the task, run its tests, write the verdict. What tests print is of no use."""
    answers = os.fdopen(os.dup(0), "rb")
    questions = os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDWR)
    os.dup2(empty, 0)
    os.dup2(empty, 1)
    verdict = Referee(loads(answers.readline()), Wire(questions, answers)).verdict()
    questions.write(b"=" + dumps(verdict))
    questions.flush()


if __name__ == "__main__":
    main()
