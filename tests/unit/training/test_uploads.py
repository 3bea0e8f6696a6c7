"""Tests of closing uploads, and of the checks of servers and of an existing copy before a run."""

import json
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from tests.conftest import compose_config
from tests.support.servers import ObjectStore
from wmtp.errors import InputError, InterruptedRun, PendingError
from wmtp.runtime.signals import interrupt_error
from wmtp.s3.client import S3Folder
from wmtp.training import uploads
from wmtp.training.provenance import write_run_id
from wmtp.training.uploads import RemoteIsAhead, check_servers, close_all, require_same_run


class InterruptedUploader:
    """An uploader whose `close` is interrupted."""

    server, report = "the server", ""

    def close(self, state: str) -> None:
        raise interrupt_error(signal.SIGINT)

    def unsent(self) -> str:
        return "1 of 2 uploaded"


def test_an_interrupted_wait_for_uploads_does_not_fail_a_finished_run() -> None:
    """The control is a failed run, for which the interruption is raised."""
    problems = close_all([InterruptedUploader(), InterruptedUploader()], "FINISHED")
    assert [str(problem) for problem in problems] == ["1 of 2 uploaded"] * 2
    assert all(isinstance(problem, PendingError) for problem in problems)
    with pytest.raises(InterruptedRun):
        close_all([InterruptedUploader()], "FAILED")


@pytest.mark.parametrize("is_down", [True, False])
def test_pending_data_is_sent_with_short_timeouts_only_if_a_server_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_down: bool
) -> None:
    """The short timeouts are not logged as parameters of the run."""
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(compose_config("tracking.stall_seconds=30"), resolve=True))
    built: list[tuple[float, object]] = []

    class SilentUploader(InterruptedUploader):
        def close(self, state: str) -> None: ...

    def build(node: DictConfig, kind: type, **about: Any) -> SilentUploader:
        built.append((node.stall_seconds, about["parameters"]["tracking.stall_seconds"]))
        return SilentUploader()

    monkeypatch.setattr(uploads, "build", build)
    monkeypatch.setattr(uploads, "_prune", lambda config, folder: None)
    monkeypatch.setattr(uploads, "check_servers", lambda config, folder: ["is down"] if is_down else [])
    uploads.send_pending(tmp_path, "FINISHED")
    ((seconds, parameter),) = built
    assert seconds == (5 if is_down else 30) and float(str(parameter)) == 30


def test_a_run_is_uploaded_only_below_the_url_in_its_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run.json of a copied run may name the folder of another run. `check_servers` examines the other URL."""
    urls: list[str] = []
    monkeypatch.setattr(uploads, "CheckpointUploader", lambda folder, url, *_: urls.append(url))
    config = compose_config("tracking=none", "checkpoint=s3", "checkpoint.s3.url=s3://bucket/runs")
    for remote in ("s3://bucket/runs/mine", "s3://other/runs/theirs"):
        (tmp_path / "run.json").write_text(json.dumps({"id": "a", "remote": remote}))
        uploads.open_uploaders(config, tmp_path, Console(), is_training=False)
    assert urls == ["s3://bucket/runs/mine", f"s3://bucket/runs/{tmp_path.name}"]


def checkpoint(folder: Path, step: int, stage: str = "") -> None:
    """Create a folder with the manifest of a checkpoint."""
    path = folder / stage / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")


@pytest.fixture
def remote(object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Folder:
    """Return the S3 folder of the run in `tmp_path/run`."""
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run").mkdir()
    return S3Folder(f"s3://{object_store.bucket}/prefix/run")


@pytest.mark.servers
@pytest.mark.slow
@pytest.mark.xdist_group("s3")
def test_the_url_of_another_run_is_rejected(remote: S3Folder, tmp_path: Path) -> None:
    """The control is the URL of the same run."""
    folder = tmp_path / "run"
    config = compose_config("checkpoint=s3", f"checkpoint.s3.url=s3://{remote.bucket}/prefix", "tracking=none")
    assert check_servers(config, folder) == []
    write_run_id(folder, f"s3://{remote.bucket}/prefix")
    remote.put(folder / "run.json", "run.json")
    assert check_servers(config, folder) == []

    (folder / "run.json").unlink()
    with pytest.raises(InputError, match=r"holds another run; name another folder \(hydra.run.dir\) or URL"):
        check_servers(config, folder)
    assert [key for key, _ in remote.list_objects()] == ["run.json"], "the object of the write check was not deleted"


@pytest.mark.servers
@pytest.mark.slow
@pytest.mark.xdist_group("s3")
@pytest.mark.parametrize(
    ("local_steps", "remote_steps", "is_behind"),
    [
        ({}, {}, False),
        ({"": 10}, {"": 10}, False),
        ({"": 20}, {"": 10}, False),
        ({"": 10}, {"": 20}, True),
        ({"pretrain": 10}, {"pretrain": 20}, True),
        ({"pretrain": 10}, {"pretrain": 10, "": 5}, True),
        ({"pretrain": 10, "": 5}, {"pretrain": 20}, False),
    ],
)
def test_a_folder_behind_its_copy_is_reported(
    remote: S3Folder, tmp_path: Path, local_steps: dict[str, int], remote_steps: dict[str, int], is_behind: bool
) -> None:
    folder = tmp_path / "run"
    for stage, step in local_steps.items():
        checkpoint(folder, step, stage)
    for stage, step in remote_steps.items():
        remote.put_bytes(b"{}", f"{stage}/checkpoints/step_{step:08d}/manifest.json".lstrip("/"))
    if is_behind:
        with pytest.raises(RemoteIsAhead, match=rf"continue it with resume={remote.url}"):
            require_same_run(remote, folder, None)
    else:
        require_same_run(remote, folder, None)


@pytest.mark.servers
@pytest.mark.slow
@pytest.mark.xdist_group("s3")
@pytest.mark.parametrize("response", ["nothing", "a web page"])
def test_a_server_that_is_not_an_s3_store_is_a_warning_or_an_error(
    remote: S3Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, response: str
) -> None:
    """A server without any response is a warning after ten seconds; one with another response is an input error."""
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n<a/>"

    def answer(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                connection.recv(100_000)
                connection.sendall(page)
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        if response != "nothing":
            threading.Thread(target=answer, args=(server,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        overrides = ["checkpoint=s3", "checkpoint.s3.url=s3://bucket/prefix", f"checkpoint.s3.endpoint_url={endpoint}"]
        config, started = compose_config(*overrides, "tracking=none"), time.monotonic()
        if response == "nothing":
            (problem,) = check_servers(config, tmp_path / "run")
            assert "did not answer within 10 s" in problem and time.monotonic() - started < 15
        else:
            with pytest.raises(InputError, match="does not answer as an S3 store does"):
                check_servers(config, tmp_path / "run")
