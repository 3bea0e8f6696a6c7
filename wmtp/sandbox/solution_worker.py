"""The solution worker, a script that loads the untrusted program and executes the requests of the assertion worker.

Besides `wire`, this script imports only the standard library. Its process contains no secrets and is not trusted. Even
if the program takes control of the process, it can only send answers, which the assertion worker decodes as plain
values.
"""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

from wmtp.sandbox.wire import CannotSend, decode, dumps, encode, loads


class Solution:
    """A loaded program, and the objects of the program to which the assertion worker has handles."""

    def __init__(self) -> None:
        self._namespace: dict[str, Any] = {}
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Execute a request and return the answer.

        The answer contains a value, or an exception, or the reason why there is no value.
        """
        number = request["id"]
        try:
            return {"id": number, **self._answer(request)}
        except CannotSend as error:
            return {"id": number, "unsendable": str(error)}
        except Exception as error:  # noqa: BLE001 - whatever the program raises
            known = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            return {"id": number, "error": known, "kind": type(error).__name__, "message": _text(error)}
        except BaseException as error:  # noqa: BLE001 - such as SystemExit
            return {"id": number, "exit": f"{type(error).__name__}: {_text(error)}"}

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        operation = request["do"]
        if operation == "load":
            try:
                code = compile(request["source"], "<program>", "exec", dont_inherit=True)
            except (SyntaxError, ValueError) as error:
                return {"syntax": f"{type(error).__name__}: {_text(error)}"}
            exec(code, self._namespace)
            return {"value": None}
        if operation == "end":
            return {"value": None}
        if operation == "name":
            if request["name"] not in self._namespace:
                return {"missing": request["name"]}
            return {"value": encode(self._namespace[request["name"]], self._number)}
        operands = [decode(operand, self._objects.__getitem__) for operand in request["with"]]
        if operation == "next":
            try:
                return {"value": encode(next(operands[0]), self._number)}
            except StopIteration:
                return {"end": None}
        result = OPERATIONS[operation](*operands)
        return {"value": encode(result, self._number)}

    def _number(self, value: Any) -> int:
        """Return the handle number of an object, and keep the object alive."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._objects)
            self._objects.append(value)
        return self._numbers[id(value)]


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, positional, named: function(*positional, **named),
    "get": getattr,
    "set": setattr,
    "item": lambda container, key: container[key],
    "put": lambda container, key, value: container.__setitem__(key, value),
    "iterate": iter,
    "length": len,
}


def _text(error: BaseException) -> str:
    """Return the message of an exception, or an empty string if it has none."""
    try:
        return str.__str__(str(error))[:1000]
    except BaseException:  # noqa: BLE001 - the program's __str__ may raise anything
        return ""


def main() -> None:
    """Answer requests until standard input ends.

    The standard input of the program is empty, and its standard output is redirected to standard error.
    """
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.dup2(2, 1)
    solution = Solution()
    for line in requests:
        answer = solution.answer(loads(line))
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):  # the program may have closed or replaced the stream
                stream.flush()
        answers.write(dumps(answer))
        answers.flush()


if __name__ == "__main__":
    main()
