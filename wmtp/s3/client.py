"""Read and write the objects of an S3 bucket whose keys start with a prefix. Every uploaded object is verified."""

import hashlib
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from wmtp.errors import InputError
from wmtp.runtime.processes import run_with_timeout
from wmtp.s3.connection import S3Connection, no_progress
from wmtp.s3.errors import ObjectMissing, StoreError, StoreUnreachable
from wmtp.s3.multipart import (
    MIN_PART_BYTES,
    LocalFileError,
    MultipartUpload,
    RequestBody,
    abort_upload,
    check_sha256,
    etag_matches,
    md5,
    translate_local_errors,
)

__all__ = ["LocalFileError", "S3Folder", "StoreError", "StoreUnreachable"]
log = logging.getLogger(__name__)
CHECK_SECONDS = 10.0
"""Time limit of `S3Folder.check` in seconds."""
CHUNK_BYTES = 2**20
MAX_KEYS_PER_DELETE = 1000


class S3Folder(S3Connection):
    """A folder in an S3 bucket: all objects whose keys start with the same prefix.

    Keys in arguments and results are relative to the prefix. Every method that sends a request raises `InputError` if
    the S3 store refuses the request, `StoreUnreachable` if the store does not respond, and `StoreError` for any other
    failure. Error messages have one line and contain no credentials. Several threads may use the same instance.
    """

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
        self.repeat(self._put, path, key, sha256)

    def _put(self, path: Path, key: str, sha256: str | None) -> None:
        with translate_local_errors(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MIN_PART_BYTES:
                etag, sent = MultipartUpload(self, self.prefix + key).send(file, size, sha256)
                self._verify(key, etag, f"{md5(b''.join(sent.md5s)).hex()}-{len(sent.md5s)}", sent.sha256)
                return
            data = file.read(size)
            check_sha256(sha256, hashlib.sha256(data).hexdigest())
            self._put_bytes(data, key)

    def put_bytes(self, data: bytes, key: str) -> None:
        """Upload data as an object in one request, and verify the object."""
        self.repeat(self._put_bytes, data, key)

    def _put_bytes(self, data: bytes, key: str) -> None:
        body = RequestBody(data, self.on_progress)
        with self.translate_errors("write"):
            response = self.client.put_object(Bucket=self.bucket, Key=self.prefix + key, Body=body)
        etag = self.get_field(response, "ETag")
        self._verify(key, etag, md5(data).hex(), hashlib.sha256(data).hexdigest())
        self.on_progress(len(data))

    def get(self, key: str) -> bytes | None:
        """Return the content of an object, or None if it does not exist."""

        def _read() -> bytes | None:
            """Request the object once."""
            with self.translate_errors("read"):
                response = self._get(key)
                return None if response is None else response["Body"].read()

        return self.repeat(_read)

    def has_content_of(self, path: Path, key: str) -> bool:
        """Return whether the ETag of an object proves that the object has the same content as a local file.

        The result is also False if the file is larger than `MIN_PART_BYTES`, if the object does not exist, or if the
        store does not use the MD5 of an object as its ETag.

        Raises:
            LocalFileError: the file is missing or unreadable.
        """
        with translate_local_errors(path):
            data = path.read_bytes() if path.stat().st_size <= MIN_PART_BYTES else None
        response = self.repeat(self._get, key) if data is not None else None
        if response is None or data is None:
            return False
        response["Body"].close()
        return etag_matches(response["ETag"], md5(data).hex())

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
                return self.repeat(self._download, key, path, size, on_progress)
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
            with self.translate_errors("read"):
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
            with self.translate_errors("list"):
                target = {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
                return self.client.list_objects_v2(**target, **position)  # type: ignore[no-any-return]

        page = self.repeat(_page)
        while True:
            for entry in page.get("Contents", []):
                yield entry["Key"].removeprefix(self.prefix), entry["Size"]
            if not page.get("IsTruncated"):
                return
            page = self.repeat(_page, ContinuationToken=page["NextContinuationToken"])

    def delete(self, keys: Iterable[str]) -> dict[str, str]:
        """Delete objects. Return a dictionary that maps each key that could not be deleted to its error code.

        The requests are repeated only if the store does not respond.
        """

        def _delete(entries: list[dict[str, str]]) -> list[dict[str, str]]:
            """Delete some objects, and return the errors."""
            with self.translate_errors("delete"):
                response = self.client.delete_objects(Bucket=self.bucket, Delete={"Objects": entries, "Quiet": True})
            return response.get("Errors", [])  # type: ignore[no-any-return]

        errors: dict[str, str] = {}
        entries = [{"Key": self.prefix + key} for key in keys]
        for start in range(0, len(entries), MAX_KEYS_PER_DELETE):
            batch = entries[start : start + MAX_KEYS_PER_DELETE]
            for entry in self.repeat(_delete, batch, retried=StoreUnreachable):
                errors[entry["Key"].removeprefix(self.prefix)] = str(entry.get("Code") or entry.get("Message"))
        return errors

    def delete_object(self, key: str) -> None:
        """Delete one object. If the store does not delete it, the request is repeated like any other."""

        def _delete() -> None:
            """Delete the object once."""
            if errors := self.delete([key]):
                raise StoreError(f"{self.display_url}: {key} cannot be deleted: {errors[key]}")

        self.repeat(_delete)

    def abort_uploads(self) -> int:
        """Abort all unfinished multipart uploads in this folder, and return the number of aborted uploads.

        The requests are repeated only if the store does not respond, because a store may not support them.
        """
        return self.repeat(self._abort_uploads, retried=StoreUnreachable)

    def _abort_uploads(self) -> int:
        count = 0
        with self.translate_errors("list the unfinished uploads"):
            pages = self.client.get_paginator("list_multipart_uploads")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self.prefix):
                for upload in page.get("Uploads", []):
                    abort_upload(self, {"Bucket": self.bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]})
                    count += 1
        return count

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
        if etag_matches(etag, expected):
            return
        content = hashlib.sha256()
        with self.translate_errors("read"):
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
            with self.translate_errors("read"):
                response: dict[str, Any] = self.client.get_object(Bucket=self.bucket, Key=self.prefix + key, **options)
        except ObjectMissing:
            return None
        return response
