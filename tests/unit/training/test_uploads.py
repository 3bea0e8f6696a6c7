"""Test the servers that a run is uploaded to, and when they or an existing copy reject it."""

import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from tests.conftest import composed
from tests.support.servers import ObjectStore
from wmtp.errors import InputError, InterruptedRun, PendingError
from wmtp.runtime.signals import interrupt_error
from wmtp.s3.client import S3Folder
from wmtp.training import uploads
from wmtp.training.provenance import write_run_id
from wmtp.training.uploads import RemoteIsAhead, check_servers, close_all, require_same_run


class Interrupted:
    """An uploader whose wait is interrupted."""

    server, report = "the server", ""

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None: ...

    def close(self, state: str) -> None:
        raise interrupt_error(signal.SIGINT)

    def unsent(self) -> str:
        return "1 of 2 uploaded"


def test_interrupted_wait_leaves_pending_data_and_a_finished_run() -> None:
    """The control is a run that did not finish: there an interruption is one."""
    problems = close_all([Interrupted(), Interrupted()], "FINISHED")
    assert [str(problem) for problem in problems] == ["1 of 2 uploaded"] * 2
    assert all(isinstance(problem, PendingError) for problem in problems)
    with pytest.raises(InterruptedRun):
        close_all([Interrupted()], "FAILED")


@pytest.mark.parametrize("is_down", [True, False])
def test_pending_data_is_sent_with_short_timeouts_only_if_a_server_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_down: bool
) -> None:
    """The short timeouts are not logged as parameters of the run."""
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(composed("tracking.stall_seconds=30"), resolve=True))
    made: list[tuple[float, object]] = []

    class Told(Interrupted):
        def close(self, state: str) -> None: ...

    def build(node: DictConfig, kind: type, **about: Any) -> Told:
        made.append((node.stall_seconds, about["parameters"]["tracking.stall_seconds"]))
        return Told()

    monkeypatch.setattr(uploads, "build", build)
    monkeypatch.setattr(uploads, "_prune", lambda config, folder: None)
    monkeypatch.setattr(uploads, "check_servers", lambda config, folder: ["is down"] if is_down else [])
    uploads.send_pending(tmp_path, "FINISHED")
    ((seconds, parameter),) = made
    assert seconds == (5 if is_down else 30) and float(str(parameter)) == 30


def checkpoint(folder: Path, step: int, stage: str = "") -> None:
    """A folder that looks like a checkpoint."""
    path = folder / stage / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "manifest.json").write_text("{}")


@pytest.fixture
def place(object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Folder:
    """The S3 URL of the run in `tmp_path/run`."""
    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run").mkdir()
    return S3Folder(f"s3://{object_store.bucket}/prefix/run")


@pytest.mark.servers
@pytest.mark.slow
@pytest.mark.xdist_group("servers")
def test_url_of_another_run_is_rejected(place: S3Folder, tmp_path: Path) -> None:
    """The control is the same run's."""
    folder = tmp_path / "run"
    config = composed("checkpoint=s3", f"checkpoint.remote=s3://{place.bucket}/prefix", "tracking=none")
    assert check_servers(config, folder) == []
    write_run_id(folder, f"s3://{place.bucket}/prefix")
    place.put(folder / "run.json", "run.json")
    assert check_servers(config, folder) == []

    (folder / "run.json").unlink()
    with pytest.raises(InputError, match=r"holds another run; name another folder \(hydra.run.dir\) or remote"):
        check_servers(config, folder)
    assert [key for key, _ in place.list_objects()] == ["run.json"], "what was written to see whether it can be is gone"


@pytest.mark.servers
@pytest.mark.slow
@pytest.mark.xdist_group("servers")
@pytest.mark.parametrize(
    ("here", "there", "is_behind"),
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
def test_folder_behind_its_copy_is_reported(
    place: S3Folder, tmp_path: Path, here: dict[str, int], there: dict[str, int], is_behind: bool
) -> None:
    folder = tmp_path / "run"
    for stage, step in here.items():
        checkpoint(folder, step, stage)
    for stage, step in there.items():
        place.put_bytes(b"{}", f"{stage}/checkpoints/step_{step:08d}/manifest.json".lstrip("/"))
    if is_behind:
        with pytest.raises(RemoteIsAhead, match=rf"continue it with resume={place.url}"):
            require_same_run(place, folder, None)
    else:
        require_same_run(place, folder, None)


@pytest.mark.servers
@pytest.mark.slow
@pytest.mark.xdist_group("servers")
@pytest.mark.parametrize("says", ["nothing", "a web page"])
def test_server_that_is_not_a_store(
    place: S3Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    """A server that does not answer is a warning after ten seconds; one with a different answer is an invalid input."""
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 4\r\n\r\n<a/>"

    def answer(server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = server.accept()
                connection.recv(100_000)
                connection.sendall(page)
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        if says != "nothing":
            threading.Thread(target=answer, args=(server,), daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        own = ["checkpoint=s3", "checkpoint.remote=s3://bucket/prefix", f"checkpoint.endpoint_url={endpoint}"]
        config, started = composed(*own, "tracking=none"), time.monotonic()
        if says == "nothing":
            (problem,) = check_servers(config, tmp_path / "run")
            assert "did not answer within 10 s" in problem and time.monotonic() - started < 15
        else:
            with pytest.raises(InputError, match="does not answer as an S3 store does"):
                check_servers(config, tmp_path / "run")
