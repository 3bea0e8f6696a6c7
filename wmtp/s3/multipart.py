"""A local file on its way: read and hashed once, in parts, which a few threads send at a time."""

import hashlib
import io
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from wmtp.errors import InputError
from wmtp.s3.errors import StoreError, UploadLost

MIB = 2**20
SMALLEST_PART, MOST_PARTS = 8 * MIB, 9000
"""A store takes at most 10,000 parts of one object."""
PARTS_AT_ONCE = 4


class LocalProblem(Exception):
    """A file that was to be sent is gone, cannot be read, or does not have the content that it should have."""


class Attempt(Protocol):
    """How one call to the store is made: at once, or with patience."""

    def __call__(self, call: Callable[[], Any], /) -> Any:
        """The call's result."""


def once(call: Callable[[], Any], /) -> Any:
    """Make a call, and leave what it raises to the caller."""
    return call()


def ignored(count: int, /) -> None:
    """Nobody asks how many bytes have moved."""


class Body(io.BytesIO):
    """What is sent in one request. As plain bytes it would have to leave within the time for connecting."""

    def __init__(self, data: bytes, moved: Callable[[int], None]) -> None:
        """`moved` is told of 0 bytes whenever the next of them are asked for: that they arrive is not known yet."""
        super().__init__(data)
        self._moved = moved

    def read(self, size: int | None = -1, /) -> bytes:
        """The next bytes."""
        self._moved(0)
        return super().read(size)


@dataclass(frozen=True)
class Part:
    """A piece of a file; the first has number 1."""

    number: int
    data: bytes

    @cached_property
    def digest(self) -> bytes:
        """Its MD5."""
        return md5(self.data)


@dataclass(frozen=True)
class Sent:
    """A file that was sent in parts: the MD5 and the store's name of each, and the SHA-256 of the whole."""

    digests: list[bytes]
    tags: list[str]
    sha256: str


def send_parts(
    file: BinaryIO,
    size: int,
    put: Callable[[Part], str],
    attempt: Attempt = once,
    moved: Callable[[int], None] = ignored,
) -> Sent:
    """Read `size` bytes and `put` them part by part, several at once; what fails is then tried by itself.

    Raises:
        UploadLost: the store has forgotten the parts before; no patience helps.
    """
    content = hashlib.sha256()
    digests, tags = list[bytes](), list[str]()
    sending: deque[tuple[Part, Future[str]]] = deque()

    def again(part: Part) -> str | UploadLost:
        try:
            return put(part)
        except UploadLost as lost:
            return lost

    def settle() -> None:
        part, sent = sending.popleft()
        try:
            tag: str | UploadLost = sent.result()
        except (StoreError, InputError):
            tag = attempt(lambda: again(part))
        if isinstance(tag, UploadLost):
            raise tag
        digests.append(part.digest)
        tags.append(tag)
        moved(len(part.data))

    for part in _parts(file, size):
        content.update(part.data)
        sending.append((part, _in_background(put, part)))
        if len(sending) == PARTS_AT_ONCE:
            settle()
    while sending:
        settle()
    return Sent(digests, tags, content.hexdigest())


def md5(data: bytes) -> bytes:
    """The hash by which stores name what they received."""
    return hashlib.md5(data, usedforsecurity=False).digest()


@contextmanager
def local(path: Path) -> Iterator[None]:
    """Tell failures of this machine's own file from those of the store."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise LocalProblem(f"{path}: {error.strerror or error}") from error
    except LocalProblem as problem:
        raise LocalProblem(f"{path}: {problem}") from problem


def require(sha256: str | None, found: str) -> None:
    """Raises `LocalProblem` if a file is not what it should be."""
    if sha256 is not None and found != sha256:
        raise LocalProblem("does not have the content that was written")


def _parts(file: BinaryIO, size: int) -> Iterator[Part]:
    length = max(SMALLEST_PART, math.ceil(size / MOST_PARTS / MIB) * MIB)
    for number, start in enumerate(range(0, size, length), 1):
        yield Part(number, file.read(min(length, size - start)))


def _in_background(call: Callable[[Part], str], part: Part) -> Future[str]:
    """Make a call in a thread that does not keep the process from ending."""
    future: Future[str] = Future()

    def run() -> None:
        try:
            future.set_result(call(part))
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, name=f"part {part.number}", daemon=True).start()
    return future
