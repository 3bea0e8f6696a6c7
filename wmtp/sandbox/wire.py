"""Values as strict JSON, for judge and candidate: exact values, or handles. Imports the standard library only.

A JSON object is always a tag with its content; lists, strings, small integers, finite numbers, booleans and null
stand for themselves. Instances of subclasses of builtin types are sent as the builtin value that they hold. Some
types of the standard library are values too, but not their subclasses.
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

Handles = Callable[[Any], int]
EMPTY: dict[Any, Any] = {}
VIEWS: tuple[type[Any], ...] = (type(EMPTY.keys()), type(EMPTY.values()), type(EMPTY.items()))
ITERATORS: dict[type[Any], Callable[[Any], Iterator[Any]]] = {
    kind: kind.__iter__ for kind in (list, tuple, set, frozenset)
} | dict.fromkeys(VIEWS, iter)
"""Those of the builtin types, which a subclass cannot replace."""
LIBRARY: dict[str, tuple[str, Callable[[Any], tuple[Any, ...]]]] = {
    "Decimal": ("decimal", lambda value: (str(value),)),
    "Fraction": ("fractions", lambda value: (value.numerator, value.denominator)),
    "deque": ("collections", lambda value: (list(value), value.maxlen)),
    "date": ("datetime", lambda value: (value.year, value.month, value.day)),
    "datetime": ("datetime", lambda value: (*value.timetuple()[:6], value.microsecond, value.tzinfo)),
    "time": ("datetime", lambda value: (value.hour, value.minute, value.second, value.microsecond, value.tzinfo)),
    "timedelta": ("datetime", lambda value: (value.days, value.seconds, value.microseconds)),
}
"""Types of the standard library: their module, and what makes an equal value, all of other types here."""
BUILTIN_TYPES: dict[Any, str] = {thing: name for name, thing in vars(builtins).items() if isinstance(thing, type)}


class CannotSend(Exception):
    """A value that has no form here."""


class Malformed(Exception):
    """Not what `dumps` writes."""


def _library_type(value: Any) -> str:
    """The name of a value's type if it is one of `LIBRARY`. None is imported for that."""
    name = type(value).__name__
    module = sys.modules.get(LIBRARY[name][0]) if name in LIBRARY else None
    return name if type(value) is getattr(module, name, None) else ""


class _Encoder:
    def __init__(self, handles: Handles) -> None:
        self._handles = handles
        self._num_items = 0

    def encode(self, value: Any, depth: int) -> Any:
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
            exact = int.__index__(value)
            return exact if -SAFE_INTEGER < exact < SAFE_INTEGER else {"int": hex(exact)}
        if isinstance(value, float):
            number = float.__float__(value)
            return number if math.isfinite(number) else {"float": repr(number)}
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, complex):
            return {"complex": [self._scalar(value.real), self._scalar(value.imag)]}
        return {"bytes" if isinstance(value, bytes) else "bytearray": bytes(value).hex()}


def encode(value: Any, handles: Handles) -> Any:
    """A value as plain JSON. `handles` gives a number to what is no value of a builtin type.

    Raises:
        CannotSend: too deep or too large, or what `handles` raises.
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
    "type": {name: thing for thing, name in BUILTIN_TYPES.items()}.__getitem__,
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
"""Those made of scalars, which are no deeper than themselves."""


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
    """The value that plain JSON stands for, all of exact builtin types. `objects` gives what a number stands for.

    Raises:
        Malformed: nothing that `encode` gives.
    """
    try:
        return _decode(node, objects, 0)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise Malformed(f"{type(error).__name__}: {error}") from None


def dumps(message: Any) -> bytes:
    """A message as one line."""
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def loads(line: bytes) -> Any:
    """The message in one line.

    Raises:
        Malformed: not strict JSON, or nested too deeply.
    """
    try:
        return json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
