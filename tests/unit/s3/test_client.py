"""Tests of S3Folder with a real store and a faulty network."""

import hashlib
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from tests.support.proxy import FaultyProxy
from tests.support.servers import ObjectStore
from wmtp.errors import InputError
from wmtp.runtime.background import BackgroundSender
from wmtp.s3 import client as remote
from wmtp.s3 import connection, multipart
from wmtp.s3.client import LocalFileError, S3Folder, StoreError, StoreUnreachable
from wmtp.s3.options import S3Options
from wmtp.s3.retention import delete_superseded

pytestmark = [
    pytest.mark.servers,
    pytest.mark.slow,
    pytest.mark.xdist_group("s3"),
    pytest.mark.usefixtures("s3_credentials"),
]
SMALL, LARGE = 5_000, 20_000_000
SECRET = "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY"
OpenFolder = Callable[..., S3Folder]


@pytest.fixture
def open_folder(object_store: ObjectStore) -> OpenFolder:
    def make(prefix: str = "runs/one", **options: Any) -> S3Folder:
        hooks = {name: options.pop(name) for name in ("retry", "on_progress") if name in options}
        return S3Folder(f"s3://{object_store.bucket}/{prefix}", S3Options(**options), **hooks)

    return make


def write_random(path: Path, size: int) -> bytes:
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    return content


def put_in_background(open_folder: OpenFolder, path: Path, **options: Any) -> tuple[bool, float]:
    """Return whether a background sender has uploaded a file to the key `a`, and the seconds it took."""
    started = time.monotonic()
    sender = BackgroundSender("the store", lambda: folder.put(path, "a"))
    folder = open_folder(retry=sender.retry, **options)
    sender.start()
    return sender.wait_until_done(60, 60), time.monotonic() - started


@pytest.mark.parametrize("size", [0, SMALL, LARGE])
@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_uploaded_file_is_downloaded_unchanged(
    open_folder: OpenFolder, tmp_path: Path, size: int, checksums: str
) -> None:
    bytes_moved: list[int] = []
    remote_folder = open_folder(checksums=checksums, on_progress=bytes_moved.append)
    content = write_random(tmp_path / "a", size)
    remote_folder.put(tmp_path / "a", "folder/a file, ünd more", sha256=hashlib.sha256(content).hexdigest())
    assert sum(bytes_moved) == size and list(remote_folder.list_objects()) == [("folder/a file, ünd more", size)]
    assert remote_folder.get("folder/a file, ünd more") == content and remote_folder.get("folder/a") is None
    (tmp_path / "b").write_bytes(content[:1000])
    got = remote_folder.download("folder/a file, ünd more", tmp_path / "b", size)
    assert got == hashlib.sha256(content).hexdigest() and (tmp_path / "b").read_bytes() == content
    assert remote_folder.delete(["folder/a file, ünd more", "never uploaded"]) == {} and not list(
        remote_folder.list_objects()
    )


def test_check_leaves_no_object(open_folder: OpenFolder) -> None:
    remote_folder = open_folder()
    remote_folder.check()
    assert not list(remote_folder.list_objects())


def test_file_with_unexpected_content_is_not_uploaded(
    object_store: ObjectStore, open_folder: OpenFolder, tmp_path: Path
) -> None:
    remote_folder = open_folder()
    for size in (SMALL, LARGE):
        write_random(tmp_path / "a", size)
        with pytest.raises(LocalFileError, match="does not have the content that was written"):
            remote_folder.put(tmp_path / "a", "a", sha256="0" * 64)
    with pytest.raises(LocalFileError, match="No such file"):
        remote_folder.put(tmp_path / "b", "b")
    assert not list(remote_folder.list_objects())
    assert "Uploads" not in object_store.client().list_multipart_uploads(Bucket=object_store.bucket)


