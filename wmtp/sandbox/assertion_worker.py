"""The assertion worker, a script that runs the assertion tests of an untrusted program.

The program itself is executed by another process, the solution worker. When the tests use a function or a value of the
program, this script sends a request to the solution worker.

Besides `wire`, this script imports only the standard library. It first reads the job (the program and its tests) from
standard input, and later the answers to its requests. It writes the requests to standard output, and at the end the
verdict in a line that starts with "=".

Answers contain plain values (see `wire`), and arguments are sent as copies. Therefore a program cannot change the
values that the tests compare. An object that is not a plain value is represented by a `Handle`. Tests can call a
handle, access its attributes and items, and pass it as an argument. If they compare it with a value, no code of the
program is executed.
"""

import ast
import builtins
import importlib
import os
import sys
from types import CodeType, FunctionType
from typing import Any, BinaryIO, cast

from wmtp.sandbox.wire import CannotSend, Malformed, decode, dumps, encode, loads

MAX_SHOWN = 80
"""Maximum number of characters of a value or an exception in a verdict."""
HANDLE_COMPARED = "the tests compare an object of the program, which cannot be graded"


class SolutionError(Exception):
    """Replacement for an exception of the program that no builtin subclass of `Exception` can represent."""


class VerdictReached(BaseException):
    """Exception that stops the tests because the verdict is final.

    It is not a subclass of `Exception`, so that `except Exception` in a test cannot catch it.
    """


