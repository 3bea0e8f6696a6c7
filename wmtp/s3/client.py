"""Read and write the objects of an S3 bucket whose keys start with a prefix. Every uploaded object is verified."""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, BinaryIO, ParamSpec, TypeVar

from wmtp.errors import InputError
from wmtp.runtime.processes import run_with_timeout
from wmtp.s3.connection import create_client, translate_errors
from wmtp.s3.errors import ObjectMissing, StoreError, StoreUnreachable, UploadNotFound
from wmtp.s3.multipart import (
    MIN_PART_BYTES,
    LocalFileError,
    Part,
    RequestBody,
    check_sha256,
    md5,
    no_progress,
    send_parts,
    translate_local_errors,
)
from wmtp.s3.options import S3Options, check_endpoint, redact, split_url
from wmtp.s3.retry import Retry, retry_few_times

__all__ = ["LocalFileError", "S3Folder", "StoreError", "StoreUnreachable"]
log = logging.getLogger(__name__)
CHECK_SECONDS = 10.0
"""Time limit of `S3Folder.check` in seconds."""
CHUNK_BYTES = 2**20
MAX_KEYS_PER_DELETE = 1000
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class S3Folder:
    """A folder in an S3 bucket: all objects whose keys start with the same prefix.

    Keys in arguments and results are relative to the prefix. Every method that sends a request raises `InputError` if
    the S3 store refuses the request, `StoreUnreachable` if the store does not respond, and `StoreError` for any other
    failure. Error messages have one line and contain no credentials. Several threads may use the same instance.

    Only this class repeats failed requests. It repeats single requests, such as that for one part of a large file.
    """

    def __init__(
        self,
        url: str,
        options: S3Options | None = None,
        *,
        retry: Retry = retry_few_times,
        on_progress: Callable[[int], None] = no_progress,
    ) -> None:
        """Create the boto3 client. No request is sent.

        Args:
            url: `s3://bucket` or `s3://bucket/prefix`.
            options: connection options of the store.
            retry: function that makes the requests. It decides how often and for how long a failed one is repeated.
            on_progress: function that is called with the number of uploaded bytes after each part of an upload. While a
                part is sent, it is called with 0, which shows that the request has not stalled.

        Raises:
            InputError: the URL or an option is invalid, or the AWS profile does not exist.
        """
        options = options or S3Options()
        try:
            self.bucket, self.prefix = split_url(url)
        except ValueError as error:
            raise InputError(f"{redact(url)}: {error}") from error
        self.url = url.rstrip("/")
        self.display_url = self.url
        """URL of the folder for use in messages. It includes the endpoint if the S3 store does not belong to AWS."""
        if options.endpoint_url is not None:
            try:
                check_endpoint(options.endpoint_url)
            except ValueError as error:
                raise InputError(f"{redact(options.endpoint_url)}: {error}") from error
        self._retry, self._on_progress = retry, on_progress
        self._client = create_client(self.display_url, options)
        endpoint = str(self._client.meta.endpoint_url)
        if not endpoint.endswith(".amazonaws.com"):
            self.display_url = f"{self.url} at {redact(endpoint)}"

    def check(self) -> None:
        """Check that objects can be written, listed, read and deleted. The check takes at most ten seconds.

        Raises:
            InputError: the store refuses one of these actions.
            StoreUnreachable: the store does not respond in time.
        """
        if not run_with_timeout(CHECK_SECONDS, self._check_permissions):
            raise StoreUnreachable(f"{self.display_url}: did not answer within {CHECK_SECONDS:g} s")

    def _check_permissions(self) -> None:
        key = f".wmtp-check-{secrets.token_hex(8)}"
        self.put_bytes(b"Written by wmtp to check its permissions.", key)
        try:
            next(self.list_objects(key), None)
            self.get(key)
        finally:
            errors = self.delete([key])
        if errors:
            raise InputError(f"{self.display_url}: objects can be written there, but not deleted: {errors[key]}")

    def put(self, path: Path, key: str, *, sha256: str | None = None) -> None:
        """Upload a file and verify the uploaded object.

        If the file grows during the call, the additional bytes are not uploaded. A file larger than `MIN_PART_BYTES` is
        uploaded in parts, from several threads. Its object becomes visible when all parts are uploaded.

        Args:
            path: path of the local file.
            key: key of the object.
            sha256: expected SHA-256 of the file. If the file has another SHA-256, no object is created.

        Raises:
            LocalFileError: the file is missing or unreadable, or does not have the expected SHA-256.
        """
        self._repeat(self._put, path, key, sha256)

    def _put(self, path: Path, key: str, sha256: str | None) -> None:
        with translate_local_errors(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MIN_PART_BYTES:
                self._put_large(file, size, key, sha256)
                return
            data = file.read(size)
            check_sha256(sha256, hashlib.sha256(data).hexdigest())
            self._put_bytes(data, key)

    def put_bytes(self, data: bytes, key: str) -> None:
        """Upload data as an object in one request, and verify the object."""
        self._repeat(self._put_bytes, data, key)

    def _put_bytes(self, data: bytes, key: str) -> None:
        body = RequestBody(data, self._on_progress)
        with self._translate_errors("write"):
            response = self._client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=body)
        etag = _get_field(response, "ETag", self.display_url)
        self._verify(key, etag, md5(data).hex(), hashlib.sha256(data).hexdigest())
        self._on_progress(len(data))

    def get(self, key: str) -> bytes | None:
        """Return the content of an object, or None if it does not exist."""

        def _read() -> bytes | None:
            """Request the object once."""
            with self._translate_errors("read"):
                response = self._get(key)
                return None if response is None else response["Body"].read()

        return self._repeat(_read)

    def has_content_of(self, path: Path, key: str) -> bool:
        """Return whether the ETag of an object proves that the object has the same content as a local file.

        The result is also False if the file is larger than `MIN_PART_BYTES`, if the object does not exist, or if the
        store does not use the MD5 of an object as its ETag.

        Raises:
            LocalFileError: the file is missing or unreadable.
        """
        with translate_local_errors(path):
            data = path.read_bytes() if path.stat().st_size <= MIN_PART_BYTES else None
        response = self._repeat(self._get, key) if data is not None else None
        if response is None or data is None:
            return False
        response["Body"].close()
        return _etag_matches(response["ETag"], md5(data).hex())

    def read_json(self, key: str) -> dict[str, Any] | None:
        """Return the parsed content of a JSON file in S3, or None if the file does not exist.

        Raises:
            InputError: the file does not contain a JSON object.
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
        """Download an object to a local file, and return the SHA-256 of the complete file.

        If an earlier download was interrupted and the file exists, only the missing bytes are requested. A failed
        request is repeated for as long as bytes arrive.

        Args:
            key: key of the object.
            path: path of the local file.
            size: size of the object in bytes.
            on_progress: function that is called with the number of bytes of each received chunk.

        Raises:
            ObjectMissing: the object does not exist.
        """
        while True:
            before = path.stat().st_size if path.exists() else 0
            try:
                return self._repeat(self._download, key, path, size, on_progress)
            except StoreError:
                if not path.exists() or path.stat().st_size <= before:
                    raise

    def _download(self, key: str, path: Path, size: int, on_progress: Callable[[int], None]) -> str:
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
                    raise ObjectMissing(f"{self.display_url}: {key} does not exist")
                for chunk in response["Body"].iter_chunks(CHUNK_BYTES):
                    content.update(chunk)
                    file.write(chunk)
                    on_progress(len(chunk))
        return content.hexdigest()

    def list_objects(self, prefix: str = "") -> Iterator[tuple[str, int]]:
        """Yield the key and the size in bytes of every object whose key starts with `prefix`."""

        def _page(**position: str) -> dict[str, Any]:
            """Request one page of the list."""
            with self._translate_errors("list"):
                target = {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
                return self._client.list_objects_v2(**target, **position)  # type: ignore[no-any-return]

        page = self._repeat(_page)
        while True:
            for entry in page.get("Contents", []):
                yield entry["Key"].removeprefix(self.prefix), entry["Size"]
            if not page.get("IsTruncated"):
                return
            page = self._repeat(_page, ContinuationToken=page["NextContinuationToken"])

    def delete(self, keys: Iterable[str]) -> dict[str, str]:
        """Delete objects. Return a dictionary that maps each key that could not be deleted to its error code.

        The requests are repeated only if the store does not respond.
        """

        def _delete(entries: list[dict[str, str]]) -> list[dict[str, str]]:
            """Delete some objects, and return the errors."""
            with self._translate_errors("delete"):
                response = self._client.delete_objects(Bucket=self.bucket, Delete={"Objects": entries, "Quiet": True})
            return response.get("Errors", [])  # type: ignore[no-any-return]

        errors: dict[str, str] = {}
        entries = [{"Key": self.prefix + key} for key in keys]
        for start in range(0, len(entries), MAX_KEYS_PER_DELETE):
            batch = entries[start : start + MAX_KEYS_PER_DELETE]
            for entry in self._repeat(_delete, batch, retried=StoreUnreachable):
                errors[entry["Key"].removeprefix(self.prefix)] = str(entry.get("Code") or entry.get("Message"))
        return errors

    def delete_object(self, key: str) -> None:
        """Delete one object. If the store does not delete it, the request is repeated like any other."""

        def _delete() -> None:
            """Delete the object once."""
            if errors := self.delete([key]):
                raise StoreError(f"{self.display_url}: {key} cannot be deleted: {errors[key]}")

        self._repeat(_delete)

    def abort_uploads(self) -> int:
        """Abort all unfinished multipart uploads in this folder, and return the number of aborted uploads.

        The requests are repeated only if the store does not respond, because a store may not support them.
        """
        return self._repeat(self._abort_uploads, retried=StoreUnreachable)

    def _abort_uploads(self) -> int:
        count = 0
        with self._translate_errors("list the unfinished uploads"):
            pages = self._client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix):
                for upload in page.get("Uploads", []):
                    self._abort_upload({"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]})
                    count += 1
        return count

    def _put_large(self, file: BinaryIO, size: int, key: str, sha256: str | None) -> None:
        target = {"Bucket": self.bucket, "Key": self.prefix + key}
        upload = target | {"UploadId": self._repeat(self._create_upload, target)}

        def _put_part(part: Part) -> str:
            """Upload one part, and return its ETag."""
            return self._put_part(upload, part)

        def _put_part_again(part: Part) -> str:
            """Upload one part whose upload has failed, and return its ETag."""
            return self._repeat(_put_part, part)

        try:
            sent = send_parts(file, size, _put_part, _put_part_again, self._on_progress)
            check_sha256(sha256, sent.sha256)
            etag = self._repeat(self._complete_upload, upload, sent.etags)
        except UploadNotFound as error:  # the store has aborted it, so the next attempt is a new upload
            raise StoreError(str(error)) from error
        except BaseException:
            self._try_abort_upload(upload)
            raise
        self._verify(key, etag, f"{md5(b''.join(sent.md5s)).hex()}-{len(sent.md5s)}", sent.sha256)

    def _put_part(self, upload: dict[str, str], part: Part) -> str:
        """Upload one part of a file and return the ETag of the part.

        If the ETag shows that the part was damaged on the way, the part is uploaded once more.
        """
        for _ in range(2):  # if the ETags are not MD5s, only the complete object can be verified, later
            with self._translate_errors("write"):
                body = RequestBody(part.data, self._on_progress)
                response = self._client.upload_part(**upload, PartNumber=part.number, Body=body)
            if _etag_matches(response["ETag"], part.digest.hex()) or "SSEKMSKeyId" in response:
                break
            log.warning("%s: part %d of %s arrived damaged", self.display_url, part.number, upload["Key"])
        return str(response["ETag"])

    def _create_upload(self, target: dict[str, str]) -> str:
        with self._translate_errors("write"):
            return _get_field(self._client.create_multipart_upload(**target), "UploadId", self.display_url)

    def _complete_upload(self, upload: dict[str, str], etags: list[str]) -> str:
        """Complete a multipart upload, and return the ETag of the new object.

        An earlier request may already have completed the upload. Then the ETag of the existing object is returned. If
        the object does not exist either, the result is an empty string.
        """
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
        try:
            with self._translate_errors("write"):
                response = self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
        except UploadNotFound:  # an earlier request may have completed the upload while its response was lost
            response = self._get(upload["Key"].removeprefix(self.prefix)) or {"ETag": ""}
            if "Body" in response:
                response["Body"].close()
        return str(response["ETag"])

    def _abort_upload(self, upload: dict[str, str]) -> None:
        with suppress(UploadNotFound), self._translate_errors("abort unfinished uploads"):
            self._client.abort_multipart_upload(**upload)

    def _try_abort_upload(self, upload: dict[str, str]) -> None:
        try:
            self._abort_upload(upload)
        except (StoreError, InputError) as error:
            log.info("a failed upload could not be aborted; the next start aborts it: %s", error)

    def _verify(self, key: str, etag: str, expected: str, sha256: str) -> None:
        """Check that an uploaded object has the uploaded content, and delete the object if it does not.

        Most stores compute the ETag of an object from MD5 hashes of its bytes. If the ETag is not the expected one,
        the object is downloaded and its SHA-256 is compared, because some stores compute ETags in another way (for
        example, with SSE-KMS encryption).

        Args:
            key: key of the object.
            etag: ETag that the store returned.
            expected: ETag of an undamaged object in a store that computes ETags from MD5 hashes.
            sha256: SHA-256 of the uploaded content.

        Raises:
            StoreError: the object does not have the uploaded content.
        """
        if _etag_matches(etag, expected):
            return
        content = hashlib.sha256()
        with self._translate_errors("read"):
            response = self._get(key)
            for chunk in response["Body"].iter_chunks(CHUNK_BYTES) if response is not None else ():
                content.update(chunk)
        if content.hexdigest() != sha256:
            self.delete([key])
            raise StoreError(f"{self.display_url}: {key} arrived damaged; it was deleted there")

    def _get(self, key: str, start: int = 0) -> dict[str, Any] | None:
        """Request the bytes of an object from position `start` to the end.

        Return the response of boto3, or None if the object does not exist.
        """
        options = {"Range": f"bytes={start}-"} if start else {}
        try:
            with self._translate_errors("read"):
                response: dict[str, Any] = self._client.get_object(Bucket=self.bucket, Key=self.prefix + key, **options)
        except ObjectMissing:
            return None
        return response

    def _repeat(
        self,
        call: Callable[..., Result],
        *args: Any,
        retried: type[Exception] | tuple[type[Exception], ...] = (StoreError, InputError),
        **options: Any,
    ) -> Result:
        """Make a request with the function `retry` of the constructor, and return its result.

        `retry` never sees exceptions after which a repetition is useless: missing objects and uploads, and exceptions
        of other types than `retried`.
        """

        def _attempt() -> tuple[Result | None, Exception | None]:
            """Make the request, and return its result and the error that must not be retried."""
            try:
                return call(*args, **options), None
            except Exception as error:
                if isinstance(error, retried) and not isinstance(error, (ObjectMissing, UploadNotFound)):
                    raise
                return None, error

        result, error = self._retry(_attempt)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    def _translate_errors(self, action: str) -> AbstractContextManager[None]:
        return translate_errors(self.display_url, action)


def _get_field(response: dict[str, Any], name: str, where: str) -> str:
    """Return a field of a response of boto3. `where` is the URL of the store for the error message.

    Raises:
        InputError: the field is missing. This happens if the endpoint is a web server but not an S3 store.
    """
    if name not in response:
        problem = "does not answer as an S3 store does; see checkpoint.s3.endpoint_url and AWS_ENDPOINT_URL_S3"
        raise InputError(f"{where}: {problem}")
    return str(response[name])


def _etag_matches(etag: str, expected: str) -> bool:
    return etag.strip('"').lower() == expected