@pytest.mark.parametrize(
    ("variables", "expected_text"),
    [
        ({"AWS_SECRET_ACCESS_KEY": SECRET}, "does not accept the keys (SignatureDoesNotMatch)"),
        ({"AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE"}, "does not accept the keys (InvalidAccessKeyId)"),
        ({"AWS_SECRET_ACCESS_KEY": None}, "Partial credentials"),
        ({"AWS_SECRET_ACCESS_KEY": None, "AWS_ACCESS_KEY_ID": None}, "Unable to locate credentials"),
        ({"AWS_PROFILE": "nobody"}, "nobody"),
        ({"AWS_ENDPOINT_URL_S3": "rubbish"}, "endpoint_url"),
    ],
)
def test_wrong_keys_are_an_error_of_one_line(
    object_store: ObjectStore,
    open_folder: OpenFolder,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    expected_text: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as raised:
        open_folder().check()
    text = str(raised.value)
    assert expected_text in text and text.startswith(f"s3://{object_store.bucket}/runs/one") and "\n" not in text
    assert "AWS_ACCESS_KEY_ID" in text or "AWS_ENDPOINT_URL_S3" in text
    for secret in (SECRET, "AKIAIOSFODNN7EXAMPLE", object_store.access_key, object_store.secret_key):
        assert secret not in text


@pytest.mark.parametrize(
    ("methods", "expected_text"),
    [(("PUT",), "may not write"), (("GET",), "may not list"), (("POST",), "may not delete")],
)
def test_missing_permission_is_an_error(
    open_folder: OpenFolder, proxy: FaultyProxy, methods: tuple[str, ...], expected_text: str
) -> None:
    proxy.answer(403, 99, methods)
    with pytest.raises(InputError, match=expected_text) as raised:
        open_folder(endpoint_url=proxy.url).check()
    assert "\n" not in str(raised.value) and "AWS_ACCESS_KEY_ID" in str(raised.value)


def test_missing_bucket_is_an_error(object_store: ObjectStore) -> None:
    with pytest.raises(InputError, match="there is no such bucket; create it, or name another"):
        S3Folder("s3://nowhere-at-all/runs").check()


@pytest.mark.parametrize(
    ("url", "endpoint", "expected_text"),
    [
        ("s3://user:se/cret@bucket/runs", None, "holds a user or a password"),
        ("s3://bucket/runs", "https://user:se/cret@host", "holds a user or a password"),
        ("s3://Bucket", None, "must be s3://bucket"),
        ("https://bucket", None, "must be s3://bucket"),
        ("s3://bucket", "host:9000", "must be a URL"),
    ],
)
def test_invalid_url_is_an_error(url: str, endpoint: str | None, expected_text: str) -> None:
    with pytest.raises(InputError, match=expected_text) as raised:
        S3Folder(url, S3Options(endpoint_url=endpoint))
    assert "cret" not in str(raised.value)


def test_a_store_without_response_is_unreachable(open_folder: OpenFolder, proxy: FaultyProxy) -> None:
    remote_folder = open_folder(endpoint_url=proxy.url)
    proxy.answer(500, 99)
    with pytest.raises(StoreUnreachable):
        remote_folder.check()
    proxy.dead = True
    with pytest.raises(StoreUnreachable) as raised:
        remote_folder.check()
    assert "\n" not in str(raised.value)
    with pytest.raises(StoreUnreachable, match="Could not connect"):
        open_folder(endpoint_url="http://127.0.0.1:9").check()


def test_upload_survives_errors_drops_and_a_stall(open_folder: OpenFolder, proxy: FaultyProxy, tmp_path: Path) -> None:
    content = write_random(tmp_path / "a", LARGE)
    proxy.answer(503, 5), proxy.drop(2), proxy.stall(8.0)
    is_done, seconds = put_in_background(open_folder, tmp_path / "a", endpoint_url=proxy.url)
    assert is_done and seconds < 60 and open_folder().get("a") == content
    assert [proxy.done[kind] for kind in ("answer", "drop", "stall")] == [5, 2, 1]


def call_thrice(call: Callable[[], Any]) -> Any:
    """Make a call up to three times, until it raises no error."""
    for _ in range(2):
        with suppress(Exception):
            return call()
    return call()


@pytest.mark.parametrize(
    ("method", "status", "num_requests"),
    [
        ("get", 503, 3), ("get", 403, 3), ("get", 404, 1), ("put_bytes", 503, 3), ("list_objects", 503, 3),
        ("delete", 503, 3), ("delete", 403, 1), ("abort_uploads", 503, 3), ("abort_uploads", 403, 1),
    ],
)  # fmt: skip
def test_only_the_retry_function_repeats_requests_and_only_if_that_is_useful(
    open_folder: OpenFolder, proxy: FaultyProxy, method: str, status: int, num_requests: int
) -> None:
    """The control is a function that repeats nothing: boto3 itself makes each request once."""
    arguments: dict[str, tuple[Any, ...]] = {"get": ("a",), "put_bytes": (b"1", "a"), "delete": (["a"],)}
    proxy.answer(status, 99)
    for retry, expected in ((call_thrice, num_requests), (lambda call: call(), 1)):
        folder, before = open_folder(endpoint_url=proxy.url, retry=retry), proxy.requests.total()
        with suppress(StoreError, InputError):
            result = getattr(folder, method)(*arguments.get(method, ()))
            list(result) if method == "list_objects" else None
        assert proxy.requests.total() - before == expected


def test_control_a_single_call_of_boto3_fails_after_five_errors(
    object_store: ObjectStore, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.answer(503, 5)
    with pytest.raises(ClientError, match="503"):
        object_store.client(proxy.url).put_object(Bucket=object_store.bucket, Key="a", Body=b"a")


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_flipped_byte_is_detected_and_sent_again(
    open_folder: OpenFolder, proxy: FaultyProxy, tmp_path: Path, size: int, checksums: str
) -> None:
    content = write_random(tmp_path / "a", size)
    proxy.flip()
    is_done, _ = put_in_background(open_folder, tmp_path / "a", endpoint_url=proxy.url, checksums=checksums)
    assert is_done and proxy.done["flip"] == 1 and open_folder().get("a") == content
    assert proxy.requests["PUT"] <= (2 if size == SMALL else 4), "undamaged parts were sent again"


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_control_without_verification_a_flipped_byte_is_not_detected(
    open_folder: OpenFolder, proxy: FaultyProxy, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, remote_folder = (
        write_random(tmp_path / "a", size),
        open_folder(endpoint_url=proxy.url, checksums="when_required"),
    )
    for module in (remote, multipart):
        monkeypatch.setattr(module, "etag_matches", lambda etag, expected: True)
    proxy.flip()
    remote_folder.put(tmp_path / "a", "a")
    assert remote_folder.get("a") != content


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_an_object_whose_etag_is_not_an_md5_is_downloaded_and_compared(
    open_folder: OpenFolder, proxy: FaultyProxy, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, remote_folder = (
        write_random(tmp_path / "a", size),
        open_folder(endpoint_url=proxy.url, checksums="when_required", retry=lambda call: call()),
    )
    for module in (remote, multipart):
        monkeypatch.setattr(module, "etag_matches", lambda etag, expected: False)
    remote_folder.put(tmp_path / "a", "a")
    assert remote_folder.get("a") == content
    proxy.flip(2 if size == SMALL else 9)
    with pytest.raises(StoreError, match="arrived damaged; it was deleted there"):
        remote_folder.put(tmp_path / "a", "a")
    assert remote_folder.get("a") is None


def test_an_upload_aborted_by_the_store_starts_again(open_folder: OpenFolder, tmp_path: Path) -> None:
    content, remote_folder = write_random(tmp_path / "a", 2 * LARGE), open_folder()
    aborted: list[int] = []

    def bytes_moved(count: int) -> None:
        if count and not aborted:
            aborted.append(remote_folder.abort_uploads())

    is_done, _ = put_in_background(open_folder, tmp_path / "a", on_progress=bytes_moved)
    assert aborted == [1] and is_done and remote_folder.get("a") == content


@pytest.mark.parametrize("is_quiet", [True, False])
def test_token_is_not_logged_at_level_debug(
    open_folder: OpenFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_quiet: bool
) -> None:
    """The control does not change the loggers of boto3."""
    for name in connection.VERBOSE_LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    if not is_quiet:
        monkeypatch.setattr(connection, "VERBOSE_LOGGERS", ())
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token-of-a-session")
    with caplog.at_level(logging.DEBUG), suppress(StoreError, InputError):
        open_folder().put_bytes(b"1", "a")
    assert ("a-token-of-a-session" in caplog.text) != is_quiet


def test_only_unfinished_uploads_below_the_prefix_are_aborted(
    object_store: ObjectStore, open_folder: OpenFolder
) -> None:
    client, bucket = object_store.client(), object_store.bucket
    for key in ("runs/one/a", "runs/one/b/c", "runs/one-and-a-half", "runs/two/a"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    assert open_folder().abort_uploads() == 2
    left = [upload["Key"] for upload in client.list_multipart_uploads(Bucket=bucket)["Uploads"]]
    assert sorted(left) == ["runs/one-and-a-half", "runs/two/a"]


def test_delete_superseded_keeps_three_of_many_checkpoints(object_store: ObjectStore, open_folder: OpenFolder) -> None:
    remote_folder, client = open_folder(), object_store.client(max_pool_connections=4)
    keys = [f"checkpoints/step_{step:08d}/{name}" for step in range(335) for name in ("a", "b", "manifest.json")]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=object_store.bucket, Key=f"runs/one/{key}"), keys))
    assert len(keys) == 1005 and len(list(remote_folder.list_objects())) == 1005
    page = client.list_objects_v2(Bucket=object_store.bucket)
    assert len(page["Contents"]) == 1000, "the control: one page of results lists all objects"
    assert delete_superseded(remote_folder, "", 3, []) == {}
    left = {key.split("/")[1] for key, _ in remote_folder.list_objects()}
    assert left == {"step_00000332", "step_00000333", "step_00000334"} and len(list(remote_folder.list_objects())) == 9


MEMORY = r"""
import re, sys
from pathlib import Path
from wmtp.s3.client import S3Folder

def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

remote_folder, path = S3Folder(sys.argv[1]), Path(sys.argv[2])
remote_folder.put_bytes(b"warm", "warm")
before = peak()
remote_folder.put(path, "large")
after = peak()
content = path.read_bytes()
print(after - before, peak() - after)
"""


def test_a_large_file_needs_little_memory(object_store: ObjectStore, tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(300 * 2**20)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, f"s3://{object_store.bucket}/runs", str(tmp_path / "large")],
        capture_output=True, text=True, timeout=120, check=True, env=os.environ,
    )  # fmt: skip
    own_bytes, naive_bytes = map(float, done.stdout.split())
    assert own_bytes < 100 and naive_bytes > 200, (own_bytes, naive_bytes)


def test_boto3_is_not_imported_for_local_checkpoints() -> None:
    modules = "wmtp.checkpoint.store, wmtp.s3.uploader, wmtp.s3.fetch"
    code = f"import sys, {modules}; print('boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n" and boto3.__name__ in sys.modules
