"""Tests of the tracker with a real server that requires a password, and of many processes with one new local store."""

import http.server
import itertools
import json
import logging
import math
import multiprocessing
import os
import signal
import socket
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.dbmodels.initial_models import Base as InitialBase
from sqlalchemy import event

from tests.support.forking import fork
from tests.support.proxy import FaultyProxy
from tests.support.servers import ObjectStore, TrackingServer
from wmtp.errors import InputError, PendingError
from wmtp.runtime.destinations import remember_destinations
from wmtp.runtime.run_dir import SWEEP
from wmtp.tracking.jsonl import MetricsFile
from wmtp.tracking.mlflow import (
    MlflowTracker,
    ServerUnreachable,
    check_server,
    end_sweep,
    move_credentials,
    send_pending,
)

pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.xdist_group("servers")]
Log = Callable[[int, dict[str, float]], None]


@pytest.fixture
def server(tracking_server: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> TrackingServer:
    """Return the server, after setting the environment variables with its address and credentials."""
    for name, value in tracking_server.environment().items():
        monkeypatch.setenv(name, value)
    return tracking_server


@pytest.fixture
def reader(server: TrackingServer) -> MlflowClient:
    return MlflowClient(tracking_uri=server.uri)


def make_run(folder: Path, **content: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    run = {"id": uuid4().hex, "remote": None}
    for name, text in ({"run.json": json.dumps(run)} | content).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def start(folder: Path, parameters: dict[str, object] | None = None, **settings: Any) -> MlflowTracker:
    settings = {"poll_seconds": 0.05, "experiment": "tests", "system_seconds": None} | settings
    return MlflowTracker(folder, folder.name, parameters or {}, {}, **settings)


def start_logging(folder: Path, tracker: MlflowTracker, resume_step: int = 0) -> tuple[MetricsFile, Log]:
    file = MetricsFile(folder, resume_step)

    def log(step: int, metrics: dict[str, float]) -> None:
        file.log(step, 0, metrics)
        tracker.log(step, 0, metrics)

    return file, log


def sync_state(folder: Path) -> Any:
    return json.loads((folder / "mlflow.json").read_text())


def steps(client: MlflowClient, run_id: str, name: str) -> list[int]:
    return sorted(metric.step for metric in client.get_metric_history(run_id, name))


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_run_and_its_artifacts_reach_the_server_and_no_password_is_written(
    server: TrackingServer, object_store: ObjectStore, reader: MlflowClient, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.client().tracking_uri)  # with user and password
    monkeypatch.delenv("MLFLOW_TRACKING_USERNAME")
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    move_credentials()
    assert os.environ["MLFLOW_TRACKING_URI"] == server.uri
    best = {"folder": "step_00000002", "step": 2, "val/loss": 0.5}
    data = {
        "name": "tasks",
        "fingerprint": "f" * 64,
        "tokenizer": "t" * 64,
        "source": "tasks",
        "train": 8,
        "validation": 2,
    }
    folder = make_run(
        tmp_path / "outputs" / "whole", **{"config.yaml": "seed: 0", "pretrain/result.json": "{}"},
        **{"checkpoints/best.json": json.dumps(best), "checkpoints/step_00000002/manifest.json": "{}"},
        **{"checkpoints/step_00000002/model.safetensors": "x" * 100_000},
        **{"provenance.json": json.dumps({"git_revision": "abc", "data": data})},
    )  # fmt: skip
    tracker = start(folder, {"lr": 0.1}, system_seconds=0.2)
    file, log = start_logging(folder, tracker)
    for step in range(1, 101):
        log(step, {"train/loss": 1 / step, "train/bad": math.inf if step == 3 else 0.0})
    time.sleep(0.5)
    file.close("FINISHED")
    tracker.close("FINISHED")

    assert tracker.uri == server.uri
    assert tracker.report.startswith("MLflow: 1") and tracker.report.endswith("status FINISHED, 5 artifacts")
    run_id = sync_state(folder)["run_id"]
    run = reader.get_run(run_id)
    assert steps(reader, run_id, "train/loss") == list(range(1, 101))
    assert (run.info.status, run.data.params) == ("FINISHED", {"lr": "0.1"})
    assert run.data.metrics["nonfinite"] == 1.0 and run.data.metrics["best/val_loss"] == 0.5
    assert "system/cpu_utilization_percentage" in run.data.metrics and len(run.inputs.dataset_inputs) == 2
    paths = {file.path for file in reader.list_artifacts(run_id, "checkpoints/step_00000002")}
    assert paths == {f"checkpoints/step_00000002/{name}" for name in ("manifest.json", "model.safetensors")}
    assert reader.download_artifacts(run_id, "config.yaml", str(tmp_path))
    assert (tmp_path / "config.yaml").read_text() == "seed: 0"
    buckets = [bucket["Name"] for bucket in object_store.client().list_buckets()["Buckets"]]
    kept = [key for bucket in buckets for key in object_store.keys(bucket) if run_id in key]
    assert any(key.endswith("model.safetensors") for key in kept)

    assert send_pending(folder) == "MLflow: nothing was missing"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8 and not any(server.password.encode() in path.read_bytes() for path in files)
    assert server.password.encode() not in server.database.read_bytes()


def test_an_unreachable_server_does_not_slow_training_and_gets_everything_later(
    server: TrackingServer, reader: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is the direct call, with mlflow's retries reduced to two."""
    folder = make_run(tmp_path / "away")
    server.kill()
    with monkeypatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        started = time.perf_counter()
        with pytest.raises(MlflowException):
            reader.log_metric("0" * 32, "loss", 1.0)
        assert time.perf_counter() - started > 1.0

    tracker, durations = start(folder, {"lr": 0.1}, stall_seconds=1), []
    file, log = start_logging(folder, tracker)
    for step in range(1, 501):
        started = time.perf_counter()
        log(step, {"loss": 1 / step})
        durations.append(time.perf_counter() - started)
        time.sleep(0.002)
    file.close("FINISHED")
    started = time.monotonic()
    with pytest.raises(PendingError, match=f"500 of 500 lines .* `python -m wmtp.sync {folder}` sends them"):
        tracker.close("FINISHED")
    assert time.monotonic() - started < 5
    assert statistics.quantiles(durations, n=100)[98] < 0.01
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 500
    assert sync_state(folder) | {"run_id": "", "uri": server.uri, "experiment": "tests"} == sync_state(folder)

    server.start()
    late = start(
        folder, {"lr": 0.1}, is_training=False, uri="http://127.0.0.1:9"
    )  # mlflow.json has the address of the store
    late.close("FINISHED")
    assert late.report == "MLflow: 500 lines of metrics, status FINISHED"
    run_id = sync_state(folder)["run_id"]
    run = reader.get_run(run_id)
    assert steps(reader, run_id, "loss") == list(range(1, 501))
    assert (run.info.status, run.data.params, run.info.run_name) == ("FINISHED", {"lr": "0.1"}, "away")


def naive_run(client: MlflowClient, server: TrackingServer) -> tuple[str, list[int], float]:
    """Log every step directly to the server and, after a crash, log again from the checkpoint on."""
    run_id = client.create_run("0").info.run_id
    client.log_param(run_id, "lr", 0.1)
    for first, last in ((1, 30), (21, 60)):
        for step in range(first, last + 1):
            client.log_metric(run_id, "loss", math.inf if step == 25 else 1 / step, step=step)
            time.sleep(0.001)
    with pytest.raises(MlflowException, match="lr"):
        client.log_param(run_id, "lr", 0.2)
    return run_id, steps(client, run_id, "loss"), max(m.value for m in client.get_metric_history(run_id, "loss"))


def test_every_step_is_stored_once_after_killing_the_server_and_the_training(
    server: TrackingServer, reader: MlflowClient, tmp_path: Path
) -> None:
    """The control logs directly: it repeats steps, stores Inf as a number, and cannot change a parameter."""
    _, repeated, largest = naive_run(reader, server)
    assert len(repeated) == 70 and largest > 1e300

    folder = make_run(tmp_path / "killed")

    def train() -> None:
        tracker = start(folder, {"lr": 0.1})
        _, log = start_logging(folder, tracker)
        for step in range(1, 10_000):
            log(step, {"loss": math.inf if step == 7 else 1 / step, "train/tokens_per_second": time.time()})
            time.sleep(0.01)

    def number_sent() -> int:
        return (
            sync_state(folder)["sent"].get("metrics.jsonl", {}).get("lines", 0)
            if (folder / "mlflow.json").exists()
            else 0
        )

    process = fork(train)
    wait_for(lambda: number_sent() > 20)
    server.kill()
    time.sleep(0.5)
    server.start()
    before = number_sent()
    wait_for(lambda: number_sent() > before)
    os.kill(process, signal.SIGKILL)
    assert exit_code(process) == -signal.SIGKILL

    written = len((folder / "metrics.jsonl").read_bytes().splitlines())
    checkpoint, num_steps = number_sent() - 15, written + 20  # points that the killed process sent cannot be deleted
    tracker = start(folder, {"lr": 0.2})
    file, log = start_logging(folder, tracker, resume_step=checkpoint)
    for step in range(checkpoint + 1, num_steps + 1):  # slightly different values, as on a GPU
        log(step, {"loss": 1.0000001 / step, "train/tokens_per_second": time.time()})
    file.close("FINISHED")
    tracker.close("FINISHED")

    run_id = sync_state(folder)["run_id"]
    run = reader.get_run(run_id)
    assert steps(reader, run_id, "train/tokens_per_second") == list(range(1, num_steps + 1))
    assert steps(reader, run_id, "loss") == [step for step in range(1, num_steps + 1) if step != 7]
    assert steps(reader, run_id, "nonfinite") == [7]
    assert (run.data.params, run.data.tags["resumed.lr"], run.info.status) == ({"lr": "0.1"}, "0.2", "FINISHED")
    identity = json.loads((folder / "run.json").read_text())["id"]
    assert len(reader.search_runs([run.info.experiment_id], f"tags.`wmtp.run` = '{identity}'")) == 1


@pytest.mark.parametrize("has_id", [True, False])
def test_a_run_is_created_once_if_the_response_is_lost(
    server: TrackingServer, reader: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_id: bool
) -> None:
    """The control has no id to find the run by."""
    folder = make_run(tmp_path / f"unanswered {has_id}")
    if not has_id:
        (folder / "run.json").unlink()
    create_run, answers = MlflowClient.create_run, iter([False])

    def create(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        created = create_run(self, *args, **kwargs)
        if not next(answers, True):
            raise MlflowException("the connection was lost")
        return created

    monkeypatch.setattr(MlflowClient, "create_run", create)
    experiment = f"unanswered {has_id}"
    start(folder, experiment=experiment).close("FINISHED")
    known = reader.get_experiment_by_name(experiment)
    assert known is not None
    assert len(reader.search_runs([known.experiment_id])) == (1 if has_id else 2)


def test_a_faulty_network_changes_nothing(server: TrackingServer, reader: MlflowClient, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "faulty", **{"train.log": "x" * 50_000})
    with FaultyProxy(server.uri) as proxy:
        tracker = start(folder, uri=proxy.url)
        file, log = start_logging(folder, tracker)
        for step in range(1, 41):
            if step == 10:
                proxy.answer(503, 2)
            if step == 20:
                proxy.drop(2, methods=("POST",))
            log(step, {"loss": 1 / step})
            time.sleep(0.05)
        file.close("FINISHED")
        wait_for(lambda: proxy.done["answer"] == 2 and proxy.done["drop"] == 2)
        proxy.drop(1, methods=("PUT",))
        tracker.close("FINISHED")
        assert proxy.done["drop"] == 3
    run_id = sync_state(folder)["run_id"]
    assert steps(reader, run_id, "loss") == list(range(1, 41))
    assert [file.path for file in reader.list_artifacts(run_id)] == ["train.log"]


class NotFoundHandler(http.server.BaseHTTPRequestHandler):
    """A server that is not an MLflow server."""

    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def other_server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotFoundHandler) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{other.server_address[1]}"
        other.shutdown()


def test_the_server_check_reports_every_reason_for_a_refusal(
    server: TrackingServer, reader: MlflowClient, other_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_server(None, "missing experiment")
    assert reader.get_experiment_by_name("missing experiment") is None
    experiment_id = reader.create_experiment("owned by the administrator")
    check_server(server.uri, "owned by the administrator")
    assert "x" * 251 not in reader.get_experiment(experiment_id).tags

    def refusal(uri: str, experiment: str = "owned by the administrator") -> str:
        with pytest.raises(InputError) as error:
            check_server(uri, experiment)
        assert "\n" not in str(error.value)
        assert not any(secret in str(error.value) for secret in (server.password, "wrong-password", "only-may-read"))
        return str(error.value)

    assert "does not answer as an MLflow server does" in refusal(other_server)
    reader.delete_experiment(experiment_id)
    assert "was deleted there" in refusal(server.uri)
    reader.restore_experiment(experiment_id)

    server.add_user("reader", "only-may-read-this")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "only-may-read-this")
    assert "does not let this user write to the experiment 'owned by the administrator'" in refusal(server.uri)
    check_server(server.uri, "owned by the user")

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password")
    assert "rejects this user and password; set MLFLOW_TRACKING_USERNAME and" in refusal(server.uri)
    monkeypatch.delenv("MLFLOW_TRACKING_PASSWORD")
    assert "requires a user and a password" in refusal(server.uri)


def test_an_unreachable_server_is_not_an_input_error(server: TrackingServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ServerUnreachable, match="refused"):
        check_server("http://127.0.0.1:9", "tests")
    with FaultyProxy(server.uri) as proxy:
        proxy.answer(503)
        with pytest.raises(ServerUnreachable, match="503"):
            check_server(proxy.url, "tests")
    monkeypatch.setattr("wmtp.tracking.mlflow.client.CHECK_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(ServerUnreachable, match="within 1 s"):
            check_server(f"http://127.0.0.1:{silent.getsockname()[1]}", "tests")
        assert time.monotonic() - started < 3


def test_the_jobs_of_a_sweep_are_children(server: TrackingServer, reader: MlflowClient, tmp_path: Path) -> None:
    sweep = make_run(tmp_path / "sweep", **{SWEEP: '{"jobs": []}'})
    jobs = [make_run(sweep / str(job)) for job in range(2)]
    for tracker in [start(job) for job in jobs]:
        tracker.close("FINISHED")
    parent = sync_state(sweep)["run_id"]
    for job in jobs:
        assert reader.get_run(sync_state(job)["run_id"]).data.tags["mlflow.parentRunId"] == parent
    saved_state = (sweep / "mlflow.json").read_text()
    (sweep / "mlflow.json").write_text(saved_state.replace(server.uri, "http://127.0.0.1:9"))
    remember_destinations(["http://127.0.0.1:9"])
    with pytest.raises(PendingError, match="did not receive the status FINISHED of the sweep"):
        end_sweep(sweep, "FINISHED")
    (sweep / "mlflow.json").write_text(saved_state)
    assert end_sweep(sweep, "FINISHED") == "MLflow: status FINISHED"
    assert reader.get_run(parent).info.status == "FINISHED"


class CollisionHandler(logging.Handler):
    """Handler that writes a file and ends the process if another process has created the same tables."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def emit(self, record: logging.LogRecord) -> None:
        if "already exists" in record.getMessage():
            self.file.touch()
            os._exit(1)  # otherwise it would retry until `stall_s`


def start_together(outputs: Path, count: int, stall_s: float) -> list[int]:
    """Return the exit codes of processes that each track one run in a shared store."""
    gate, opened = os.pipe()

    def track(number: int) -> None:
        os.close(opened)
        os.read(gate, 1)  # waits until all processes have started
        folder = make_run(outputs / f"{number}")
        logging.getLogger("wmtp").addHandler(CollisionHandler(folder / "collided"))
        settings = {"experiment": "wmtp", "stall_seconds": stall_s, "close_seconds": stall_s}
        tracker = start(folder, {"number": number}, **settings)
        file, log = start_logging(folder, tracker)
        for step in (1, 2, 3):
            log(step, {"loss": 1 / step})
        file.close("FINISHED")
        tracker.close("FINISHED")

    processes = [fork(lambda number=number: track(number)) for number in range(count)]  # type: ignore[misc]
    os.close(gate)
    os.close(opened)
    return [exit_code(process) for process in processes]


def test_twenty_processes_create_one_store(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    assert start_together(outputs, 20, 240) == [0] * 20
    with sqlite3.connect(outputs / "mlflow.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert database.execute("SELECT count(*), count(DISTINCT run_uuid) FROM runs").fetchone() == (20, 20)
        assert database.execute("SELECT count(*) FROM metrics").fetchone() == (60,)
        assert database.execute("SELECT DISTINCT status FROM runs").fetchall() == [("FINISHED",)]
    assert not list(outputs.glob(".mlflow-*")) + list(outputs.glob("*/collided"))


def test_control_without_a_lock_processes_create_the_same_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process finds the store missing before any process has created it, and creates it."""
    count = 4
    all_have_checked = multiprocessing.Barrier(count)
    checks = itertools.count()

    def checked(*about: object, **details: object) -> None:
        if next(checks) == 0:
            all_have_checked.wait(60)

    event.listen(
        InitialBase.metadata, "before_create", checked
    )  # at this event, SQLAlchemy has determined the missing tables
    monkeypatch.setattr("wmtp.tracking.mlflow.client.file_lock", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr("wmtp.tracking.mlflow.client.create_store", lambda database: None)
    try:
        start_together(tmp_path / "outputs", count, 20)
    finally:
        event.remove(InitialBase.metadata, "before_create", checked)
    assert list(tmp_path.glob("outputs/*/collided"))
