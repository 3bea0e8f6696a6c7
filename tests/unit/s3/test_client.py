"""A folder in a bucket, against a real store and through a faulty network."""

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
from wmtp.runtime.background import Courier
from wmtp.s3 import client as remote
from wmtp.s3.client import LocalProblem, S3Folder, S3Options, StoreError, StoreUnreachable
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


def delivered(call: Callable[[Courier], object]) -> tuple[bool, float]:
    """Whether a courier got something done, and how long it took."""
    began = time.monotonic()
    courier = Courier("the store", lambda: call(courier) and None)
    courier.start()
    for _ in courier.finish(patience=60, limit=60):
        pass
    return courier.is_done, time.monotonic() - began


@pytest.mark.parametrize("size", [0, SMALL, LARGE])
@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_what_was_put_is_there(place: Place, tmp_path: Path, size: int, checksums: str) -> None:
    content, there = written(tmp_path / "a", size), place(checksums=checksums)
    moved: list[int] = []
    there.put(tmp_path / "a", "folder/a file, ünd more", sha256=hashlib.sha256(content).hexdigest(), moved=moved.append)
    assert sum(moved) == size and list(there.listed()) == [("folder/a file, ünd more", size)]
    assert there.get("folder/a file, ünd more") == content and there.get("folder/a") is None
    (tmp_path / "b").write_bytes(content[:1000])
    got = there.download("folder/a file, ünd more", tmp_path / "b", size)
    assert got == hashlib.sha256(content).hexdigest() and (tmp_path / "b").read_bytes() == content
    assert there.delete(["folder/a file, ünd more", "never there"]) == {} and not list(there.listed())


def test_a_folder_is_checked_and_left_as_it_was(place: Place) -> None:
    there = place()
    there.check()
    assert not list(there.listed())


