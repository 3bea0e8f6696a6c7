"""Encoding of Python values as strict JSON between the assertion worker and the solution worker.

This module imports only the standard library. Lists, strings, small integers, finite floats, booleans and null are
encoded as themselves. Every other value is encoded as a JSON object with one key, which names the type of the value. An
instance of a subclass of a builtin type is encoded as the builtin value that it contains. Instances of some types of
the standard library are also encoded as values, but not instances of their subclasses. All other objects are encoded as
handles, which are numbers.
"""

import builtins
import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

MAX_DEPTH = 100
MAX_ITEMS = 200_000
SAFE_INTEGER = 2**53
"""Integers whose absolute value is at least this number are encoded as hexadecimal strings."""

Handles = Callable[[Any], int]
EMPTY: dict[Any, Any] = {}
VIEWS: tuple[type[Any], ...] = (type(EMPTY.keys()), type(EMPTY.values()), type(EMPTY.items()))
ITERATORS: dict[type[Any], Callable[[Any], Iterator[Any]]] = {
    kind: kind.__iter__ for kind in (list, tuple, set, frozenset)
} | dict.fromkeys(VIEWS, iter)
"""Functions that iterate over values of builtin types. A subclass cannot override them."""
LIBRARY: dict[str, tuple[str, Callable[[Any], tuple[Any, ...]]]] = {
    "Decimal": ("decimal", lambda value: (str(value),)),
    "Fraction": ("fractions", lambda value: (value.numerator, value.denominator)),
    "deque": ("collections", lambda value: (list(value), value.maxlen)),
    "date": ("datetime", lambda value: (value.year, value.month, value.day)),
    "datetime": ("datetime", lambda value: (*value.timetuple()[:6], value.microsecond, value.tzinfo)),
    "time": ("datetime", lambda value: (value.hour, value.minute, value.second, value.microsecond, value.tzinfo)),
    "timedelta": ("datetime", lambda value: (value.days, value.seconds, value.microseconds)),
}
"""Types of the standard library that are encoded as values. Each type has a pair: the name of its module, and a
function that returns the constructor arguments of an equal value."""
BUILTIN_TYPES: dict[Any, str] = {kind: name for name, kind in vars(builtins).items() if isinstance(kind, type)}


class CannotSend(Exception):
    """Exception that means that a value cannot be encoded."""


class Malformed(Exception):
    """Exception that means that a message or an encoded value is malformed."""


def _library_type(value: Any) -> str:
    """Return the name of a value's type if the type is in `LIBRARY`, and an empty string otherwise.

    This function imports no module.
    """
    name = type(value).__name__
    module = sys.modules.get(LIBRARY[name][0]) if name in LIBRARY else None
    return name if type(value) is getattr(module, name, None) else ""


class _Encoder:
    """An encoder of one value, which counts the items of the value."""

    def __init__(self, handles: Handles) -> None:
        self._handles = handles
        self._num_items = 0

    def encode(self, value: Any, depth: int) -> Any:
        """Return a value as plain JSON, as the function `encode` describes.

        Args:
            value: the value, or an item of the encoded value.
            depth: the nesting depth of the item; 0 for the value itself.
        """
        self._num_items += 1
        if depth > MAX_DEPTH:
            raise CannotSend(f"nested more than {MAX_DEPTH} deep")
        if self._num_items > MAX_ITEMS:
            raise CannotSend(f"more than {MAX_ITEMS} items")
        if value is None or value is True or value is False:
            return value
        if value is Ellipsis:
            return {"ellipsis": 0}
        if isinstance(value, (int, float, str, complex, bytes, bytearray)):
            return self._scalar(value)
        if isinstance(value, range):
            return {"range": [self._scalar(part) for part in (value.start, value.stop, value.step)]}
        for kind, iterate in ITERATORS.items():
            if isinstance(value, kind):
                items = [self.encode(item, depth + 1) for item in iterate(value)]
                return items if kind is list else {kind.__name__: items}
        if isinstance(value, dict):
            return {"dict": [self.encode(item, depth + 1) for item in dict.items(value)]}
        if isinstance(value, type) and value in BUILTIN_TYPES:
            return {"type": BUILTIN_TYPES[value]}
        if (name := _library_type(value)) and getattr(value, "tzinfo", None) is None:
            return {name: [self.encode(part, depth + 1) for part in LIBRARY[name][1](value)]}
        return {"handle": self._handles(value)}

    def _scalar(self, value: Any) -> Any:
        if isinstance(value, int):
            plain = int.__index__(value)
            return plain if -SAFE_INTEGER < plain < SAFE_INTEGER else {"int": hex(plain)}
        if isinstance(value, float):
            number = float.__float__(value)
            return number if math.isfinite(number) else {"float": repr(number)}
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, complex):
            return {"complex": [self._scalar(value.real), self._scalar(value.imag)]}
        return {"bytes" if isinstance(value, bytes) else "bytearray": bytes(value).hex()}


