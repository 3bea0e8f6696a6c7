"""Tests of uploading a run's checkpoints to S3 through a faulty network."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.support.proxy import FaultyProxy
from tests.support.runs_in_s3 import MakeRun, RunInS3, step
from tests.support.servers import ObjectStore
from wmtp.checkpoint import store
from wmtp.checkpoint.manifest import find_damage
from wmtp.checkpoint.store import CheckpointStore
from wmtp.config.schema import ConfigIssue, build, iter_nodes, node_issues
from wmtp.errors import PendingError
from wmtp.runtime.locks import file_lock
from wmtp.s3.client import S3Folder
from wmtp.s3.layout import is_uploaded, mark_uploaded, pending_checkpoints
from wmtp.s3.uploader import LOCK, CheckpointUploader
from wmtp.training.uploads import open_uploaders

pytestmark = [
    pytest.mark.servers,
    pytest.mark.slow,
    pytest.mark.xdist_group("s3"),
    pytest.mark.usefixtures("s3_credentials"),
]
MEGABYTE = 250_000
"""Number of 4-byte values in one megabyte."""


@pytest.fixture
def make_run(object_store: ObjectStore, tmp_path: Path) -> MakeRun:
    def run(**options: Any) -> RunInS3:
        return RunInS3(tmp_path / "run", f"s3://{object_store.bucket}/runs/2026-11-21/one", **options)

    return run


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.02)


def test_newest_and_best_of_both_stages_are_uploaded(make_run: MakeRun) -> None:
    run = make_run()
    for number in (1, 2):
        run.save(number, stage="pretrain", best=1.0 if number == 1 else None)
    (run.folder / "pretrain" / "result.json").write_text(json.dumps({"saved": f"pretrain/checkpoints/{step(1)}"}))
    uploader = run.start_uploader()
    for number in range(1, 8):
        path = run.save(number, best=0.5 if number == 2 else None)
        wait_until(lambda path=path: is_uploaded(path, run.url))
    for name in ("summary.json", "train.log", "status.json", "evaluations"):
        (run.folder / name).write_text("{}")
    uploader.close("FINISHED")
    run.store.prune()
    assert run.remote_steps() == run.local_steps() == [step(2), step(6), step(7)]
    assert run.remote_steps("pretrain/") == [step(1), step(2)]
    kept = {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*") if path.is_file()}
    absent = {key for key in kept if key.endswith((".lock", "uploaded.json")) or key in ("status.json", "evaluations")}
    assert {key for key, _ in run.remote.list_objects()} == kept - absent
    for key in kept - absent:
        assert run.remote.get(key) == (run.folder / key).read_bytes(), key
    assert uploader.report.startswith("9 checkpoints and ") and uploader.report.endswith(f"sent to {run.url}")


def test_an_unchanged_run_is_not_sent_again(make_run: MakeRun, proxy: FaultyProxy) -> None:
    run = make_run(endpoint_url=proxy.url)
    run.save(1, best=0.5)
    run.upload_all()
    (
        run.folder / "checkpoints" / step(1) / "uploaded.json"
    ).unlink()  # as if the process was killed just before writing this file
    before = proxy.requests["PUT"]
    second_upload = run.upload_all()
    assert second_upload.checkpoints.sent == [] and proxy.requests["PUT"] == before
    assert second_upload.report == f"{run.url}: nothing was missing"
    assert (
        pending_checkpoints(run.folder, run.url, 2) == [] and pending_checkpoints(run.folder, run.url + "-b", 2) != []
    )


def test_manifest_is_visible_only_after_all_its_files(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run()
    problems: list[str] = []
    original = S3Folder.put_bytes

    def check_keys(self: S3Folder, data: bytes, key: str, *rest: Any) -> None:
        original(self, data, key, *rest)
        if key.endswith("/manifest.json"):
            keys = {key for key, _ in self.list_objects()}
            folder = key.rpartition("/")[0]
            required = {f"{folder}/{name}" for name in json.loads(data)["files"]} | {"config.yaml", "run.json"}
            last = json.loads((self.get("metrics.jsonl") or b"").splitlines()[-1])["step"]
            problems.extend([*(required - keys), *(["metrics"] if last < int(folder[-8:]) else [])])

    monkeypatch.setattr(S3Folder, "put_bytes", check_keys)
    uploader = run.start_uploader()
    for number in range(1, 5):
        path = run.save(number)
        wait_until(lambda path=path: is_uploaded(path, run.url))
    uploader.close("FINISHED")
    assert problems == [] and len(uploader.checkpoints.sent) == 4


def test_upload_survives_errors_drops_and_a_stall(make_run: MakeRun, proxy: FaultyProxy) -> None:
    run = make_run(endpoint_url=proxy.url)
    proxy.answer(503, 5), proxy.drop(2), proxy.stall(8.0)
    path = run.save(1, num_values=5 * MEGABYTE)
    started = time.monotonic()
    uploader = run.start_uploader(stall_seconds=30.0, close_seconds=60.0)
    assert time.monotonic() - started < 5, "training waited for the upload"  # the stall alone takes 8 s
    uploader.close("FINISHED")
    assert time.monotonic() - started < 60 and is_uploaded(path, run.url)
    assert (proxy.done["answer"], proxy.done["drop"], proxy.done["stall"]) == (5, 2, 1)


def test_checkpoints_are_uploaded_after_an_outage(
    make_run: MakeRun, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(endpoint_url=proxy.url)
    monkeypatch.chdir(run.folder.parent)
    proxy.dead = True
    uploader, started = run.start_uploader(stall_seconds=1.0), time.monotonic()
    for number in range(1, 6):
        run.save(number, best=0.5 if number == 2 else None)
    assert time.monotonic() - started < 5, "saving waited for the upload"
    with pytest.raises(PendingError) as raised:
        uploader.close("FINISHED")
    message = str(raised.value)
    assert message.startswith(f"0 of 3 checkpoints uploaded to {run.url} at {proxy.url}, the rest is in run: ")
    assert "`python -m wmtp.sync run`" in message and "\n" not in message
    run.store.prune()
    assert run.local_steps() == [step(number) for number in range(1, 6)]
    proxy.dead = False
    second_upload = run.upload_all()  # meanwhile, the thread of the first uploader ends
    assert len(second_upload.checkpoints.sent) == 3 and run.remote_steps() == [step(2), step(4), step(5)]
    run.store.prune()
    assert run.local_steps() == [step(2), step(4), step(5)]


def test_control_plain_store_deletes_checkpoints_before_their_upload(make_run: MakeRun, proxy: FaultyProxy) -> None:
    run = make_run(endpoint_url=proxy.url)
    proxy.dead = True
    run.store = CheckpointStore(run.folder, run.store.processes, keep_last=2)  # type: ignore[assignment]
    for number in range(1, 6):
        run.save(number)
    assert run.local_steps() == [step(4), step(5)]


@pytest.mark.parametrize("state", ["FINISHED", "KILLED"])
def test_close_respects_the_time_limit(make_run: MakeRun, proxy: FaultyProxy, state: str) -> None:
    run = make_run(endpoint_url=proxy.url)
    run.save(1)
    proxy.delay = 1.0
    started = time.monotonic()
    out = StringIO()
    uploader = run.start_uploader(close_seconds=2.0, console=Console(file=out))
    with pytest.raises(PendingError, match=r"0 of 1 checkpoints uploaded .* waiting ended before they were sent"):
        uploader.close(state)
    assert time.monotonic() - started < 4
    assert "uploading to" in out.getvalue() and "done" not in out.getvalue()
    proxy.delay = 0.0
    run.upload_all(is_training=False, close_seconds=0.001)
    assert run.remote_steps() == [step(1)], "the time limit applied without training"


def test_a_slow_store_gets_the_newest_and_the_best_checkpoint(make_run: MakeRun, proxy: FaultyProxy) -> None:
    run = make_run(endpoint_url=proxy.url)
    proxy.delay = 0.05
    uploader = run.start_uploader()
    for number in range(1, 7):
        run.save(number, best=0.5 if number == 3 else None)
        time.sleep(0.05)
    uploader.close("FINISHED")
    run.store.prune()
    assert run.remote_steps() == run.local_steps() == [step(3), step(5), step(6)]


def test_three_checkpoints_remain_after_slow_uploads_and_a_failed_removal(
    make_run: MakeRun, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(endpoint_url=proxy.url)
    original = shutil.rmtree
    failed: list[str] = []

    def fail_once(path: Path, *arguments: Any, **options: Any) -> None:
        if step(3) in str(path) and not failed:
            failed.append(str(path))
            raise OSError(16, "Device or resource busy")
        original(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", fail_once)
    proxy.delay = 0.02
    proxy.answer(403, 1, ("POST",))  # the first removal in S3
    uploader = run.start_uploader()
    for number in range(1, 8):
        path = run.save(number, best=0.5 if number == 2 else None)
        assert run.local_steps()[-1] == step(number)
        assert run.store.best() is None or (run.store.best() or path).name == step(2)
        waiting = set(pending_checkpoints(run.folder, run.url, 2))
        assert all(path.exists() for path in waiting), "a pending checkpoint was deleted"
        if number % 2:
            wait_until(lambda: not pending_checkpoints(run.folder, run.url, 2))
    uploader.close("FINISHED")
    run.store.prune()
    assert run.local_steps() == run.remote_steps() == [step(2), step(6), step(7)] and not run.incomplete_steps()
    assert not list(run.store.folder.glob(".removed-*"))
    assert "superseded checkpoints cannot be deleted yet" in caplog.text
    assert "tried again after the next save" in caplog.text


def test_pending_checkpoint_is_deleted_if_the_disk_is_nearly_full(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run()
    for number in range(1, 5):
        run.save(number, best=0.5 if number == 1 else None)
    assert run.local_steps() == [step(number) for number in range(1, 5)]
    usage = shutil.disk_usage(run.folder)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage._replace(free=9000))  # saving needs 2 × 5 kB
    run.save(5)
    assert run.local_steps() == [step(number) for number in (1, 3, 4, 5)] and "the disk is nearly full" in caplog.text
    monkeypatch.undo()


def test_damaged_checkpoint_is_not_uploaded(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run(keep_last=1)
    run.save(1)
    damaged = run.save(2)
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    run.upload_all()
    assert run.remote_steps() == [step(1)] and not run.incomplete_steps()
    assert f"{damaged} is damaged and is not uploaded" in caplog.text and not is_uploaded(damaged, run.url)


def test_checkpoints_may_be_written_and_deleted_during_uploads(make_run: MakeRun, proxy: FaultyProxy) -> None:
    run = make_run(endpoint_url=proxy.url, keep_last=1)
    proxy.delay = 0.01
    uploader = run.start_uploader()
    for number in range(60):
        path = run.save(1 + number % 3)
        if number % 7 == 3:
            shutil.rmtree(path, ignore_errors=True)
    last = run.save(9)
    uploader.close("FINISHED")
    assert run.remote_steps() == [step(9)] and is_uploaded(last, run.url) and not run.incomplete_steps()


def test_new_checkpoint_of_the_same_step_replaces_the_old_one(make_run: MakeRun) -> None:
    run = make_run()
    run.save(1)
    run.upload_all()
    shutil.rmtree(run.folder / "checkpoints")
    path = run.save(1, num_values=2000)
    run.upload_all()
    for name in ("manifest.json", *json.loads((path / "manifest.json").read_text())["files"]):
        assert run.remote.get(f"checkpoints/{step(1)}/{name}") == (path / name).read_bytes()


def test_incomplete_checkpoint_in_s3_is_deleted(make_run: MakeRun) -> None:
    run = make_run()
    run.remote.put_bytes(b"half", f"checkpoints/{step(1)}/model.safetensors")
    run.save(2)
    run.upload_all()
    assert run.remote_steps() == [step(2)] and not run.incomplete_steps()


def test_file_with_flipped_byte_is_sent_again(make_run: MakeRun, proxy: FaultyProxy, tmp_path: Path) -> None:
    run = make_run(endpoint_url=proxy.url, checksums="when_required")
    proxy.flip(1)
    path = run.save(1, num_values=MEGABYTE)
    run.upload_all()
    assert proxy.done["flip"] == 1
    for name in json.loads((path / "manifest.json").read_text())["files"]:
        (tmp_path / name).write_bytes(run.remote.get(f"checkpoints/{step(1)}/{name}") or b"")
    shutil.copy(path / "manifest.json", tmp_path)
    assert find_damage(tmp_path) is None


SENDER = """
import sys
from pathlib import Path
from wmtp.s3.uploader import CheckpointUploader
from wmtp.s3.options import S3Settings
settings = S3Settings(url="s3://unused", stall_seconds=30, close_seconds=60)
CheckpointUploader(Path(sys.argv[1]), sys.argv[2], settings, 2).close("FINISHED")
"""


def test_killed_uploader_leaves_no_visible_checkpoint(
    make_run: MakeRun, proxy: FaultyProxy, object_store: ObjectStore
) -> None:
    run = make_run()
    run.save(1)
    run.upload_all()
    latest = run.save(2, num_values=10 * MEGABYTE)
    proxy.delay = 0.2
    process = subprocess.Popen(
        [sys.executable, "-c", SENDER, str(run.folder), run.url], env=os.environ | object_store.environment(proxy.url)
    )
    try:
        client = object_store.client()
        wait_until(lambda: "Uploads" in client.list_multipart_uploads(Bucket=object_store.bucket), 60)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert "Uploads" in client.list_multipart_uploads(Bucket=object_store.bucket), (
        "the control: there is no unfinished upload in the store"
    )
    assert run.remote_steps() == [step(1)] and json.loads(run.remote.get("checkpoints/latest.json") or b"")["step"] == 1
    run.upload_all()
    assert "Uploads" not in client.list_multipart_uploads(Bucket=object_store.bucket)
    assert run.remote_steps() == [step(1), step(2)] and is_uploaded(latest, run.url)
    assert json.loads(run.remote.get("checkpoints/latest.json") or b"")["step"] == 2


def test_only_one_process_uploads_a_run(make_run: MakeRun, caplog: pytest.LogCaptureFixture) -> None:
    run = make_run()
    run.save(1)
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with file_lock(run.folder / LOCK):
            taken.set()
            done.wait()

    threading.Thread(target=hold).start()
    taken.wait()
    try:
        assert "another process is still uploading this run" in run.pending(close_seconds=1.0)
        assert run.remote_steps() == [] and "another process is uploading this run; waiting for it" in caplog.text
        uploader = run.start_uploader()
    finally:
        done.set()
    uploader.close("FINISHED")
    assert run.remote_steps() == [step(1)]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_close_prints_the_progress(make_run: MakeRun, proxy: FaultyProxy, is_terminal: bool) -> None:
    run = make_run(endpoint_url=proxy.url)
    run.save(1)
    proxy.delay = 0.1
    out = StringIO()
    run.upload_all(console=Console(file=out, force_terminal=is_terminal, width=200))
    message = out.getvalue()
    assert f"uploading to {run.url}" in message and (not is_terminal or "step_00000001" in message)
    assert ("\x1b[" in message) == is_terminal and (is_terminal or message.count("\n") == 2)


def test_the_final_message_contains_the_error_of_the_store(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    run = make_run()
    run.save(1)
    message = run.pending()
    assert "does not accept the keys (SignatureDoesNotMatch)" in message and "wrong-secret" not in message


def config_errors(compose: Any, *overrides: str) -> list[ConfigIssue]:
    nodes = iter_nodes(compose("checkpoint=s3", *overrides))
    return [issue for key, node in nodes if key.startswith("checkpoint") for issue in node_issues(node, key)]


def test_config_errors_are_reported(compose: Any) -> None:
    assert [str(error) for error in config_errors(compose)] == [
        "checkpoint.s3.url: missing; set it with checkpoint.s3.url=…"
    ]
    assert config_errors(compose, "checkpoint.s3.url=s3://bucket/runs/") == []
    for override, message in {
        "checkpoint.s3.url=bucket/runs": "must be s3://bucket or s3://bucket/prefix",
        "checkpoint.s3.url='s3://user:topsecret@bucket'": "holds a user or a password",
        "checkpoint.s3.endpoint_url='https://user:topsecret@host'": "holds a user or a password",
        "checkpoint.s3.addressing_style=host": "must be 'auto', 'path' or 'virtual'",
        "checkpoint.s3.stall_seconds=0": "greater than 0",
        "checkpoint.remote=s3://bucket/runs": "checkpoint.remote=s3://bucket/runs: unknown key; did you mean "
        "checkpoint.s3.url?",
        "checkpoint.endpoint_url=http://host": "unknown key; did you mean checkpoint.s3.endpoint_url?",
    }.items():
        url = [] if "s3.url" in override else ["checkpoint.s3.url=s3://bucket"]
        text = "\n".join(map(str, config_errors(compose, *url, override)))
        assert message in text and "topsecret" not in text


def test_config_builds_store_and_uploader(make_run: MakeRun, compose: Any) -> None:
    run = make_run()
    options = ["tracking=none", "checkpoint=s3", f"checkpoint.s3.url={run.settings.url}", "checkpoint.keep_last=3"]
    config = compose(*options, "checkpoint.s3.stall_seconds=7")
    built = build(config.checkpoint, folder=run.folder)
    (uploader,) = open_uploaders(config, run.folder, Console(quiet=True), is_training=True)
    assert isinstance(uploader, CheckpointUploader)
    uploader.close("FINISHED")
    assert built.keep_last == uploader.checkpoints.keep_last == 3 and built.s3 == uploader.settings
    assert uploader.remote.url == run.url and uploader.settings.stall_seconds == 7


def test_checkpoint_uploaded_to_another_url_counts_as_not_uploaded(make_run: MakeRun) -> None:
    """A checkpoint that was uploaded to another bucket is kept, because it is not in this one."""
    run = make_run()
    for number in range(1, 6):
        mark_uploaded(run.save(number), "s3://another/prefix/run")
    run.store.prune()
    assert run.local_steps() == [step(number) for number in (1, 2, 3, 4, 5)]
    for number in (4, 5):
        mark_uploaded(run.store.folder / step(number), run.url)
    run.store.prune()
    assert run.local_steps() == [step(4), step(5)]
