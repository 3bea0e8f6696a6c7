"""A folder in an S3 bucket. Every upload is verified against the ETag that the store returns."""

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
from wmtp.runtime.processes import run_with_timeout
from wmtp.s3.errors import ObjectMissing, StoreError, StoreUnreachable, UploadNotFound, to_error
from wmtp.s3.multipart import (
    MAX_CONCURRENT_PARTS,
    MIN_PART_BYTES,
    Body,
    LocalFileError,
    Part,
    Retry,
    local_errors,
    md5,
    no_progress,
    no_retry,
    require_sha256,
    send_parts,
)
from wmtp.s3.options import KEYS, S3Options, check_endpoint, redact, split_url

__all__ = ["LocalFileError", "S3Folder", "S3Options", "StoreError", "StoreUnreachable"]
log = logging.getLogger(__name__)
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 5, 20, 2
CHECK_SECONDS = 10.0
VERBOSE_LOGGERS = ("boto3", "botocore", "urllib3")
"""Loggers that write request headers, including tokens, at level DEBUG."""
CHUNK_BYTES = 2**20
MAX_KEYS_PER_DELETE = 1000


class S3Folder:
    """The objects of a bucket below a prefix, by keys relative to the prefix. Safe to share between threads.

    Every method raises `InputError` if the store refuses, `StoreUnreachable` if it does not respond, and `StoreError`
    if it fails otherwise. The messages have one line and hold no keys.
    """

    def __init__(self, url: str, options: S3Options | None = None) -> None:
        """Create the client; no request is sent.

        Raises:
            InputError: the URL or an option is invalid, or the AWS profile does not exist.
        """
        options = options or S3Options()
        try:
            self.bucket, self.prefix = split_url(url)
        except ValueError as error:
            raise InputError(f"{redact(url)}: {error}") from error
        self.url = self.where = url.rstrip("/")
        if options.endpoint_url is not None:
            try:
                check_endpoint(options.endpoint_url)
            except ValueError as error:
                raise InputError(f"{redact(options.endpoint_url)}: {error}") from error
        self._client = self._create_client(options)
        endpoint = str(self._client.meta.endpoint_url)
        if not endpoint.endswith(".amazonaws.com"):
            self.where = f"{self.url} at {redact(endpoint)}"

    def check(self) -> None:
        """Check within ten seconds that objects can be written, listed, read and deleted here."""
        if not run_with_timeout(CHECK_SECONDS, self._try_all_actions):
            raise StoreUnreachable(f"{self.where}: did not answer within {CHECK_SECONDS:g} s")

    def _try_all_actions(self) -> None:
        key = f".wmtp-check-{secrets.token_hex(8)}"
        self.put_bytes(b"Written by wmtp to check its permissions.", key)
        try:
            next(self.list_objects(key), None)
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
        retry: Retry = no_retry,
        on_progress: Callable[[int], None] = no_progress,
    ) -> None:
        """Upload a file with its current length, and verify the object.

        A large file is sent in parts, from several threads; the object becomes visible when all parts have arrived.

        Args:
            path: the file.
            key: key of the object.
            sha256: expected SHA-256 of the file; a file with another content is not uploaded.
            retry: makes each request to the store. A large file needs many.
            on_progress: called with the number of bytes that arrived, and with 0 whenever some were sent.

        Raises:
            LocalFileError: the file is missing or unreadable, or has another content.
        """
        with local_errors(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MIN_PART_BYTES:
                self._put_large(file, size, key, sha256, retry, on_progress)
                return
            data = file.read(size)
            require_sha256(sha256, hashlib.sha256(data).hexdigest())
            retry(lambda: self.put_bytes(data, key, on_progress))
            on_progress(size)

    def put_bytes(self, data: bytes, key: str, on_progress: Callable[[int], None] = no_progress) -> None:
        """Upload a small object and verify it. Call `on_progress` with 0 whenever some bytes were sent."""
        with self._translate_errors("write"):
            response = self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=Body(data, on_progress))
        self._verify(key, _get_field(response, "ETag", self.where), md5(data).hex(), hashlib.sha256(data).hexdigest())

    def get(self, key: str) -> bytes | None:
        """Return the content of an object, or None if it does not exist."""
        with self._translate_errors("read"):
            response = self._get(key)
            content: bytes | None = None if response is None else response["Body"].read()
        return content

    def has_content_of(self, path: Path, key: str) -> bool:
        """Return whether an object is known to equal a small file. False if the file is large or the ETag is no MD5.

        Raises:
            LocalFileError: the file is missing or unreadable.
        """
        with local_errors(path):
            data = path.read_bytes() if path.stat().st_size <= MIN_PART_BYTES else None
        response = self._get(key) if data is not None else None
        if response is None or data is None:
            return False
        response["Body"].close()
        return _is_tag(response["ETag"], md5(data).hex())

    def read_json(self, key: str) -> dict[str, Any] | None:
        """Return the content of a JSON object, or None if it does not exist.

        Raises:
            InputError: the content is not a JSON object.
        """
        data = self.get(key)
        try:
            content = None if data is None else json.loads(data)
        except ValueError as error:
            raise InputError(f"{self.url}/{key}: is not valid JSON: {error}") from error
        if content is not None and not isinstance(content, dict):
            raise InputError(f"{self.url}/{key}: is not a JSON object")
        return content

    def download(self, key: str, path: Path, size: int, on_progress: Callable[[int], None] = no_progress) -> str:
        """Download an object of `size` bytes, and return the SHA-256 of the file.

        Bytes that the file already has, from an interrupted download, are kept and not requested again.

        Raises:
            ObjectMissing: the object does not exist.
        """
        content = hashlib.sha256()
        with path.open("a+b") as file:
            file.seek(0)
            while chunk := file.read(CHUNK_BYTES):
                content.update(chunk)
            if file.tell() >= size > 0:
                return content.hexdigest()
            with self._translate_errors("read"):
                response = self._get(key, start=file.tell())
                if response is None:
                    raise ObjectMissing(f"{self.where}: {key} is not there")
                for chunk in response["Body"].iter_chunks(CHUNK_BYTES):
                    content.update(chunk)
                    file.write(chunk)
                    on_progress(len(chunk))
        return content.hexdigest()

    def list_objects(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Yield key and size in bytes of every object whose key starts with `prefix`."""
        with self._translate_errors("list"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix):
                for entry in page.get("Contents", []):
                    yield entry["Key"].removeprefix(self.prefix), entry["Size"]

    def delete(self, keys: Iterable[str]) -> dict[str, str]:
        """Delete objects, and return the keys that could not be deleted, with the reason."""
        problems: dict[str, str] = {}
        entries = [{"Key": self.prefix + key} for key in keys]
        for start in range(0, len(entries), MAX_KEYS_PER_DELETE):
            batch = {"Objects": entries[start : start + MAX_KEYS_PER_DELETE], "Quiet": True}
            with self._translate_errors("delete"):
                response = self._client.delete_objects(Bucket=self.bucket, Delete=batch)
            for error in response.get("Errors", []):
                problems[error["Key"].removeprefix(self.prefix)] = str(error.get("Code") or error.get("Message"))
        return problems

    def abort_uploads(self) -> int:
        """Abort all unfinished multipart uploads below the prefix, and return their number."""
        count = 0
        with self._translate_errors("list the unfinished uploads"):
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
        retry: Retry,
        on_progress: Callable[[int], None],
    ) -> None:
        target = {"Bucket": self.bucket, "Key": self.prefix + key}
        upload = target | {"UploadId": retry(lambda: self._begin(target))}
        try:
            sent = send_parts(file, size, lambda part: self._put_part(upload, part, on_progress), retry, on_progress)
            require_sha256(sha256, sent.sha256)
            tag = retry(lambda: self._complete(upload, sent.tags))
        except BaseException:
            self._abort_if_possible(upload)
            raise
        self._verify(key, tag, f"{md5(b''.join(sent.digests)).hex()}-{len(sent.digests)}", sent.sha256)

    def _put_part(self, upload: dict[str, str], part: Part, on_progress: Callable[[int], None]) -> str:
        """Send a part, a second time if it arrived damaged, and return its ETag."""
        for _ in range(2):  # if the store's ETags are no MD5, only the complete object can be verified
            with self._translate_errors("write"):
                body = Body(part.data, on_progress)
                response = self._client.upload_part(**upload, PartNumber=part.number, Body=body)
            if _is_tag(response["ETag"], part.digest.hex()) or "SSEKMSKeyId" in response:
                break
            log.warning("%s: part %d of %s arrived damaged", self.where, part.number, upload["Key"])
        return str(response["ETag"])

    def _begin(self, target: dict[str, str]) -> str:
        with self._translate_errors("write"):
            return _get_field(self._client.create_multipart_upload(**target), "UploadId", self.where)

    def _complete(self, upload: dict[str, str], tags: list[str]) -> str:
        """Complete a multipart upload, and return the object's ETag (empty if the object is not found)."""
        parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
        try:
            with self._translate_errors("write"):
                response = self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except UploadNotFound:  # the upload may be complete already, if the response to an earlier request was lost
            response = self._get(upload["Key"].removeprefix(self.prefix)) or {"ETag": ""}
            if "Body" in response:
                response["Body"].close()
        return str(response["ETag"])

    def _abort(self, upload: dict[str, str]) -> None:
        with suppress(UploadNotFound), self._translate_errors("give up unfinished uploads"):
            self._client.abort_multipart_upload(**upload)

    def _abort_if_possible(self, upload: dict[str, str]) -> None:
        try:
            self._abort(upload)
        except (StoreError, InputError) as error:
            log.info("a failed upload stays unfinished in the store until the next start: %s", error)

    def _verify(self, key: str, tag: str, expected: str, sha256: str) -> None:
        """Check an uploaded object, and delete it if it differs from the file.

        The ETag of most stores is the MD5 of the received bytes. If it is not, for example because the store encrypts
        with keys of a service (SSE-KMS), the object is downloaded and compared.
        """
        if _is_tag(tag, expected):
            return
        content = hashlib.sha256()
        with self._translate_errors("read"):
            response = self._get(key)
            for chunk in response["Body"].iter_chunks(CHUNK_BYTES) if response is not None else ():
                content.update(chunk)
        if content.hexdigest() != sha256:
            self.delete([key])
            raise StoreError(f"{self.where}: {key} arrived damaged; it was deleted there")

    def _get(self, key: str, start: int = 0) -> dict[str, Any] | None:
        """Return the response for an object from byte `start` on, or None if the object does not exist."""
        options = {"Range": f"bytes={start}-"} if start else {}
        try:
            with self._translate_errors("read"):
                response: dict[str, Any] = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key, **options)
        except ObjectMissing:
            return None
        return response

    def _create_client(self, options: S3Options) -> Any:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        for name in VERBOSE_LOGGERS:
            logging.getLogger(name).setLevel(logging.WARNING)
        config = Config(
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            retries={"total_max_attempts": ATTEMPTS, "mode": "standard"},
            max_pool_connections=MAX_CONCURRENT_PARTS + 2,
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
            problem = (
                f"{redact(str(error))}; set endpoint_url, or AWS_ENDPOINT_URL_S3, to one such as https://host:port"
            )
            raise InputError(f"{self.where}: {problem}") from error

    @contextmanager
    def _translate_errors(self, action: str) -> Iterator[None]:
        """Raise exceptions of boto3 as those of this package; `action` is a verb for the message."""
        from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError  # noqa: A004

        try:
            yield
        except ClientError as error:
            raise to_error(self.where, action, error.response) from error
        except (ConnectionError, HTTPClientError) as error:
            raise StoreUnreachable(f"{self.where}: does not answer: {_to_line(error)}") from error
        except BotoCoreError as error:
            if "Credential" in type(error).__name__ or "Token" in type(error).__name__:
                raise InputError(f"{self.where}: {error}; set {KEYS}, or AWS_PROFILE") from error
            raise StoreError(f"{self.where}: {_to_line(error)}") from error


def _get_field(response: dict[str, Any], name: str, where: str) -> str:
    """Return a field of a response.

    Raises:
        InputError: the field is missing, which happens if the endpoint is some web server and not an S3 store.
    """
    if name not in response:
        problem = "does not answer as an S3 store does; see checkpoint.endpoint_url and AWS_ENDPOINT_URL_S3"
        raise InputError(f"{where}: {problem}")
    return str(response[name])


def _is_tag(tag: str, expected: str) -> bool:
    return tag.strip('"').lower() == expected


def _to_line(error: Exception) -> str:
    return redact(textwrap.shorten(f"{type(error).__name__}: {error}", 300))
