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
from wmtp.s3.client import LocalFileError, S3Folder, S3Options, StoreError, StoreUnreachable
from wmtp.s3.retention import delete_superseded

pytestmark = [
    pytest.mark.servers,
    pytest.mark.slow,
    pytest.mark.xdist_group("servers"),
    pytest.mark.usefixtures("keys"),
]
SMALL, LARGE = 5_000, 20_000_000
SECRET = "wJalrXUtnFEMIbPxRfiCYEXAMPLEKEY"
Place = Callable[..., S3Folder]


@pytest.fixture
def place(object_store: ObjectStore) -> Place:
    def make(prefix: str = "runs/one", **options: Any) -> S3Folder:
        return S3Folder(f"s3://{object_store.bucket}/{prefix}", S3Options(**options))

    return make


def written(path: Path, size: int) -> bytes:
    content = random.Random(size).randbytes(size)
    path.write_bytes(content)
    return content


def delivered(call: Callable[[BackgroundSender], object]) -> tuple[bool, float]:
    """Return whether a background sender finished a call, and the seconds it took."""
    began = time.monotonic()
    sender = BackgroundSender("the store", lambda: call(sender) and None)
    sender.start()
    for _ in sender.drain(60, 60):
        pass
    return sender.is_done, time.monotonic() - began


@pytest.mark.parametrize("size", [0, SMALL, LARGE])
@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_uploaded_file_is_downloaded_unchanged(place: Place, tmp_path: Path, size: int, checksums: str) -> None:
    content, there = written(tmp_path / "a", size), place(checksums=checksums)
    moved: list[int] = []
    there.put(
        tmp_path / "a", "folder/a file, ünd more", sha256=hashlib.sha256(content).hexdigest(), on_progress=moved.append
    )
    assert sum(moved) == size and list(there.list_objects()) == [("folder/a file, ünd more", size)]
    assert there.get("folder/a file, ünd more") == content and there.get("folder/a") is None
    (tmp_path / "b").write_bytes(content[:1000])
    got = there.download("folder/a file, ünd more", tmp_path / "b", size)
    assert got == hashlib.sha256(content).hexdigest() and (tmp_path / "b").read_bytes() == content
    assert there.delete(["folder/a file, ünd more", "never there"]) == {} and not list(there.list_objects())


def test_check_leaves_no_object(place: Place) -> None:
    there = place()
    there.check()
    assert not list(there.list_objects())


def test_file_with_unexpected_content_is_not_uploaded(object_store: ObjectStore, place: Place, tmp_path: Path) -> None:
    there = place()
    for size in (SMALL, LARGE):
        written(tmp_path / "a", size)
        with pytest.raises(LocalFileError, match="does not have the content that was written"):
            there.put(tmp_path / "a", "a", sha256="0" * 64)
    with pytest.raises(LocalFileError, match="No such file"):
        there.put(tmp_path / "b", "b")
    assert not list(there.list_objects())
    assert "Uploads" not in object_store.client().list_multipart_uploads(Bucket=object_store.bucket)


