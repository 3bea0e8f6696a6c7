"""A folder in a bucket: what is put there is compared with what the store says that it took."""

import hashlib
import json
import logging
import os
import secrets
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from wmtp.errors import InputError
from wmtp.runtime.processes import answers_within
from wmtp.s3.errors import ObjectMissing, StoreError, StoreUnreachable, UploadLost, meaning
from wmtp.s3.multipart import (
    PARTS_AT_ONCE,
    SMALLEST_PART,
    Attempt,
    Body,
    LocalProblem,
    Part,
    ignored,
    local,
    md5,
    once,
    require,
    send_parts,
)
from wmtp.s3.options import KEYS, S3Options, checked_endpoint, shown, split_address

__all__ = ["LocalProblem", "S3Folder", "S3Options", "StoreError", "StoreUnreachable"]
log = logging.getLogger(__name__)
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 5, 20, 2
CHECK_SECONDS = 10.0
TELLING = ("boto3", "botocore", "urllib3")
"""Loggers that write down every header of a request, tokens among them, when everything is logged."""
READ_AT_ONCE = 2**20
DELETED_AT_ONCE = 1000


class S3Folder:
    """The objects of a bucket below a prefix, by keys relative to it. Threads may share one.

    Every method raises, in one line and without keys, `InputError` where the store refuses, `StoreUnreachable` where
    it does not answer, and `StoreError` where it fails otherwise.
    """

    def __init__(self, url: str, options: S3Options | None = None) -> None:
        """Raises `InputError` for an address that is none, or a profile that is not there."""
        options = options or S3Options()
        try:
            self.bucket, self.prefix = split_address(url)
        except ValueError as error:
            raise InputError(f"{shown(url)}: {error}") from error
        self.url = self.where = url.rstrip("/")
        if options.endpoint_url is not None:
            try:
                checked_endpoint(options.endpoint_url)
            except ValueError as error:
                raise InputError(f"{shown(options.endpoint_url)}: {error}") from error
        self._client = self._connected(options)
        endpoint = str(self._client.meta.endpoint_url)
        if not endpoint.endswith(".amazonaws.com"):
            self.where = f"{self.url} at {shown(endpoint)}"

    def check(self) -> None:
        """Find out within ten seconds whether objects can be written, listed, read and deleted here."""
        if not answers_within(CHECK_SECONDS, self._try_everything):
            raise StoreUnreachable(f"{self.where}: did not answer within {CHECK_SECONDS:g} s")

    def _try_everything(self) -> None:
        key = f".wmtp-check-{secrets.token_hex(8)}"
        self.put_bytes(b"wmtp was here to see whether it may write", key)
        try:
            next(self.listed(key), None)
            self.get(key)
        finally:
            problems = self.delete([key])
        if problems:
            raise InputError(f"{self.where}: objects can be written there, but not deleted: {problems[key]}")

    def put(
        self,
        path: Path,
        key: str,
        *,
        sha256: str | None = None,
        attempt: Attempt = once,
        moved: Callable[[int], None] = ignored,
    ) -> None:
        """Upload a file, as long as it is now; what arrived is verified.

        A large file goes in parts, a few at once and from several threads, and is seen only when all have arrived.

        Args:
            path: the file.
            key: its name there.
            sha256: what its content must be; else it is not uploaded.
            attempt: makes each call to the store, of which a large file needs many.
            moved: is told of every so many bytes that arrived, and of 0 whenever some were sent.

        Raises:
            LocalProblem: the file is gone, or unreadable, or of other content.
        """
        with local(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > SMALLEST_PART:
                self._put_large(file, size, key, sha256, attempt, moved)
                return
            data = file.read(size)
            require(sha256, hashlib.sha256(data).hexdigest())
            attempt(lambda: self.put_bytes(data, key, moved))
            moved(size)

    def put_bytes(self, data: bytes, key: str, moved: Callable[[int], None] = ignored) -> None:
        """Upload a small object; what arrived is verified. `moved` is told of 0 bytes whenever some were sent."""
        with self._asking("write"):
            answer = self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=Body(data, moved))
        self._verify(key, _told(answer, "ETag", self.where), md5(data).hex(), hashlib.sha256(data).hexdigest())

    def get(self, key: str) -> bytes | None:
        """An object's content; None if it is not there."""
        with self._asking("read"):
            answer = self._get(key)
            content: bytes | None = None if answer is None else answer["Body"].read()
        return content

    def holds(self, path: Path, key: str) -> bool:
        """Whether an object is known to be what a small file is now; stores that do not tell are taken not to hold it.

        Raises:
            LocalProblem: the file is gone or unreadable.
        """
        with local(path):
            data = path.read_bytes() if path.stat().st_size <= SMALLEST_PART else None
        answer = self._get(key) if data is not None else None
        if answer is None or data is None:
            return False
        answer["Body"].close()
        return _is_tag(answer["ETag"], md5(data).hex())

    def read_json(self, key: str) -> dict[str, Any] | None:
        """The content of a JSON object; None if it is not there. Raises `InputError` if it is damaged."""
        data = self.get(key)
        try:
            content = None if data is None else json.loads(data)
        except ValueError as error:
            raise InputError(f"{self.url}/{key}: is no JSON: {error}") from error
        if content is not None and not isinstance(content, dict):
            raise InputError(f"{self.url}/{key}: is no JSON object")
        return content

    def download(self, key: str, path: Path, size: int, moved: Callable[[int], None] = ignored) -> str:
        """Bring an object of `size` bytes into a file, going on behind what that holds; the SHA-256 of it all."""
        content = hashlib.sha256()
        with path.open("a+b") as file:
            file.seek(0)
            while chunk := file.read(READ_AT_ONCE):
                content.update(chunk)
            if file.tell() >= size > 0:
                return content.hexdigest()
            with self._asking("read"):
                answer = self._get(key, start=file.tell())
                if answer is None:
                    raise ObjectMissing(f"{self.where}: {key} is not there")
                for chunk in answer["Body"].iter_chunks(READ_AT_ONCE):
                    content.update(chunk)
                    file.write(chunk)
                    moved(len(chunk))
        return content.hexdigest()

    def listed(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """The keys that begin so, and the length of each object in bytes."""
        with self._asking("list"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                for entry in page.get("Contents", []):
                    yield entry["Key"].removeprefix(self.prefix), entry["Size"]

    def delete(self, keys: Iterable[str]) -> dict[str, str]:
        """Delete objects; returns the keys of those that it cannot delete, and why."""
        problems: dict[str, str] = {}
        named = [{"Key": self.prefix + key} for key in keys]
        for start in range(0, len(named), DELETED_AT_ONCE):
            batch = {"Objects": named[start : start + DELETED_AT_ONCE], "Quiet": True}
            with self._asking("delete"):
                answer = self._client.delete_objects(Bucket=self.bucket, Delete=batch)
            for error in answer.get("Errors", []):
                problems[error["Key"].removeprefix(self.prefix)] = str(error.get("Code") or error.get("Message"))
        return problems

    def abort_uploads(self) -> int:
        """Give up all uploads in parts that were begun here and never ended; returns how many."""
        count = 0
        with self._asking("list the unfinished uploads"):
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix):
                for upload in page.get("Uploads", []):
                    self._abort({"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]})
                    count += 1
        return count

    def _put_large(
        self,
        file: BinaryIO,
        size: int,
        key: str,
        sha256: str | None,
        attempt: Attempt,
        moved: Callable[[int], None],
    ) -> None:
        place = {"Bucket": self.bucket, "Key": self.prefix + key}
        upload = place | {"UploadId": attempt(lambda: self._begin(place))}
        try:
            sent = send_parts(file, size, lambda part: self._put_part(upload, part, moved), attempt, moved)
            require(sha256, sent.sha256)
            tag = attempt(lambda: self._complete(upload, sent.tags))
        except BaseException:
            self._abort_if_possible(upload)
            raise
        self._verify(key, tag, f"{md5(b''.join(sent.digests)).hex()}-{len(sent.digests)}", sent.sha256)

    def _put_part(self, upload: dict[str, str], part: Part, moved: Callable[[int], None]) -> str:
        """Send a part, again if it did not arrive as it is; what the store calls it."""
        for _ in range(2):  # a store that names parts in another way is judged by the whole object
            with self._asking("write"):
                answer = self._client.upload_part(**upload, PartNumber=part.number, Body=Body(part.data, moved))
            if _is_tag(answer["ETag"], part.digest.hex()) or "SSEKMSKeyId" in answer:
                break
            log.warning("%s: part %d of %s arrived damaged", self.where, part.number, upload["Key"])
        return str(answer["ETag"])

    def _begin(self, place: dict[str, str]) -> str:
        with self._asking("write"):
            return _told(self._client.create_multipart_upload(**place), "UploadId", self.where)

    def _complete(self, upload: dict[str, str], tags: list[str]) -> str:
        """Make an object of its parts; what the store calls it, or nothing if it is not to be found."""
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
        try:
            with self._asking("write"):
                answer = self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except UploadLost:  # the answer that said it is complete may have been lost
            answer = self._get(upload["Key"].removeprefix(self.prefix)) or {"ETag": ""}
            if "Body" in answer:
                answer["Body"].close()
        return str(answer["ETag"])

    def _abort(self, upload: dict[str, str]) -> None:
        with suppress(UploadLost), self._asking("give up unfinished uploads"):
            self._client.abort_multipart_upload(**upload)

    def _abort_if_possible(self, upload: dict[str, str]) -> None:
        try:
            self._abort(upload)
        except (StoreError, InputError) as error:
            log.info("an upload that failed stays unfinished until the next start: %s", error)

    def _verify(self, key: str, tag: str, expected: str, sha256: str) -> None:
        """Compare what arrived with what was sent, and delete it if it differs.

        Most stores name an object by the MD5 of what they received. Of others, such as those that encrypt with keys
        of a service, it is read back.
        """
        if _is_tag(tag, expected):
            return
        content = hashlib.sha256()
        with self._asking("read"):
            answer = self._get(key)
            for chunk in answer["Body"].iter_chunks(READ_AT_ONCE) if answer is not None else ():
                content.update(chunk)
        if content.hexdigest() != sha256:
            self.delete([key])
            raise StoreError(f"{self.where}: {key} arrived damaged; it was deleted there")

    def _get(self, key: str, start: int = 0) -> dict[str, Any] | None:
        """A store's answer with an object from a byte on; None if it is not there."""
        behind = {"Range": f"bytes={start}-"} if start else {}
        try:
            with self._asking("read"):
                answer: dict[str, Any] = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key, **behind)
        except ObjectMissing:
            return None
        return answer

    def _connected(self, options: S3Options) -> Any:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        for name in TELLING:
            logging.getLogger(name).setLevel(logging.WARNING)
        config = Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
            max_pool_connections=PARTS_AT_ONCE + 2,
            tcp_keepalive=True,
            s3={"addressing_style": options.addressing_style},
            request_checksum_calculation=options.checksums,
            response_checksum_validation=options.checksums,
        )
        try:
            return boto3.session.Session().client("s3", endpoint_url=options.endpoint_url, config=config)
        except BotoCoreError as error:
            raise InputError(f"{self.where}: {error}; set {KEYS}, or AWS_PROFILE") from error
        except ValueError as error:
            problem = f"{shown(str(error))}; set endpoint_url, or AWS_ENDPOINT_URL_S3, to one such as https://host:port"
            raise InputError(f"{self.where}: {problem}") from error

    @contextmanager
    def _asking(self, action: str) -> Iterator[None]:
        """Say in the project's own words what boto3 raises while an action is asked for."""
        from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError  # noqa: A004

        try:
            yield
        except ClientError as error:
            raise meaning(self.where, action, error.response) from error
        except (ConnectionError, HTTPClientError) as error:
            raise StoreUnreachable(f"{self.where}: does not answer: {_line(error)}") from error
        except BotoCoreError as error:
            if "Credential" in type(error).__name__ or "Token" in type(error).__name__:
                raise InputError(f"{self.where}: {error}; set {KEYS}, or AWS_PROFILE") from error
            raise StoreError(f"{self.where}: {_line(error)}") from error


def _told(answer: dict[str, Any], name: str, where: str) -> str:
    """What a store has to say. Raises `InputError` if it does not, as some web page may answer everything."""
    if name not in answer:
        problem = "does not answer as an S3 store does; see checkpoint.endpoint_url and AWS_ENDPOINT_URL_S3"
        raise InputError(f"{where}: {problem}")
    return str(answer[name])


def _is_tag(tag: str, expected: str) -> bool:
    return tag.strip('"').lower() == expected


def _line(error: Exception) -> str:
    return shown(textwrap.shorten(f"{type(error).__name__}: {error}", 300))
