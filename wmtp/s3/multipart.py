"""Upload a local file in parts. The file is read and hashed once, and a few threads send the parts."""

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
from wmtp.s3.errors import StoreError, UploadNotFound

MIB = 2**20
MIN_PART_BYTES, MAX_PARTS = 8 * MIB, 9000
"""Limits of a multipart upload. S3 accepts at most 10,000 parts for one object."""
MAX_CONCURRENT_PARTS = 4


class LocalFileError(Exception):
    """A local file that should be uploaded is missing or unreadable, or its SHA-256 differs from the expected one."""


class Retry(Protocol):
    """A function that calls the store, and may repeat a call that failed."""

    def __call__(self, call: Callable[[], Any], /) -> Any:
        """Return the result of the call."""


def no_retry(call: Callable[[], Any], /) -> Any:
    """Make the call once, without retries."""
    return call()


def no_progress(count: int, /) -> None:
    """Ignore the number of transferred bytes."""


class RequestBody(io.BytesIO):
    """Body of one request, as a file object. With plain bytes, all bytes must be sent within the connect timeout."""

    def __init__(self, data: bytes, on_progress: Callable[[int], None]) -> None:
        """Create the body. Each read calls `on_progress` with 0, because the store has not confirmed the bytes yet."""
        super().__init__(data)
        self._on_progress = on_progress

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes."""
        self._on_progress(0)
        return super().read(size)


@dataclass(frozen=True)
class Part:
    """One part of a file. The first part has number 1."""

    number: int
    data: bytes

    @cached_property
    def digest(self) -> bytes:
        """MD5 of the part."""
        return md5(self.data)


@dataclass(frozen=True)
class SentParts:
    """Result of `send_parts`: MD5 and ETag of each part, and the SHA-256 of the complete file."""

    md5s: list[bytes]
    etags: list[str]
    sha256: str


def send_parts(
    file: BinaryIO,
    size: int,
    put: Callable[[Part], str],
    retry: Retry = no_retry,
    on_progress: Callable[[int], None] = no_progress,
) -> SentParts:
    """Read the first `size` bytes of a file and send them in parts, at most `MAX_CONCURRENT_PARTS` at a time.

    Args:
        file: the file, opened for reading.
        size: number of bytes to send.
        put: uploads one part and returns its ETag.
        retry: repeats `put` for a part whose first attempt failed.
        on_progress: called with the number of bytes of each uploaded part.

    Raises:
        UploadNotFound: the multipart upload does not exist any more, so sending a part again is useless.
    """
    content = hashlib.sha256()
    md5s, etags = list[bytes](), list[str]()
    in_flight: deque[tuple[Part, Future[str]]] = deque()

    def _resend(part: Part) -> str | UploadNotFound:
        try:
            return put(part)
        except UploadNotFound as error:
            return error

    def _finish_oldest() -> None:
        part, future = in_flight.popleft()
        try:
            etag: str | UploadNotFound = future.result()
        except (StoreError, InputError):
            etag = retry(lambda: _resend(part))
        if isinstance(etag, UploadNotFound):
            raise etag
        md5s.append(part.digest)
        etags.append(etag)
        on_progress(len(part.data))

    for part in _read_parts(file, size):
        content.update(part.data)
        in_flight.append((part, _call_in_thread(put, part)))
        if len(in_flight) == MAX_CONCURRENT_PARTS:
            _finish_oldest()
    while in_flight:
        _finish_oldest()
    return SentParts(md5s, etags, content.hexdigest())


def md5(data: bytes) -> bytes:
    """Return the MD5 of some bytes. Most stores compute ETags from it."""
    return hashlib.md5(data, usedforsecurity=False).digest()


@contextmanager
def translate_local_errors(path: Path) -> Iterator[None]:
    """Replace errors of the local file with `LocalFileError`. Errors of the store are raised unchanged."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise LocalFileError(f"{path}: {error.strerror or error}") from error
    except LocalFileError as error:
        raise LocalFileError(f"{path}: {error}") from error


def check_sha256(expected: str | None, found: str) -> None:
    """Check that the SHA-256 of a file is the expected one. If `expected` is None, nothing is checked.

    Raises:
        LocalFileError: the SHA-256 differs.
    """
    if expected is not None and found != expected:
        raise LocalFileError("does not have the content that was written")


def _read_parts(file: BinaryIO, size: int) -> Iterator[Part]:
    length = max(MIN_PART_BYTES, math.ceil(size / MAX_PARTS / MIB) * MIB)
    for number, start in enumerate(range(0, size, length), 1):
        yield Part(number, file.read(min(length, size - start)))


def _call_in_thread(call: Callable[[Part], str], part: Part) -> Future[str]:
    """Start `call(part)` in a daemon thread and return its future. A daemon thread does not delay the process exit."""
    future: Future[str] = Future()

    def _run() -> None:
        try:
            future.set_result(call(part))
        except BaseException as error:  # noqa: BLE001 - raised by future.result()
            future.set_exception(error)

    threading.Thread(target=_run, name=f"part {part.number}", daemon=True).start()
    return future