@pytest.mark.parametrize(
    ("variables", "said"),
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
    object_store: ObjectStore, place: Place, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    for name, value in variables.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(InputError) as raised:
        place().check()
    text = str(raised.value)
    assert said in text and text.startswith(f"s3://{object_store.bucket}/runs/one") and "\n" not in text
    assert "AWS_ACCESS_KEY_ID" in text or "AWS_ENDPOINT_URL_S3" in text
    for secret in (SECRET, "AKIAIOSFODNN7EXAMPLE", object_store.access_key, object_store.secret_key):
        assert secret not in text


@pytest.mark.parametrize(
    ("methods", "said"), [(("PUT",), "may not write"), (("GET",), "may not list"), (("POST",), "may not delete")]
)
def test_missing_permission_is_an_error(place: Place, proxy: FaultyProxy, methods: tuple[str, ...], said: str) -> None:
    proxy.answer(403, 99, methods)
    with pytest.raises(InputError, match=said) as raised:
        place(endpoint_url=proxy.url).check()
    assert "\n" not in str(raised.value) and "AWS_ACCESS_KEY_ID" in str(raised.value)


def test_missing_bucket_is_an_error(object_store: ObjectStore) -> None:
    with pytest.raises(InputError, match="there is no such bucket; create it, or name another"):
        S3Folder("s3://nowhere-at-all/runs").check()


@pytest.mark.parametrize(
    ("url", "endpoint", "said"),
    [
        ("s3://user:se/cret@bucket/runs", None, "holds a user or a password"),
        ("s3://bucket/runs", "https://user:se/cret@host", "holds a user or a password"),
        ("s3://Bucket", None, "must be s3://bucket"),
        ("https://bucket", None, "must be s3://bucket"),
        ("s3://bucket", "host:9000", "must be a URL"),
    ],
)
def test_invalid_url_is_an_error(url: str, endpoint: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        S3Folder(url, S3Options(endpoint_url=endpoint))
    assert "cret" not in str(raised.value)


def test_store_without_response_is_unreachable(place: Place, proxy: FaultyProxy) -> None:
    there = place(endpoint_url=proxy.url)
    proxy.answer(500, 99)
    with pytest.raises(StoreUnreachable):
        there.check()
    proxy.dead = True
    with pytest.raises(StoreUnreachable) as raised:
        there.check()
    assert "\n" not in str(raised.value)
    with pytest.raises(StoreUnreachable, match="Could not connect"):
        place(endpoint_url="http://127.0.0.1:9").check()


def test_upload_survives_errors_drops_and_a_stall(place: Place, proxy: FaultyProxy, tmp_path: Path) -> None:
    content, there = written(tmp_path / "a", LARGE), place(endpoint_url=proxy.url)
    proxy.answer(503, 5), proxy.drop(2), proxy.stall(8.0)

    def send(sender: BackgroundSender) -> None:
        sender.retry(there.put, tmp_path / "a", "a", retry=sender.retry)

    is_done, seconds = delivered(send)
    assert is_done and seconds < 60 and there.get("a") == content
    assert [proxy.done[fault] for fault in ("answer", "drop", "stall")] == [5, 2, 1]


def test_control_one_call_of_boto3_fails_after_five_errors(
    object_store: ObjectStore, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.answer(503, 5)
    with pytest.raises(ClientError, match="503"):
        object_store.client(proxy.url).put_object(Bucket=object_store.bucket, Key="a", Body=b"a")


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_flipped_byte_is_detected_and_sent_again(
    place: Place, proxy: FaultyProxy, tmp_path: Path, size: int, checksums: str
) -> None:
    content, there = written(tmp_path / "a", size), place(endpoint_url=proxy.url, checksums=checksums)
    proxy.flip()
    is_done, _ = delivered(lambda sender: sender.retry(there.put, tmp_path / "a", "a", retry=sender.retry))
    assert is_done and proxy.done["flip"] == 1 and there.get("a") == content
    assert proxy.requests["PUT"] <= (2 if size == SMALL else 4), "only the damaged part is sent again"


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_control_without_verification_a_flipped_byte_is_not_detected(
    place: Place, proxy: FaultyProxy, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, there = written(tmp_path / "a", size), place(endpoint_url=proxy.url, checksums="when_required")
    monkeypatch.setattr(remote, "_is_tag", lambda tag, expected: True)
    proxy.flip()
    there.put(tmp_path / "a", "a")
    assert there.get("a") != content


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_object_whose_etag_is_no_md5_is_downloaded_and_compared(
    place: Place, proxy: FaultyProxy, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, there = written(tmp_path / "a", size), place(endpoint_url=proxy.url, checksums="when_required")
    monkeypatch.setattr(remote, "_is_tag", lambda tag, expected: False)
    there.put(tmp_path / "a", "a")
    assert there.get("a") == content
    proxy.flip(2 if size == SMALL else 9)
    with pytest.raises(StoreError, match="arrived damaged; it was deleted there"):
        there.put(tmp_path / "a", "a")
    assert there.get("a") is None


def test_upload_that_the_store_aborted_starts_again(place: Place, tmp_path: Path) -> None:
    content, there = written(tmp_path / "a", 2 * LARGE), place()
    aborted: list[int] = []

    def moved(count: int) -> None:
        if count and not aborted:
            aborted.append(there.abort_uploads())

    is_done, _ = delivered(
        lambda sender: sender.retry(there.put, tmp_path / "a", "a", retry=sender.retry, on_progress=moved)
    )
    assert aborted == [1] and is_done and there.get("a") == content


@pytest.mark.parametrize("is_quiet", [True, False])
def test_token_is_not_logged_at_level_debug(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_quiet: bool
) -> None:
    """The control does not change the loggers of boto3."""
    for name in remote.VERBOSE_LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    if not is_quiet:
        monkeypatch.setattr(remote, "VERBOSE_LOGGERS", ())
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token-of-a-session")
    with caplog.at_level(logging.DEBUG), suppress(StoreError, InputError):
        place().put_bytes(b"1", "a")
    assert ("a-token-of-a-session" in caplog.text) != is_quiet


def test_only_unfinished_uploads_below_the_prefix_are_aborted(object_store: ObjectStore, place: Place) -> None:
    client, bucket = object_store.client(), object_store.bucket
    for key in ("runs/one/a", "runs/one/b/c", "runs/one-and-a-half", "runs/two/a"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    assert place().abort_uploads() == 2
    left = [upload["Key"] for upload in client.list_multipart_uploads(Bucket=bucket)["Uploads"]]
    assert sorted(left) == ["runs/one-and-a-half", "runs/two/a"]


def test_delete_superseded_keeps_three_of_many_checkpoints(object_store: ObjectStore, place: Place) -> None:
    there, client = place(), object_store.client(max_pool_connections=4)
    keys = [f"checkpoints/step_{step:08d}/{name}" for step in range(335) for name in ("a", "b", "manifest.json")]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=object_store.bucket, Key=f"runs/one/{key}"), keys))
    assert len(keys) == 1005 and len(list(there.list_objects())) == 1005
    page = client.list_objects_v2(Bucket=object_store.bucket)
    assert len(page["Contents"]) == 1000, "control: one page does not list them all"
    assert delete_superseded(there, "", 3, []) == {}
    left = {key.split("/")[1] for key, _ in there.list_objects()}
    assert left == {"step_00000332", "step_00000333", "step_00000334"} and len(list(there.list_objects())) == 9


MEMORY = r"""
import re, sys
from pathlib import Path
from wmtp.s3.client import S3Folder

def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

there, path = S3Folder(sys.argv[1]), Path(sys.argv[2])
there.put_bytes(b"warm", "warm")
before = peak()
there.put(path, "large")
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
    ours, naive = map(float, done.stdout.split())
    assert ours < 100 and naive > 200, (ours, naive)


def test_boto3_is_not_imported_for_local_checkpoints() -> None:
    modules = "wmtp.checkpoint.store, wmtp.s3.uploader, wmtp.s3.fetch"
    code = f"import sys, {modules}; print('boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n" and boto3.__name__ in sys.modules