class Handle:
    """A proxy for an object that exists in the solution worker."""

    __slots__ = ("__client", "__number")

    def __init__(self, client: "SolutionClient", number: int) -> None:
        object.__setattr__(self, "_Handle__client", client)
        object.__setattr__(self, "_Handle__number", number)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Handle):
            self.__client.handle_compared = True
        return NotImplemented

    __hash__ = object.__hash__

    def __call__(self, *positional: Any, **named: Any) -> Any:
        """Call the object in the solution worker, and return the result."""
        return self.__client.request("call", self, list(positional), named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.__client.request("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__client.request("set", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self.__client.request("item", self, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.__client.request("put", self, key, value)

    def __iter__(self) -> Any:
        return self.__client.request("iterate", self)

    def __next__(self) -> Any:
        return self.__client.request("next", self)

    def __len__(self) -> int:
        length = self.__client.request("length", self)
        if type(length) is not int:
            raise TypeError("the program returns a length that is not an integer")
        return length

    def __repr__(self) -> str:
        return "<an object of the program>"


class SolutionClient:
    """A client that sends requests to the solution worker and reads the answers."""

    def __init__(self, requests: BinaryIO, answers: BinaryIO) -> None:
        self._requests = requests
        self._answers = answers
        self._handles: dict[int, Handle] = {}
        self._numbers: dict[Handle, int] = {}
        self._num_requests = 0
        self.verdict: tuple[str, str, str] | None = None
        """Outcome, reason and detail, once they are final."""
        self.was_used = False
        """True if a request was sent since the program was loaded."""
        self.was_answered = False
        """True if the tests may have received a value from the program."""
        self.handle_compared = False
        """True if the current test compared a handle with another value."""
        self.last = ""
        """The last answer, as text for the verdict."""

    def load(self, source: str) -> None:
        """Send the program to the solution worker, which executes it."""
        self._send({"do": "load", "source": source})
        self.was_used = False

    def finish(self) -> None:
        """Check that the solution worker still answers, and that it has not sent more answers than it got requests."""
        self._send({"do": "end"})

    def request(self, operation: str, *operands: Any) -> Any:
        """Request an operation from the solution worker, and return the resulting value.

        Raises:
            Exception: the operation raised an exception in the solution worker.
            VerdictReached: the verdict is final, for example because the answer is malformed.
        """
        encoded = [self._encode(operand) for operand in operands]
        self.was_answered = True
        return self._value(self._send({"do": operation, "with": encoded}))

    def global_variable(self, name: str) -> Any:
        """Return the value of a global variable of the program.

        Raises:
            KeyError: the program does not define the variable.
        """
        answer = self._send({"do": "name", "name": name})
        if "missing" in answer:
            raise KeyError(name)
        value = self._value(answer)
        self.was_answered |= not isinstance(value, Handle)
        return value

    def set_verdict(self, outcome: str, reason: str, detail: str) -> None:
        """Set the verdict unless it is already final, and stop the tests.

        Raises:
            VerdictReached: always, because this exception stops the tests.
        """
        self.verdict = self.verdict or (outcome, reason, detail)
        raise VerdictReached

    def _send(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.verdict:
            raise VerdictReached
        self._num_requests += 1
        self._requests.write(dumps({"id": self._num_requests, **request}))
        self._requests.flush()
        line = self._answers.readline()
        self.was_used = True
        try:
            answer = loads(line)
        except Malformed as error:
            self.set_verdict("fail", "protocol", f"a malformed answer: {error}")
        if not isinstance(answer, dict) or answer.get("id") != self._num_requests:
            self.set_verdict("fail", "protocol", "an answer to another request")
        for reason in ("syntax", "exit", "unsendable"):
            if reason in answer:
                self.set_verdict("fail", "output" if reason == "unsendable" else reason, str(answer[reason]))
        if "error" in answer:
            raise self._exception(answer)
        if "end" in answer and request["do"] == "next":
            raise StopIteration
        return cast(dict[str, Any], answer)

    def _value(self, answer: dict[str, Any]) -> Any:
        if "value" not in answer:
            self.set_verdict("fail", "protocol", "an answer without a value")
        value = self._decode(answer["value"])
        self.last = _shorten(value)
        return value

    def _encode(self, value: Any) -> Any:
        try:
            return encode(value, self._number)
        except CannotSend as error:
            detail = f"the tests pass a value that cannot be sent: {error}"
            if self.was_answered:  # then the value may come from an answer of the program
                self.set_verdict("fail", "output", detail)
            self.set_verdict("sandbox error", "tests", detail)

    def _decode(self, node: Any) -> Any:
        try:
            return decode(node, self._handle)
        except Malformed as error:
            self.set_verdict("fail", "protocol", f"a malformed answer: {error}")

    def _exception(self, answer: dict[str, Any]) -> Exception:
        """Return the exception that an answer describes.

        The exception gets the most specific builtin type that the program's exception has. If no builtin type is
        suitable, the exception is a `SolutionError`.
        """
        message = str(answer.get("message"))
        self.last = f"{answer.get('kind')}: {message}"[:MAX_SHOWN]
        known = answer["error"]
        for name in known if isinstance(known, list) else []:
            kind = getattr(builtins, name, None) if isinstance(name, str) else None
            if not isinstance(kind, type) or issubclass(kind, (StopIteration, StopAsyncIteration)):
                continue  # would end loops of the tests
            if issubclass(kind, Exception) and kind is not Exception:
                try:
                    return kind(message)
                except TypeError:  # the constructor needs more than a message
                    continue
        return SolutionError(self.last)

    def _number(self, value: Any) -> int:
        if isinstance(value, Handle) and value in self._numbers:
            return self._numbers[value]
        if isinstance(value, FunctionType):  # answers contain no functions, so the tests defined it
            self.set_verdict("sandbox error", "tests", "the tests pass a function")
        raise CannotSend(f"a {type(value).__name__}")

    def _handle(self, number: Any) -> Handle:
        if type(number) is not int or number < 0:
            raise TypeError(f"handle {number!r}")
        if number not in self._handles:
            handle = self._handles[number] = Handle(self, number)
            self._numbers[handle] = number
        return self._handles[number]


class Namespace(dict[str, Any]):
    """The global variables of the tests.

    If neither the tests nor Python define a name, its value is requested from the program.
    """

    def __init__(self, client: SolutionClient, setup: str, tests: list[str]) -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self._client = client
        self._shadowed = _shadowed_builtins(tests)
        self._modules = _used_modules([setup, *tests])

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or (hasattr(builtins, name) and name not in self._shadowed):
            raise KeyError(name)
        found = self._client.global_variable(name)
        return importlib.import_module(name) if name in self._modules else found


def _shorten(value: Any) -> str:
    """Return the repr of a value, shortened to `MAX_SHOWN` characters."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def _parse_preamble(preamble: str) -> ast.Module:
    """Parse a preamble, but remove the function or class at its end, because the solution completes it."""
    try:
        tree = ast.parse(preamble)
    except SyntaxError:
        tree = ast.parse(preamble.rstrip() + "\n    pass")
    if tree.body and isinstance(tree.body[-1], (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        del tree.body[-1]
    return tree


def _shadowed_builtins(tests: list[str]) -> frozenset[str]:
    """Return the builtin names that the program presumably redefines.

    If the tests use only builtin names, the result contains the names that occur in every test. Otherwise, it is empty.
    """
    mentioned = [{node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)} for test in tests]
    if any(not hasattr(builtins, name) for name in set().union(*mentioned)):
        return frozenset()
    return frozenset.intersection(*map(frozenset, mentioned))


def _used_modules(tests: list[str]) -> frozenset[str]:
    """Return the names of the standard library modules that the tests use.

    The tests get these modules from the standard library, even if the program assigns other objects to their names.
    """
    return (
        frozenset(
            node.value.id
            for test in tests
            for node in ast.walk(ast.parse(test))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        )
        & sys.stdlib_module_names
    )


class AssertionRunner:
    """Runner of the tests of one program."""

    def __init__(self, job: dict[str, Any], client: SolutionClient) -> None:
        self._job = job
        self._client = client
        self._sources = [job["setup"], *job["tests"]]
        self._tests: list[CodeType] = []

    def verdict(self) -> tuple[str, str, str]:
        """Run the setup and the tests, and return the outcome, the reason and the detail of the verdict."""
        try:
            self._prepare()
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return "sandbox error", "tests", f"the tests cannot be compiled: {type(error).__name__}: {error}"
        except BaseException as error:  # noqa: BLE001 - trusted code may fail in any way
            return "sandbox error", "tests", f"the preamble fails: {type(error).__name__}: {error}"
        index = -1
        try:
            self._client.load(self._job["source"])
            for index, code in enumerate(self._tests):  # noqa: B007
                self._client.handle_compared = False
                exec(code, self._namespace)
            self._client.finish()
        except BaseException as error:  # noqa: BLE001 - tests may raise anything
            return self._failure(error, index)
        return self._client.verdict or ("pass", "", "")

    def _prepare(self) -> None:
        self._tests = [compile(source, "<tests>", "exec") for source in self._sources]
        self._namespace = Namespace(self._client, self._job["setup"], self._job["tests"])
        exec(compile(_parse_preamble(self._job["preamble"]), "<preamble>", "exec"), self._namespace)

    def _failure(self, error: BaseException, index: int) -> tuple[str, str, str]:
        """Return the verdict for an exception.

        Args:
            error: the exception.
            index: the number of the test that raised the exception, 0 if the setup raised it, or −1 if it was raised
                while the program was loaded.
        """
        place = "loading" if index < 0 else f"test {index}" if index else "setup"
        if self._client.verdict:
            outcome, reason, detail = self._client.verdict
            return outcome, reason, f"{place}: {detail}"
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        where = f"{place}: {_failing_line(error, self._sources[index]) if index >= 0 else ''}".rstrip(": ")
        if index >= 0 and not self._client.was_used and not isinstance(error, NameError):
            return "sandbox error", "tests", f"{where}: {message}, before the tests used the program"
        if isinstance(error, AssertionError):
            cause = HANDLE_COMPARED if self._client.handle_compared else f"the last answer was {self._client.last}"
            return "fail", "wrong", f"{where}; {cause}"
        if isinstance(error, TypeError) and "'Handle'" in message:
            return "fail", "exception", f"{where}; {HANDLE_COMPARED}: {message}"
        if isinstance(error, Exception):
            return "fail", "memory" if isinstance(error, MemoryError) else "exception", f"{where}: {message}"
        return "sandbox error", "tests", f"{where}: the tests end their own process: {message}"


def _failing_line(error: BaseException, source: str) -> str:
    """Return the line of the test `source` at which an exception was raised, or an empty string if there is none."""
    found, trace = "", error.__traceback__
    lines = source.splitlines()
    while trace:
        if trace.tb_frame.f_code.co_filename == "<tests>" and trace.tb_lineno <= len(lines):
            found = lines[trace.tb_lineno - 1].strip()
        trace = trace.tb_next
    return found


def main() -> None:
    """Read the job, run its tests and write the verdict. Discard everything that the tests print."""
    answers = os.fdopen(os.dup(0), "rb")
    requests = os.fdopen(os.dup(1), "wb")
    empty = os.open(os.devnull, os.O_RDWR)
    os.dup2(empty, 0)
    os.dup2(empty, 1)
    verdict = AssertionRunner(loads(answers.readline()), SolutionClient(requests, answers)).verdict()
    requests.write(b"=" + dumps(verdict))
    requests.flush()


if __name__ == "__main__":
    main()
