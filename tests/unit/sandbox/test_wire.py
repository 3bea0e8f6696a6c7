"""Tests of encoding values between a program and its tests."""

import collections
import datetime
import enum
import fractions
import math
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wmtp.sandbox.wire import MAX_DEPTH, CannotSend, Malformed, decode, dumps, encode, loads

NUMBERS = (
    st.integers() | st.integers(-(10**400), 10**400) | st.floats(allow_nan=False) | st.complex_numbers(allow_nan=False)
)
SCALARS = NUMBERS | st.none() | st.booleans() | st.text() | st.binary() | st.sampled_from([..., int, list, ValueError])
TIMES = st.dates() | st.datetimes() | st.times() | st.timedeltas()
LIBRARY = TIMES | st.fractions() | st.decimals(allow_nan=False)
HASHABLE = st.recursive(
    SCALARS | LIBRARY, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=5
)
VALUES = st.recursive(
    HASHABLE | st.builds(range, st.integers(), st.integers(), st.integers(1)) | st.builds(bytearray, st.binary()),
    lambda inner: st.lists(inner, max_size=4) | st.sets(HASHABLE, max_size=4) | st.tuples(inner)
    | st.dictionaries(HASHABLE, inner, max_size=3) | st.builds(collections.deque, st.lists(inner, max_size=3)),
    max_leaves=10,
)  # fmt: skip


def refuse(value: Any) -> int:
    raise CannotSend(type(value).__name__)


def round_trip(value: Any) -> Any:
    return decode(loads(dumps(encode(value, refuse))), lambda number: number)


@given(VALUES)
@settings(deadline=None)
def test_values_are_decoded_unchanged(value: Any) -> None:
    arrived = round_trip(value)
    assert arrived == value
    assert type(arrived) is type(value)


def test_nan_and_negative_zero_are_kept() -> None:
    assert repr(round_trip([math.nan, complex(math.nan, -0.0), -0.0])) == "[nan, (nan-0j), -0.0]"


def test_values_of_subclasses_become_builtin_values() -> None:
    class Color(enum.IntEnum):
        RED = 1

    class Word(str):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = str.__hash__

    class Liar(list[int]):
        def __iter__(self) -> Any:
            return iter([9])

    Point = collections.namedtuple("Point", "x y")
    point = Point(1, 2)
    sent = [Color.RED, Word("a"), Liar([1]), point, collections.Counter("aab"), collections.OrderedDict(a=1)]
    assert repr(round_trip(sent)) == "[1, 'a', [1], (1, 2), {'a': 2, 'b': 1}, {'a': 1}]"


def test_dictionary_views_are_kept() -> None:
    assert repr(round_trip([{1: [2]}.keys(), {1: [2]}.values(), {1: [2]}.items()])) == (
        "[dict_keys([1]), dict_values([[2]]), dict_items([(1, [2])])]"
    )


def test_subclasses_of_library_types_become_handles() -> None:
    class Amount(Decimal):
        pass

    aware = datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC)
    for value in (Amount(1), aware, type("Fraction", (fractions.Fraction,), {})(1, 2)):
        assert decode(loads(dumps(encode(value, lambda _: 7))), lambda number: ("handle", number)) == ("handle", 7)


@pytest.mark.parametrize("leaf", [1, 1j, range(3)])
def test_decoded_values_can_be_encoded_again(leaf: Any) -> None:
    nested: Any = leaf
    for _ in range(MAX_DEPTH):
        nested = [nested]
    assert round_trip(round_trip(nested)) == nested
    with pytest.raises(Malformed):
        decode(loads(b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2)), lambda number: number)


def test_values_that_are_too_large_are_not_encoded() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(CannotSend, match=f"more than {MAX_DEPTH} deep"):
        encode(endless, refuse)
    with pytest.raises(CannotSend, match="items"):
        encode([0] * 10**6, refuse)
    with pytest.raises(CannotSend, match="object"):
        encode(object(), refuse)


@pytest.mark.parametrize(
    "line",
    [
        b"", b"no", b"NaN", b"[1", b'{"int":"x"}', b'{"int":1}', b'{"float":"1"}', b'{"tuple":3}', b'{"set":[[1]]}',
        b'{"dict":[1]}', b'{"type":"open"}', b'{"unknown":1}', b"{}", b'{"a":1,"b":2}', b"[" * 100_000,
        b"[" * 300 + b"]" * 300, b'{"range":[1,2,0]}', b"1" * 5000, b'{"dict":[[[],1]]}', b"\xff", b'{"bytes":"0"}',
        b'{"Decimal":["x"]}', b'{"Fraction":[1,0]}', b'{"date":[1,2]}', b'{"deque":[1]}', b'{"dict_keys":[[1]]}',
    ],
)  # fmt: skip
def test_malformed_messages_are_refused(line: bytes) -> None:
    with pytest.raises(Malformed):
        decode(loads(line), lambda number: number)
