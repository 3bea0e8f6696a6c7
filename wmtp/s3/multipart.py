"""Upload a local file in parts. The file is read only once, and several threads send the parts.

boto3's transfer manager is not used: the process could not exit before its threads have ended, which takes more than a
minute if the store does not respond, and one damaged part would cause the upload of the whole file again.
"""

import hashlib
import io
import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from wmtp.errors import InputError
from wmtp.s3.connection import MAX_CONCURRENT_PARTS, S3Connection
from wmtp.s3.errors import ObjectMissing, StoreError, UploadNotFound

log = logging.getLogger(__name__)
MIB = 2**20
MIN_PART_BYTES, MAX_PARTS = 8 * MIB, 9000
"""Smallest size in bytes of each part except the last, and largest number of parts. S3 accepts at most 10,000 parts."""


class LocalFileError(Exception):
    """A file cannot be uploaded, because it is missing or unreadable, or does not have the expected SHA-256."""


class RequestBody(io.BytesIO):
    """Body of one upload request, as a file object.

    If the body were a `bytes` object, the whole body would have to be sent within the connect timeout.
    """

    def __init__(self, data: bytes, on_progress: Callable[[int], None]) -> None:
        """Create the body of a request that sends `data`.

        Each read calls `on_progress` with 0. This shows that the request has not stalled.
        """
        super().__init__(data)
        self._on_progress = on_progress

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next `size` bytes, or all remaining bytes if `size` is -1 or None."""
        self._on_progress(0)
        return super().read(size)


@dataclass(frozen=True)
class Part:
    """One part of a file that is uploaded in parts. The first part has number 1."""

    number: int
    data: bytes

    @cached_property
    def digest(self) -> bytes:
        """MD5 of the bytes of this part."""
        return md5(self.data)


@dataclass(frozen=True)
class SentParts:
    """Result of `send_parts`. It contains the MD5 and the ETag of each part, and the SHA-256 of the complete file."""

    md5s: list[bytes]
    etags: list[str]
    sha256: str


class MultipartUpload:
    """One upload of a large file in parts. The object becomes visible when all parts are uploaded."""

    def __init__(self, connection: S3Connection, key: str) -> None:
        """Start the upload of the object with the key `key`, which includes the prefix."""
        self.connection, self.client, self.key = connection, connection.client, key
        self._target = {"Bucket": connection.bucket, "Key": key}
        self._upload = self._target | {"UploadId": connection.repeat(self._create)}

    def send(self, file: BinaryIO, size: int, sha256: str | None) -> tuple[str, SentParts]:
        """Send the first `size` bytes of a file, and return the ETag of the new object and the parts.

        Raises:
            LocalFileError: the file does not have the SHA-256 `sha256`. No object was created.
            StoreError: the store has aborted the upload.
        """
        try:
            sent = send_parts(file, size, self._put, self._put_again, self.connection.on_progress)
            check_sha256(sha256, sent.sha256)
            return self.connection.repeat(self._complete, sent.etags), sent
        except UploadNotFound as error:
            raise StoreError(str(error)) from error
        except BaseException:
            self._try_abort()
            raise

    def _create(self) -> str:
        with self.connection.translate_errors("write"):
            return self.connection.get_field(self.client.create_multipart_upload(**self._target), "UploadId")

    def _put(self, part: Part) -> str:
        """Upload one part of a file and return the ETag of the part.

        If the ETag shows that the part was damaged on the way, the part is uploaded once more.
        """
        for _ in range(2):  # if the ETags are not MD5s, only the complete object can be verified, later
            with self.connection.translate_errors("write"):
                body = RequestBody(part.data, self.connection.on_progress)
                response = self.client.upload_part(**self._upload, PartNumber=part.number, Body=body)
            if etag_matches(response["ETag"], part.digest.hex()) or "SSEKMSKeyId" in response:
                break
            log.warning("%s: part %d of %s arrived damaged", self.connection.display_url, part.number, self.key)
        return str(response["ETag"])

    def _put_again(self, part: Part) -> str:
        return self.connection.repeat(self._put, part)

    def _complete(self, etags: list[str]) -> str:
        """Complete the upload, and return the ETag of the new object.

        An earlier request may already have completed the upload. Then the ETag of the existing object is returned. If
        the object does not exist either, the result is an empty string.
        """
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        try:
            with self.connection.translate_errors("write"):
                response = self.client.complete_multipart_upload(**self._upload, MultipartUpload={"Parts": parts})
        except UploadNotFound:  # an earlier request may have completed the upload while its response was lost
            try:
                with self.connection.translate_errors("read"):
                    response = self.client.head_object(**self._target)
            except ObjectMissing:
                return ""
        return str(response["ETag"])

    def _try_abort(self) -> None:
        try:
            abort_upload(self.connection, self._upload)
        except (StoreError, InputError) as error:
            log.info("a failed upload could not be aborted; the next start aborts it: %s", error)


def abort_upload(connection: S3Connection, upload: dict[str, str]) -> None:
    """Abort an unfinished upload. `upload` contains its bucket, its key and its id."""
    with suppress(UploadNotFound), connection.translate_errors("abort unfinished uploads"):
        connection.client.abort_multipart_upload(**upload)


def etag_matches(etag: str, expected: str) -> bool:
    """Return whether an ETag is the expected one. Stores write ETags with or without quotes."""
    return etag.strip('"').lower() == expected


def send_parts(
    file: BinaryIO,
    size: int,
    put: Callable[[Part], str],
    put_again: Callable[[Part], str],
    on_progress: Callable[[int], None],
) -> SentParts:
    """Read the first `size` bytes of a file and send them in parts. Up to `MAX_CONCURRENT_PARTS` threads send parts.

    Args:
        file: the file, opened for reading.
        size: number of bytes to send.
        put: function that uploads one part and returns the ETag of the part.
        put_again: function that does the same for a part whose first upload has failed.
        on_progress: function that is called with the number of bytes of each uploaded part.

    Raises:
        UploadNotFound: the store does not know the multipart upload any more, so a part cannot be sent again.
    """
    content = hashlib.sha256()
    md5s, etags = list[bytes](), list[str]()
    in_flight: deque[tuple[Part, Future[str]]] = deque()

    def _finish_oldest() -> None:
        """Wait until the oldest part in flight is sent, and record its MD5 and ETag."""
        part, future = in_flight.popleft()
        try:
            etag = future.result()
        except UploadNotFound:
            raise
        except (StoreError, InputError):
            etag = put_again(part)
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
    """Return the MD5 of `data`. Most S3 stores compute the ETag of an object from MD5 hashes."""
    return hashlib.md5(data, usedforsecurity=False).digest()


@contextmanager
def translate_local_errors(path: Path) -> Iterator[None]:
    """Convert an `OSError` that a local file causes in this context to `LocalFileError`.

    Errors of the S3 store are raised unchanged. `path` is the path of the file for the message.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise LocalFileError(f"{path}: {error.strerror or error}") from error
    except LocalFileError as error:
        raise LocalFileError(f"{path}: {error}") from error


def check_sha256(expected: str | None, found: str) -> None:
    """Check that the SHA-256 of a file, `found`, is the expected one. If `expected` is None, nothing is checked.

    Raises:
        LocalFileError: the file has another SHA-256.
    """
    if expected is not None and found != expected:
        raise LocalFileError("does not have the content that was written")


def _read_parts(file: BinaryIO, size: int) -> Iterator[Part]:
    length = max(MIN_PART_BYTES, math.ceil(size / MAX_PARTS / MIB) * MIB)
    for number, start in enumerate(range(0, size, length), 1):
        yield Part(number, file.read(min(length, size - start)))


def _call_in_thread(call: Callable[[Part], str], part: Part) -> Future[str]:
    """Start a daemon thread that runs `call(part)`, and return a future of the result.

    A daemon thread is used because the process can exit before the thread has ended.
    """
    future: Future[str] = Future()

    def _run() -> None:
        """Make the call, and store its result or exception in the future."""
        try:
            future.set_result(call(part))
        except BaseException as error:  # noqa: BLE001 - raised by future.result()
            future.set_exception(error)

    threading.Thread(target=_run, name=f"part {part.number}", daemon=True).start()
    return future