def encode(value: Any, handles: Handles) -> Any:
    """Return a value as plain JSON.

    Args:
        value: the value.
        handles: function that returns the handle number of an object that cannot be encoded as a value.

    Raises:
        CannotSend: the value is nested too deeply or has too many items, or `handles` raised this exception.
    """
    return _Encoder(handles).encode(value, 0)


def _integer(text: Any) -> int:
    return int(text, 16)


def _float(text: Any) -> float:
    if text not in ("inf", "-inf", "nan"):
        raise ValueError(text)
    return float(text)


SCALARS: dict[str, Callable[[Any], Any]] = {
    "int": _integer,
    "float": _float,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "type": {name: kind for kind, name in BUILTIN_TYPES.items()}.__getitem__,
    "ellipsis": lambda _: Ellipsis,
}
COLLECTIONS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "dict_keys": lambda items: dict.fromkeys(items).keys(),
    "dict_values": lambda items: dict(enumerate(items)).values(),
    "dict_items": lambda items: dict(items).items(),
}
PARTS: dict[str, Callable[..., Any]] = {"range": range, "complex": complex}
"""Types whose values consist of scalars. These scalars do not count as a level of nesting."""


def _decode(node: Any, objects: Callable[[int], Any], depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise Malformed("too deep")
    if isinstance(node, list):
        return [_decode(item, objects, depth + 1) for item in node]
    if not isinstance(node, dict):
        return node
    [(tag, content)] = node.items()
    if tag == "handle":
        return objects(content)
    if tag in SCALARS:
        return SCALARS[tag](content)
    if tag in PARTS:
        return PARTS[tag](*(_decode(part, objects, depth) for part in content))
    if tag in LIBRARY:
        kind = getattr(importlib.import_module(LIBRARY[tag][0]), tag)
        return kind(*[_decode(part, objects, depth + 1) for part in content])
    return COLLECTIONS[tag](_decode(item, objects, depth + 1) for item in content)


def decode(node: Any, objects: Callable[[int], Any]) -> Any:
    """Decode a value, and return it.

    The result contains only builtin types, types of `LIBRARY`, and objects that `objects` returned.

    Args:
        node: plain JSON, as returned by `encode`.
        objects: function that returns the object for a handle number.

    Raises:
        Malformed: `node` is JSON that `encode` cannot have returned.
    """
    try:
        return _decode(node, objects, 0)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise Malformed(f"{type(error).__name__}: {error}") from None


def dumps(message: Any) -> bytes:
    """Return a message as one line of JSON."""
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def loads(line: bytes) -> Any:
    """Decode a line of JSON, and return the message that it contains.

    Raises:
        Malformed: the line is not strict JSON, or it is nested too deeply.
    """
    try:
        return json.loads(line, parse_constant=_reject_constant)
    except (ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None


def _reject_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not valid JSON")
