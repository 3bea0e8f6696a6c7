"""The candidate's side: runs the untrusted program and answers questions about what it defines.

A script that imports the standard library only. Nothing here is a secret and nothing is trusted: whatever the program
does to this process, it can send no more than answers, which the judge reads as plain values.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

from wmtp.sandbox.wire import CannotSend, decode, dumps, encode, loads


class Candidate:
    """A loaded program, and the objects of it that the judge has handles for."""

    def __init__(self) -> None:
        self._namespace: dict[str, Any] = {}
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        """What a question yields: a value, an exception, or why there is neither."""
        number = question["id"]
        try:
            return {"id": number, **self._answer(question)}
        except CannotSend as error:
            return {"id": number, "unsendable": str(error)}
        except Exception as error:  # noqa: BLE001 - whatever the program raises
            known = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            return {"id": number, "error": known, "kind": type(error).__name__, "message": _text(error)}
        except BaseException as error:  # noqa: BLE001 - SystemExit and its like
            return {"id": number, "exit": f"{type(error).__name__}: {_text(error)}"}

    def _answer(self, question: dict[str, Any]) -> dict[str, Any]:
        operation = question["do"]
        if operation == "load":
            try:
                code = compile(question["source"], "<program>", "exec", dont_inherit=True)
            except (SyntaxError, ValueError) as error:
                return {"syntax": f"{type(error).__name__}: {_text(error)}"}
            exec(code, self._namespace)
            return {"value": None}
        if operation == "end":
            return {"value": None}
        if operation == "name":
            if question["name"] not in self._namespace:
                return {"missing": question["name"]}
            return {"value": encode(self._namespace[question["name"]], self._number)}
        operands = [decode(operand, self._objects.__getitem__) for operand in question["with"]]
        if operation == "next":
            try:
                return {"value": encode(next(operands[0]), self._number)}
            except StopIteration:
                return {"end": None}
        result = OPERATIONS[operation](*operands)
        return {"value": encode(result, self._number)}

    def _number(self, thing: Any) -> int:
        """The number of an object, which stays alive from now on."""
        if id(thing) not in self._numbers:
            self._numbers[id(thing)] = len(self._objects)
            self._objects.append(thing)
        return self._numbers[id(thing)]


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, positional, named: function(*positional, **named),
    "get": getattr,
    "set": setattr,
    "item": lambda thing, key: thing[key],
    "put": lambda thing, key, value: thing.__setitem__(key, value),
    "iterate": iter,
    "length": len,
}


def _text(error: BaseException) -> str:
    """What an exception says, as far as it says something."""
    try:
        return str.__str__(str(error))[:1000]
    except BaseException:  # noqa: BLE001 - its own method may raise anything
        return ""


def main() -> None:
    """Answer questions until there are no more. Standard input is empty for the program, its output is noise."""
    questions = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    candidate = Candidate()
    for line in questions:
        answer = candidate.answer(loads(line))
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):  # the program may have closed or replaced it
                stream.flush()
        answers.write(dumps(answer))
        answers.flush()


if __name__ == "__main__":
    main()