def test_a_file_that_is_not_what_it_should_be_is_never_seen(
    object_store: ObjectStore, place: Place, tmp_path: Path
) -> None:
    there = place()
    for size in (SMALL, LARGE):
        written(tmp_path / "a", size)
        with pytest.raises(LocalProblem, match="does not have the content that was written"):
            there.put(tmp_path / "a", "a", sha256="0" * 64)
    with pytest.raises(LocalProblem, match="No such file"):
        there.put(tmp_path / "b", "b")
    assert not list(there.listed())
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
def test_keys_that_do_not_fit_are_a_fault_in_one_line(
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
def test_what_the_keys_may_not_do_is_a_fault(
    place: Place, proxy: FaultyProxy, methods: tuple[str, ...], said: str
) -> None:
    proxy.answer(403, 99, methods)
    with pytest.raises(InputError, match=said) as raised:
        place(endpoint_url=proxy.url).check()
    assert "\n" not in str(raised.value) and "AWS_ACCESS_KEY_ID" in str(raised.value)


def test_a_bucket_that_is_not_there_is_a_fault(object_store: ObjectStore) -> None:
    with pytest.raises(InputError, match="there is no such bucket; create it, or name another"):
        S3Folder("s3://nowhere-at-all/runs").check()


@pytest.mark.parametrize(
    ("url", "endpoint", "said"),
    [
        ("s3://user:se/cret@bucket/runs", None, "holds a user or a password"),
        ("s3://bucket/runs", "https://user:se/cret@host", "holds a user or a password"),
        ("s3://Bucket", None, "must be s3://bucket"),
        ("https://bucket", None, "must be s3://bucket"),
        ("s3://bucket", "host:9000", "must be an address"),
    ],
)
def test_an_address_that_is_none_is_a_fault(url: str, endpoint: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        S3Folder(url, S3Options(endpoint_url=endpoint))
    assert "cret" not in str(raised.value)


def test_a_store_that_does_not_answer_is_unreachable(place: Place, proxy: FaultyProxy) -> None:
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


def test_errors_drops_and_a_stall_are_survived(place: Place, proxy: FaultyProxy, tmp_path: Path) -> None:
    content, there = written(tmp_path / "a", LARGE), place(endpoint_url=proxy.url)
    proxy.answer(503, 5), proxy.drop(2), proxy.stall(8.0)

    def send(courier: Courier) -> None:
        courier.retried(there.put, tmp_path / "a", "a", attempt=courier.retried)

    is_done, seconds = delivered(send)
    assert is_done and seconds < 60 and there.get("a") == content
    assert [proxy.done[fault] for fault in ("answer", "drop", "stall")] == [5, 2, 1]


def test_control_one_call_of_boto3_does_not_survive_five_errors(
    object_store: ObjectStore, proxy: FaultyProxy, tmp_path: Path
) -> None:
    proxy.answer(503, 5)
    with pytest.raises(ClientError, match="503"):
        object_store.client(proxy.url).put_object(Bucket=object_store.bucket, Key="a", Body=b"a")


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("checksums", ["when_supported", "when_required"])
def test_a_byte_that_was_flipped_on_the_way_is_found(
    place: Place, proxy: FaultyProxy, tmp_path: Path, size: int, checksums: str
) -> None:
    content, there = written(tmp_path / "a", size), place(endpoint_url=proxy.url, checksums=checksums)
    proxy.flip()
    is_done, _ = delivered(lambda courier: courier.retried(there.put, tmp_path / "a", "a", attempt=courier.retried))
    assert is_done and proxy.done["flip"] == 1 and there.get("a") == content
    assert proxy.requests["PUT"] <= (2 if size == SMALL else 4), "no more was sent again than the damaged part"


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_control_without_the_comparison_a_flip_is_not_noticed(
    place: Place, proxy: FaultyProxy, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, there = written(tmp_path / "a", size), place(endpoint_url=proxy.url, checksums="when_required")
    monkeypatch.setattr(remote, "_is_tag", lambda tag, expected: True)
    proxy.flip()
    there.put(tmp_path / "a", "a")
    assert there.get("a") != content


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_an_object_with_a_tag_that_says_nothing_is_read_back(
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


def test_an_upload_that_the_store_forgot_begins_anew(place: Place, tmp_path: Path) -> None:
    content, there = written(tmp_path / "a", 2 * LARGE), place()
    forgotten: list[int] = []

    def moved(count: int) -> None:
        if count and not forgotten:
            forgotten.append(there.abort_uploads())

    is_done, _ = delivered(
        lambda courier: courier.retried(there.put, tmp_path / "a", "a", attempt=courier.retried, moved=moved)
    )
    assert forgotten == [1] and is_done and there.get("a") == content


@pytest.mark.parametrize("is_quiet", [True, False])
def test_a_token_is_not_logged_though_everything_is(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_quiet: bool
) -> None:
    """The control leaves boto3's loggers as they are."""
    for name in remote.TELLING:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    if not is_quiet:
        monkeypatch.setattr(remote, "TELLING", ())
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-token-of-a-session")
    with caplog.at_level(logging.DEBUG), suppress(StoreError, InputError):
        place().put_bytes(b"1", "a")
    assert ("a-token-of-a-session" in caplog.text) != is_quiet


def test_only_unfinished_uploads_below_the_folder_are_given_up(object_store: ObjectStore, place: Place) -> None:
    client, bucket = object_store.client(), object_store.bucket
    for key in ("runs/one/a", "runs/one/b/c", "runs/one-and-a-half", "runs/two/a"):
        client.create_multipart_upload(Bucket=bucket, Key=key)
    assert place().abort_uploads() == 2
    left = [upload["Key"] for upload in client.list_multipart_uploads(Bucket=bucket)["Uploads"]]
    assert sorted(left) == ["runs/one-and-a-half", "runs/two/a"]


def test_of_any_number_of_checkpoints_three_stay(object_store: ObjectStore, place: Place) -> None:
    there, client = place(), object_store.client(max_pool_connections=4)
    keys = [f"checkpoints/step_{step:08d}/{name}" for step in range(335) for name in ("a", "b", "manifest.json")]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: client.put_object(Bucket=object_store.bucket, Key=f"runs/one/{key}"), keys))
    assert len(keys) == 1005 and len(list(there.listed())) == 1005
    page = client.list_objects_v2(Bucket=object_store.bucket)
    assert len(page["Contents"]) == 1000, "control: one page does not hold them"
    assert delete_superseded(there, "", 3, []) == {}
    left = {key.split("/")[1] for key, _ in there.listed()}
    assert left == {"step_00000332", "step_00000333", "step_00000334"} and len(list(there.listed())) == 9


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


def test_whoever_keeps_checkpoints_here_does_without_boto3() -> None:
    modules = "wmtp.checkpoint.store, wmtp.s3.uploader, wmtp.s3.fetch"
    code = f"import sys, {modules}; print('boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "False\n" and boto3.__name__ in sys.modules
