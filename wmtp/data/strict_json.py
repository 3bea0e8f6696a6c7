"""Strict parsing of JSON files. A value that cannot be decoded is replaced by a `Rejected`.

Therefore a faulty number rejects only its own row, even if the file is a single JSON array.
"""

import gzip
import json
import math
import re
import zlib
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from wmtp.errors import InputError

# Fixed limits, because the limits of Python depend on its version, its settings and the depth of the call stack.
MAX_DEPTH = 100
MAX_DIGITS = 4_300
MAX_RATIO, MIN_UNPACKED = 100, 2**28
"""A compressed file may contain `MIN_UNPACKED` bytes, or `MAX_RATIO` times as many bytes as it has."""
SURROGATE = re.compile("[\ud800-\udfff]")

ARRAYS = (".json", ".json.gz")
SUFFIXES = (".jsonl", ".jsonl.gz", *ARRAYS)
Row = dict[str, object]


class Rejected(ValueError):
    """An error that makes a row unusable.

    `reason` is one of a fixed set of reasons. `detail` describes the error in this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


def parse_json(text: str) -> object:
    """Parse JSON more strictly than Python's parser.

    Raises:
        Rejected: the text is not JSON, begins with a byte order mark, has an integer of more than `MAX_DIGITS` digits,
            or is nested deeper than `MAX_DEPTH` levels. Unlike Python's parser, this function also rejects a number
            that is not finite, a duplicate key and a lone surrogate.
    """
    value = decode_json(text)
    verify_json(value)
    return value


def decode_json(text: str | bytes) -> object:
    """Parse JSON without raising an error.

    Each faulty number or object is replaced by a `Rejected`. If the text is not JSON, the result is a `Rejected`.
    """
    try:
        text = text if isinstance(text, str) else text.decode()
        if text.startswith("\ufeff"):
            return Rejected("byte order mark", "save the file as UTF-8 without it")
        return _DECODER.decode(text)
    except UnicodeDecodeError as error:
        return Rejected("not UTF-8", f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}")
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if error.lineno > 1 else ""
        return Rejected("not valid JSON", f"{error.msg} at {line}column {error.colno}")
    except RecursionError:
        return Rejected("nested too deep", f"more than {MAX_DEPTH} levels")


def _integer(token: str) -> int | Rejected:
    digits = len(token.lstrip("-"))
    return int(token) if digits <= MAX_DIGITS else Rejected("integer too long", f"{digits} digits")


def _float(token: str) -> float | Rejected:
    return float(token) if math.isfinite(float(token)) else Rejected("number is not finite", truncate(token))


def _object(pairs: list[tuple[str, object]]) -> Row | Rejected:
    row = dict(pairs)
    if len(row) == len(pairs):
        return row
    repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
    return Rejected("duplicate key", truncate(repr(repeated)))


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_float)


def verify_json(root: object) -> None:
    """Raise a `Rejected` for the first fault in a decoded value.

    A fault is a lone surrogate, a nesting that is too deep, or a `Rejected` in the value. In the last case, that
    `Rejected` itself is raised.
    """
    pending = [(root, 0)]
    while pending:
        value, depth = pending.pop()
        if isinstance(value, Rejected):
            raise value
        if isinstance(value, str) and (lone := SURROGATE.search(value)):
            raise Rejected("lone surrogate", repr(lone.group()))
        if isinstance(value, dict | list):
            if depth == MAX_DEPTH:
                raise Rejected("nested too deep", f"more than {MAX_DEPTH} levels")
            children = [*value, *value.values()] if isinstance(value, dict) else value
            pending += [(child, depth + 1) for child in reversed(children)]


def decode_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yield the number and the decoded value of each row. If a row cannot be decoded, its value is a `Rejected`."""
    if not path.name.endswith((*SUFFIXES, ".gz")):
        raise InputError(f"{path}: unknown file format. The name must end in one of {', '.join(SUFFIXES)}, .gz.")
    try:
        if path.suffix == ".gz":
            _require_normal_ratio(path)
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            if path.name.endswith(ARRAYS):
                yield from enumerate(_decode_array(path, stream.read().removeprefix(BOM_UTF8)), 1)
            else:
                for number, line in enumerate(stream, 1):
                    text = line.removeprefix(BOM_UTF8) if number == 1 else line  # editors on Windows write it
                    if text.strip():
                        yield number, decode_json(text.rstrip(b"\r\n"))
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _require_normal_ratio(path: Path) -> None:
    """Raise `InputError` if a compressed file contains far more bytes than text does, and could fill the memory."""
    limit, size = max(MIN_UNPACKED, MAX_RATIO * path.stat().st_size), 0
    with gzip.open(path) as stream:
        while chunk := stream.read(2**20):
            size += len(chunk)
            if size > limit:
                raise InputError(f"{path}: contains more than {limit:,} bytes; decompress it if that is right")


def _decode_array(path: Path, content: bytes) -> list[object]:
    """Decode a JSON array. Raise `InputError` if the text is not a JSON array.

    This error cannot be skipped, because it makes all rows unreadable.
    """
    rows = decode_json(content)
    if isinstance(rows, list):
        return rows
    found = rows if isinstance(rows, Rejected) else f"found {type(rows).__name__}"
    raise InputError(f"{path}: {found}. Expected an array; a file with one object per line must be named .jsonl.")


def truncate(text: str) -> str:
    """Return a text that is shortened to 60 characters."""
    return text if len(text) <= 60 else f"{text[:57]}..."
