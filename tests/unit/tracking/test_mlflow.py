import getpass
import itertools
import json
import math
import os
import random
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import mlflow.artifacts
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from wmtp.errors import InputError, PendingError
from wmtp.runtime.run_dir import SWEEP
from wmtp.tracking.jsonl import FILE_NAME, MetricsFile
from wmtp.tracking.mlflow import MlflowTracker, end_sweep, send_pending
from wmtp.tracking.mlflow.artifacts import artifacts
from wmtp.tracking.mlflow.client import longer_timeout
from wmtp.tracking.mlflow.metric_sender import MetricSender, MetricSource
from wmtp.tracking.tail import AlreadyLogged, Point, line_points

pytestmark = pytest.mark.xdist_group("tracked")  # its tests share what one fixture makes

Metrics = dict[str, float]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the runs and of their shared MLflow store; its path has a space and a percent sign."""
    return tmp_path_factory.mktemp("my runs 50%") / "outputs"


@pytest.fixture(scope="module")
def client(outputs: Path) -> MlflowClient:
    """Return a client that reads the store, after a first run has created it."""
    track(outputs / "first", [])
    return MlflowClient(tracking_uri=f"sqlite:///{outputs}/mlflow.db")


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the URL of a server that accepts connections but never answers; requests time out after a second."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def write(folder: Path, steps: list[Metrics], first_step: int = 1, resume_step: int | None = None) -> None:
    """Write lines to metrics.jsonl as a run does."""
    folder.mkdir(parents=True, exist_ok=True)
    file = MetricsFile(folder, resume_step)
    for step, metrics in enumerate(steps, first_step):
        file.log(step, 0, metrics)
    file.close("RUNNING")


def start(folder: Path, parameters: dict[str, object] | None = None, **settings: Any) -> MlflowTracker:
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"poll_seconds": 0.05} | settings
    return MlflowTracker(folder, f"run {folder.name}", parameters or {}, {"note": "a tag"}, **settings)


def track(folder: Path, steps: list[Metrics], parameters: dict[str, object] | None = None) -> str:
    """Track a complete run and return its id in MLflow."""
    tracker = start(folder, parameters)
    write(folder, steps)
    tracker.close("FINISHED")
    return sync_state(folder)["run_id"]


def sync_state(folder: Path) -> Any:
    return json.loads((folder / "mlflow.json").read_text())


def sent_lines(folder: Path) -> dict[str, int]:
    """Return the number of sent lines of each file, as recorded in mlflow.json."""
    if not (folder / "mlflow.json").exists():
        return {}
    return {name: position["lines"] for name, position in sync_state(folder)["sent"].items()}


def attempt(folder: Path, tracker: MlflowTracker, resume_step: int, logged: dict[int, list[Metrics]]) -> None:
    """Write the metrics of one process of a run, after removing the lines that follow `resume_step`."""
    file = MetricsFile(folder, resume_step)
    for step, lines in logged.items():
        for metrics in lines:
            file.log(step, 0, metrics)
            tracker.log(step, 0, metrics)
    file.close("RUNNING")


def file_points(folder: Path) -> set[tuple[str, int, float]]:
    """Return name, step and value of every point in metrics.jsonl."""
    lines = (folder / FILE_NAME).read_bytes().splitlines()
    return {(name, step, value) for line in lines for name, value, _, step in line_points(json.loads(line))}


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def stored_points(client: MlflowClient, run_id: str) -> list[tuple[str, int, float]]:
    """Return name, step and value of every point in MLflow."""
    names = client.get_run(run_id).data.metrics
    return sorted((name, *point) for name in names for point in history(client, run_id, name))


class LoggedByValue(AlreadyLogged):
    """Naive: recognizes a logged point by its name, step and value."""

    def missing(self, points: Sequence[Point]) -> list[Point]:
        return [point for point in points if (point[0], point[3], point[1]) not in self.known]

    known: set[tuple[str, int, float]]


def read_values(self: MetricSender, source: MetricSource, step: int) -> AlreadyLogged:
    logged = LoggedByValue({}, step)
    logged.known = set(stored_points(self.client, self.sync_state.run_id))
    return logged


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_is_read_back_as_it_was_written(client: MlflowClient, outputs: Path) -> None:
    folder = outputs / "2026-01-01" / "whole"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0")
    (folder / "summary.json").write_text("{}")
    parameters = {"algo.beta": 0.5, "long": "x" * 7000, "none": None} | {f"p{i}": i for i in range(250)}

    run_id = track(folder, [{"train/loss": 2.0, "train/lr": 0.1}, {"train/loss": 1.5, "head[1]": 3.0}], parameters)

    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("run whole", "FINISHED")
    assert run.data.params == {name: str(value)[:6000] for name, value in parameters.items()}
    assert run.data.tags["note"] == "a tag" and run.data.tags["wmtp.folder"] == str(folder)
    assert history(client, run_id, "train/loss") == [(1, 2.0), (2, 1.5)]
    assert run.data.metrics == {"train/loss": 1.5, "train/lr": 0.1, "head_1_": 3.0}
    written = [json.loads(line)["time"] for line in (folder / FILE_NAME).read_text().splitlines()]
    sent = [metric.timestamp for metric in client.get_metric_history(run_id, "train/loss")]
    assert sent == [int(moment * 1000) for moment in written]
    lines = (folder / FILE_NAME).read_text()
    position = {"lines": 2, "size": len(lines), "last": lines.splitlines(keepends=True)[1]}
    uri = f"sqlite:///{outputs}/mlflow.db"
    saved_state = sync_state(folder)
    assert set(saved_state.pop("artifacts")) == {"config.yaml", "summary.json"}
    settings = {"experiment": "wmtp", "experiment_id": "1", "run_name": "run whole"}
    assert saved_state == {"run_id": run_id, "uri": uri, "sent": {FILE_NAME: position}} | settings
    assert {artifact.path for artifact in client.list_artifacts(run_id)} == {"config.yaml", "summary.json"}
    assert (outputs / "mlartifacts" / run_id / "artifacts" / "config.yaml").read_text() == "seed: 0"


def test_pass_at_1_of_the_last_model_is_a_metric(client: MlflowClient, outputs: Path) -> None:
    """The control is a run that sampled no problems."""
    for name, passes in (("graded", {"value": 0.75}), ("not graded", None)):
        folder = outputs / name
        folder.mkdir(parents=True)
        summary = {"pass@1": passes, "sampled_pass@1": passes and {"value": 0.5}, "total_steps": 7}
        (folder / "summary.json").write_text(json.dumps(summary))
        run_id = track(folder, [{"val/loss": 1.0}])
        for metric, value in (("test/pass_at_1", 0.75), ("test/sampled_pass_at_1", 0.5)):
            assert history(client, run_id, metric) == ([] if passes is None else [(7, value)])


@pytest.mark.parametrize("state", ["FINISHED", "FAILED", "KILLED"])
def test_the_final_status_is_stored(client: MlflowClient, outputs: Path, state: str) -> None:
    tracker = start(outputs / state)
    tracker.close(state)
    assert client.get_run(sync_state(outputs / state)["run_id"]).info.status == state


def test_metrics_arrive_during_the_run(client: MlflowClient, outputs: Path) -> None:
    folder = outputs / "live"
    tracker = start(folder)
    attempt(folder, tracker, 0, {1: [{"train/loss": 2.0}]})
    wait_for(lambda: sent_lines(folder) == {FILE_NAME: 1})
    run = client.get_run(sync_state(folder)["run_id"])
    assert run.info.status == "RUNNING" and run.data.metrics == {"train/loss": 2.0}
    tracker.close("FINISHED")
    assert client.get_run(run.info.run_id).info.status == "FINISHED"


def test_nonfinite_values_are_counted(client: MlflowClient, outputs: Path) -> None:
    run_id = track(outputs / "nan", [{"a": 1.0}, {"a": float("nan"), "b": float("inf"), "c": 2.0}])
    assert client.get_run(run_id).data.metrics == {"a": 1.0, "c": 2.0, "nonfinite": 2.0}
    assert history(client, run_id, "nonfinite") == [(2, 2.0)]


def test_a_resumed_run_logs_nothing_twice(client: MlflowClient, outputs: Path) -> None:
    folder, steps = outputs / "resumed", [{"loss": float(i)} for i in range(1, 7)]
    run_id = track(folder, steps[:4], {"lr": 0.1, "same": 1, "long": "x" * 7000})

    write(folder, [], resume_step=2)  # the checkpoint was at step 2, so steps 3 and 4 are written again
    tracker = start(folder, {"lr": 0.2, "same": 1, "new": True, "long": "x" * 7000})
    wait_for(lambda: client.get_run(run_id).info.status == "RUNNING")
    write(folder, steps[2:], first_step=3)
    tracker.close("FINISHED")

    assert sync_state(folder)["run_id"] == run_id and sent_lines(folder) == {FILE_NAME: 6}
    assert history(client, run_id, "loss") == [(i, float(i)) for i in range(1, 7)]
    run = client.get_run(run_id)
    assert run.data.params == {"lr": "0.1", "same": "1", "new": "True", "long": "x" * 6000}
    assert {name: value for name, value in run.data.tags.items() if "resumed" in name} == {"resumed.lr": "0.2"}
    assert run.info.status == "FINISHED"

    track(folder, [], {"lr": 0.1})
    assert client.get_run(run_id).data.tags["resumed.lr"] == "0.1"


def test_stage_1_is_logged_to_the_same_run(client: MlflowClient, outputs: Path) -> None:
    folder, stage, stage_file = outputs / "staged", outputs / "staged" / "pretrain", f"pretrain/{FILE_NAME}"
    tracker = start(folder)
    stage.mkdir()
    attempt(stage, tracker, 0, {1: [{"train/loss": 9.0}], 2: [{"train/loss": 8.0, "b": math.nan}, {"val/loss": 7.0}]})
    wait_for(lambda: sent_lines(folder) == {stage_file: 3})
    (stage / "result.json").write_text("{}")
    (stage / "value_head.safetensors").write_bytes(b"weights")
    attempt(folder, tracker, 0, {1: [{"train/loss": 2.0}], 2: [{"train/loss": 1.0}]})
    tracker.close("KILLED")

    tracker = start(folder)  # stage 1 is complete; training resumes at step 1
    attempt(folder, tracker, 1, {2: [{"train/loss": 1.0}], 3: [{"train/loss": 0.5}]})
    tracker.close("FINISHED")

    run_id = sync_state(folder)["run_id"]
    assert stored_points(client, run_id) == [
        ("pretrain/nonfinite", 2, 1.0),
        ("pretrain/train/loss", 1, 9.0),
        ("pretrain/train/loss", 2, 8.0),
        ("pretrain/val/loss", 2, 7.0),
        ("train/loss", 1, 2.0),
        ("train/loss", 2, 1.0),
        ("train/loss", 3, 0.5),
    ]
    assert sent_lines(folder) == {FILE_NAME: 3, stage_file: 3}
    artifacts = {artifact.path for artifact in client.list_artifacts(run_id, "pretrain")}
    assert artifacts == {"pretrain/result.json", "pretrain/value_head.safetensors"}


def test_a_resumed_run_may_log_at_other_steps(client: MlflowClient, outputs: Path) -> None:
    """The control counts lines only, and so takes the new lines for those of the earlier attempt."""
    folder = outputs / "interval"
    run_id = track(folder, [{"loss": 1 / step} for step in range(1, 8)])
    tracker = start(folder)
    attempt(folder, tracker, 5, {step: [{"loss": 1 / step}] for step in (6, 8, 10)})
    tracker.close("FINISHED")

    by_count = (folder / FILE_NAME).read_text().splitlines()[7:]
    assert [json.loads(line)["step"] for line in by_count] == [10]
    points = history(client, run_id, "loss")
    assert points == [(step, 1 / step) for step in (1, 2, 3, 4, 5, 6, 7, 8, 10)]  # MLflow cannot delete step 7


@pytest.mark.parametrize("by_count", [True, False])
def test_a_recomputed_step_with_a_slightly_different_value_is_logged_once(
    client: MlflowClient, outputs: Path, monkeypatch: pytest.MonkeyPatch, by_count: bool
) -> None:
    """The control also compares values."""
    if not by_count:
        monkeypatch.setattr("wmtp.tracking.mlflow.metric_sender.AlreadyLogged", LoggedByValue)
        monkeypatch.setattr(MetricSender, "_already_logged", read_values)
    folder = outputs / f"last bits {by_count}"
    run_id = track(folder, [{"loss": 3.0}, {"loss": 2.0}, {"loss": 1.0}])
    tracker = start(folder)
    attempt(folder, tracker, 1, {2: [{"loss": 2.0000001}], 3: [{"loss": 1.0}], 4: [{"loss": 0.5}]})
    tracker.close("FINISHED")
    points = history(client, run_id, "loss")
    assert sorted(step for step, _ in points) == ([1, 2, 3, 4] if by_count else [1, 2, 2, 3, 4])
    assert client.get_run(run_id).data.metrics == {"loss": 0.5}


def test_lines_that_resuming_drops_are_not_sent(client: MlflowClient, outputs: Path) -> None:
    """Resuming removes lines after the tracker has started. The control sends lines before the run logs a new one."""
    found = {}
    for early in (True, False):
        folder = outputs / f"early {early}"
        write(folder, [{"loss": float(step)} for step in range(1, 5)])
        tracker = start(folder)
        if early:
            tracker.log(2, 0, {})
            wait_for(lambda folder=folder: sent_lines(folder) == {FILE_NAME: 4})  # type: ignore[misc]
        else:
            wait_for(lambda folder=folder: sync_state(folder)["run_id"] != "")  # type: ignore[misc]
            time.sleep(0.2)  # four times the polling interval
        attempt(folder, tracker, 2, {3: [{"loss": 3.0}], 4: [{"loss": 40.0}], 6: [{"loss": 6.0}]})
        tracker.close("FINISHED")
        found[early] = stored_points(client, sync_state(folder)["run_id"])
        assert sent_lines(folder) == {FILE_NAME: 5}
    assert found[False] == [
        ("loss", step, value) for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (6, 6.0))
    ]
    assert found[True] == [("loss", step, value) for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (6, 6.0))]


@pytest.mark.parametrize("queries_mlflow", [True, False])
def test_points_that_were_sent_but_not_recorded_are_not_sent_again(
    client: MlflowClient, outputs: Path, monkeypatch: pytest.MonkeyPatch, queries_mlflow: bool
) -> None:
    """The control relies on mlflow.json instead of querying MLflow."""
    folder = outputs / f"unnoted {queries_mlflow}"
    run_id = track(folder, [{"loss": 1.0}, {"loss": 2.0}])
    saved_state = (folder / "mlflow.json").read_bytes()
    tracker = start(folder)
    attempt(folder, tracker, 2, {3: [{"loss": 3.0}], 4: [{"loss": 4.0}]})
    tracker.close("RUNNING")
    (folder / "mlflow.json").write_bytes(saved_state)  # as if killed between the request and writing mlflow.json

    if not queries_mlflow:
        monkeypatch.setattr(MetricSender, "_already_logged", lambda *args: AlreadyLogged({}))
    tracker = start(folder)
    attempt(folder, tracker, 2, {3: [{"loss": 3.0}], 4: [{"loss": 4.0}], 5: [{"loss": 5.0}]})
    tracker.close("FINISHED")
    steps = [step for step, _ in history(client, run_id, "loss")]
    assert sorted(steps) == ([1, 2, 3, 4, 5] if queries_mlflow else [1, 2, 3, 3, 4, 4, 5])


def test_both_lines_of_a_step_are_sent_and_equal_points_once(client: MlflowClient, outputs: Path) -> None:
    folder = outputs / "two lines"
    tracker = start(folder)
    attempt(
        folder, tracker, 0, {1: [{"train/loss": 1.0, "both": 0.0, "a": 1.0}, {"val/loss": 2.0, "both": 0.0, "a": 2.0}]}
    )
    tracker.close("FINISHED")
    points = [("a", 1, 1.0), ("a", 1, 2.0), ("both", 1, 0.0), ("train/loss", 1, 1.0), ("val/loss", 1, 2.0)]
    assert stored_points(client, sync_state(folder)["run_id"]) == points


@pytest.mark.parametrize("seed", range(3))
def test_every_point_is_stored_once_after_any_crashes(
    client: MlflowClient, outputs: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Attempts log at different intervals and crash anywhere, also between a request and writing mlflow.json."""
    draw, folder = random.Random(seed), outputs / f"crashes {seed}"
    save_state, step, all_points = MlflowTracker._save_state, 0, set[tuple[str, int]]()
    for survives in (False, False, False, False, True):
        calls, last_call = itertools.count(1), math.inf if survives else draw.randint(2, 8)

        def save_or_die(*args: Any, calls: Iterator[int] = calls, last_call: float = last_call) -> None:
            if next(calls) > last_call:
                raise RuntimeError("killed")
            save_state(*args)

        monkeypatch.setattr(MlflowTracker, "_save_state", save_or_die)
        monkeypatch.setattr("wmtp.tracking.tail.POINTS_PER_CALL", draw.choice([1, 7, 500]))
        tracker = start(folder)
        lines: dict[int, list[Metrics]] = {}
        for logged in range(step + 1, step + 12, draw.randint(1, 3)):
            same = {"sometimes twice": 0.0, "early_stopping/patience": float(logged // 4)}
            lines[logged] = [{"train/loss": 1 / logged, "train/tokens_per_second": time.perf_counter()} | same]
            if logged % 3 == 0:
                lines[logged].append({"val/loss": 2 / logged} | same | {"sometimes twice": 1.0})
        attempt(folder, tracker, step, lines)
        with nullcontext() if survives else suppress(PendingError):
            tracker.close("FINISHED")
        all_points |= {(name, at) for name, at, _ in file_points(folder)}
        step += draw.randint(0, 8)

    points = stored_points(client, sync_state(folder)["run_id"])
    stored_counts = Counter((name, at) for name, at, _ in points)
    expected = Counter((name, at) for name, at, _ in file_points(folder))
    assert {point: stored_counts[point] for point in expected} == expected, (
        "MLflow has a point more or less often than the file"
    )
    assert set(stored_counts) <= all_points
    assert all(count == 1 for (name, _), count in stored_counts.items() if name != "sometimes twice")
    assert set(expected.values()) == {1, 2}


@given(
    st.dictionaries(
        st.integers(0, 5), st.lists(st.dictionaries(st.sampled_from("abc"), st.integers(0, 2)), max_size=3)
    ),
    st.dictionaries(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), st.integers(0, 3)),
)
def test_each_point_is_stored_as_often_as_it_is_in_the_file(
    lines: dict[int, list[dict[str, int]]], stored_counts: dict[tuple[str, int], int]
) -> None:
    points = [
        (name, float(value), 0, step) for step in sorted(lines) for line in lines[step] for name, value in line.items()
    ]
    expected = Counter((name, step) for name, _, step in {(name, value, step) for name, value, _, step in points})
    known, got = AlreadyLogged(stored_counts), Counter(stored_counts)
    for first in range(0, len(points), 2):  # as they come, a few at a time
        got.update((name, step) for name, _, _, step in known.missing(points[first : first + 2]))
    assert {point: max(count, stored_counts.get(point, 0)) for point, count in expected.items()} == {
        p: got[p] for p in expected
    }


def test_mlflow_is_queried_if_mlflow_json_has_another_format(client: MlflowClient, outputs: Path) -> None:
    folder = outputs / "old receipt"
    run_id = track(folder, [{"loss": 1.0}, {"loss": 2.0}])
    old = {"run_id": run_id, "uri": sync_state(folder)["uri"], "sent_lines": 2}
    (folder / "mlflow.json").write_text(json.dumps(old))
    start(folder).close("FINISHED")
    assert history(client, run_id, "loss") == [(1, 1.0), (2, 2.0)] and sent_lines(folder) == {FILE_NAME: 2}


def test_a_deleted_run_is_created_again(client: MlflowClient, outputs: Path) -> None:
    folder = outputs / "deleted"
    first = track(folder, [{"loss": 1.0}])
    client.delete_run(first)
    second = track(folder, [{"loss": 2.0}])
    assert second != first and client.get_run(second).data.metrics == {"loss": 2.0}
    assert [value for _, value in history(client, second, "loss")] == [1.0, 2.0]


@pytest.mark.parametrize("has_id", [True, False])
def test_a_run_is_found_by_its_id_without_mlflow_json(client: MlflowClient, outputs: Path, has_id: bool) -> None:
    """The file is missing after a kill before it was written, or after a download. The control has no id."""
    folder = outputs / f"lost {has_id}"
    folder.mkdir(parents=True)
    if has_id:
        (folder / "run.json").write_text(json.dumps({"id": uuid.uuid4().hex, "remote": None}))
    run_id = track(folder, [{"loss": 1.0}, {"loss": 2.0}], {"lr": 0.1})
    (folder / "mlflow.json").unlink()
    tracker = start(folder, {"lr": 0.1})
    attempt(folder, tracker, 1, {2: [{"loss": 2.5}], 3: [{"loss": 3.0}]})
    tracker.close("FINISHED")
    assert (sync_state(folder)["run_id"] == run_id) == has_id
    if has_id:
        assert history(client, run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]


@pytest.mark.parametrize("lines_left", [0, 1, 3, 4])
def test_metrics_older_or_newer_than_mlflow_json_are_sent_once(
    client: MlflowClient, outputs: Path, lines_left: int
) -> None:
    """In S3, metrics.jsonl and mlflow.json may be from different times."""
    folder = outputs / f"fetched {lines_left}"
    run_id = track(folder, [{"loss": 1.0}, {"loss": 2.0}])
    older = (folder / "mlflow.json").read_bytes()
    tracker = start(folder)
    attempt(folder, tracker, 2, {3: [{"loss": 3.0}], 4: [{"loss": 4.0}]})
    tracker.close("FINISHED")
    lines = (folder / FILE_NAME).read_bytes().splitlines(keepends=True)
    (folder / FILE_NAME).write_bytes(b"".join(lines[:lines_left]))
    if lines_left == 4:
        (folder / "mlflow.json").write_bytes(older)
    tracker = start(folder)
    tracker.log(4, 0, {})
    attempt(folder, tracker, lines_left, {step: [{"loss": step + 1e-9}] for step in range(lines_left + 1, 7)})
    tracker.close("FINISHED")
    assert sorted(step for step, _ in history(client, run_id, "loss")) == [1, 2, 3, 4, 5, 6]


def test_a_process_may_die_between_the_two_lines_of_a_step(client: MlflowClient, outputs: Path) -> None:
    """The control does not know the first line, and so takes its point for that of the second line."""
    folder = outputs / "between"
    run_id = track(folder, [{"loss": 1.0, "a": 1.0}])
    with (folder / FILE_NAME).open("a") as file:
        file.write(json.dumps({"step": 1, "epoch": 0, "time": time.time(), "val/loss": 2.0, "a": 2.0}) + "\n")
    tracker = start(folder)
    tracker.log(1, 0, {})
    tracker.close("FINISHED")
    assert stored_points(client, run_id) == [("a", 1, 1.0), ("a", 1, 2.0), ("loss", 1, 1.0), ("val/loss", 1, 2.0)]
    forgetful = AlreadyLogged({("a", 1): 1})
    assert forgetful.missing([("a", 2.0, 0, 1)]) == []


def test_sending_pending_metrics_does_not_reopen_a_finished_run(client: MlflowClient, outputs: Path) -> None:
    folder = outputs / "ended"
    run_id = track(folder, [{"loss": 1.0}])
    ended = client.get_run(run_id).info.end_time
    (folder / "evaluations").mkdir()
    for step in (8, 4, 8):  # the best checkpoint, an earlier one, and the best again with other settings
        file = MetricsFile(folder / "evaluations")
        file.log(step, 0, {"evaluation/tasks/pass_at_1": time.perf_counter()})
        file.close("FINISHED")
        assert send_pending(folder) == "MLflow: 1 line of metrics"
    assert send_pending(folder) == "MLflow: nothing was missing"
    run = client.get_run(run_id)
    assert (run.info.status, run.info.end_time) == ("FINISHED", ended)
    assert sorted(step for step, _ in history(client, run_id, "evaluation/tasks/pass_at_1")) == [4, 8, 8]
    assert send_pending(folder, "KILLED") == "MLflow: status KILLED"
    assert client.get_run(run_id).info.status == "KILLED"
    assert send_pending(outputs / "never tracked") is None


def test_a_late_final_status_is_sent(client: MlflowClient, outputs: Path) -> None:
    """All pending metrics may be sent before the final status is known."""
    folder = outputs / "named late"
    run_id = track(folder, [{"loss": 1.0}])
    tracker = start(folder, is_training=False)
    time.sleep(1)
    tracker.close("KILLED")
    assert client.get_run(run_id).info.status == "KILLED" and tracker.report == "MLflow: status KILLED"


def test_only_one_process_sends_a_run(client: MlflowClient, outputs: Path) -> None:
    folder = outputs / "shared"
    first = start(folder)
    wait_for(lambda: sync_state(folder)["run_id"] != "")
    with pytest.raises(PendingError, match="another process is sending"):
        send_pending(folder)
    second = start(folder)  # a run that was resumed while its previous process was still closing
    write(folder, [{"loss": 1.0}])
    first.close("KILLED")
    second.log(1, 0, {})
    second.close("FINISHED")
    run_id = sync_state(folder)["run_id"]
    assert history(client, run_id, "loss") == [(1, 1.0)] and client.get_run(run_id).info.status == "FINISHED"


def test_the_location_of_the_best_checkpoint_is_an_artifact(client: MlflowClient, outputs: Path) -> None:
    for remote in (None, "s3://bucket/runs/one"):
        folder = outputs / f"best {remote is None}"
        for step in (2, 4):
            checkpoint = folder / "checkpoints" / f"step_{step:08d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "model.safetensors").write_bytes(b"weights")
            (checkpoint / "manifest.json").write_text(f"{step}")
        best = {"folder": "step_00000002", "step": 2, "val/loss": 0.5}
        (folder / "checkpoints" / "best.json").write_text(json.dumps(best))
        (folder / "run.json").write_text(json.dumps({"id": uuid.uuid4().hex, "remote": remote}))
        run_id = track(folder, [{"val/loss": 0.5}])
        track(folder, [])
        run = client.get_run(run_id)
        assert history(client, run_id, "best/val_loss") == [(2, 0.5)]
        kept_at = remote or str(folder)  # a store on the same disk gets no copy
        best = f"{kept_at}/checkpoints/step_00000002"
        text = mlflow.artifacts.load_text(f"{run.info.artifact_uri}/checkpoints/addresses.json")
        assert [file.path for file in client.list_artifacts(run_id, "checkpoints")] == ["checkpoints/addresses.json"]
        assert json.loads(text) == {"run": kept_at, "checkpoints": f"{kept_at}/checkpoints", "best": best}
        assert run.data.tags["wmtp.checkpoints"] == best


@pytest.mark.parametrize("is_same", [True, False])
def test_a_best_value_is_stored_once_if_the_response_is_lost(
    client: MlflowClient, outputs: Path, monkeypatch: pytest.MonkeyPatch, is_same: bool
) -> None:
    """The control uses a new timestamp for each attempt, so MLflow stores another point."""
    log_metric, lost = MlflowClient.log_metric, iter([True])

    def log_without_response(self: MlflowClient, *args: Any, **kwargs: Any) -> None:
        if not is_same:
            kwargs["timestamp"] = time.time_ns()
        log_metric(self, *args, **kwargs)
        if next(lost, False):
            raise MlflowException("the response is lost")

    folder = outputs / f"lost response {is_same}"
    checkpoint = folder / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    best = {"folder": checkpoint.name, "step": 1, "val/loss": 0.5}
    (folder / "checkpoints" / "best.json").write_text(json.dumps(best))
    monkeypatch.setattr(MlflowClient, "log_metric", log_without_response)
    run_id = track(folder, [{"val/loss": 0.5}])
    assert history(client, run_id, "best/val_loss") == [(1, 0.5)] * (1 if is_same else 2)


def test_a_database_on_another_machine_is_not_created_here(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    remote_path = tmp_path / "home" / "somebody" / "mlflow.db"
    (tmp_path / "mlflow.json").write_text(json.dumps({"run_id": "1", "uri": f"sqlite:///{remote_path}"}))
    assert send_pending(tmp_path) is None and "not on this machine" in caplog.text
    assert not (tmp_path / "home").exists()


def test_addresses_are_an_artifact_only_with_a_checkpoint_pointer(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000001").mkdir(parents=True)
    assert list(artifacts(tmp_path, "s3://bucket/run", "best")) == []
    (tmp_path / "checkpoints" / "latest.json").write_text("{}")
    assert [artifact.name for artifact in artifacts(tmp_path, "s3://bucket/run", "best")] == [
        "checkpoints/addresses.json"
    ]


def test_code_and_data_are_recorded_once(client: MlflowClient, outputs: Path) -> None:
    folder = outputs / "origin"
    folder.mkdir(parents=True)
    data = {
        "name": "tasks",
        "fingerprint": "f" * 64,
        "tokenizer": "t" * 64,
        "source": "tasks",
        "train": 8,
        "validation": 2,
    }
    (folder / "provenance.json").write_text(json.dumps({"git_revision": "abc+changes", "data": data}))
    run_id = track(folder, [])
    track(folder, [])
    run = client.get_run(run_id)
    expected = {
        "mlflow.source.name": "wmtp.train",
        "mlflow.source.git.commit": "abc",
        "wmtp.git_revision": "abc+changes",
    }
    assert expected.items() <= run.data.tags.items() and run.data.tags["mlflow.user"] == getpass.getuser()
    inputs = {
        one.tags[0].value: (one.dataset.name, one.dataset.digest, json.loads(one.dataset.profile)["num_records"])
        for one in run.inputs.dataset_inputs
    }
    assert inputs == {"train": ("tasks/train", "f" * 36, 8), "validation": ("tasks/validation", "f" * 36, 2)}
    assert len(run.inputs.dataset_inputs) == 2


def test_the_jobs_of_a_sweep_are_children_of_one_run(client: MlflowClient, outputs: Path) -> None:
    sweep = outputs / "it's a sweep"
    sweep.mkdir(parents=True)
    overrides = [["algo=critic", f"++seed={seed}"] for seed in range(4)]
    results: list[dict[str, float]] = [{"final_loss": 1.5, "best_loss": 1.25, "total_steps": 9}, {}, {}, {}]
    states = ["FINISHED", "FAILED", "FINISHED", "FINISHED"]
    jobs = [{"number": number, "overrides": overrides[number], "state": state, "result": results[number]}
            for number, state in enumerate(states)]  # fmt: skip
    (sweep / SWEEP).write_text(json.dumps({"jobs": jobs}))
    assert end_sweep(sweep, "FINISHED") is None
    trackers = [start(sweep / str(job)) for job in range(3)]
    for tracker in trackers:
        tracker.close("FINISHED")
    parent = sync_state(sweep)["run_id"]
    children = client.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert {run.info.run_id for run in children} == {sync_state(sweep / str(job))["run_id"] for job in range(3)}
    assert client.get_run(parent).info.status == "RUNNING"
    (sweep / "mlflow.json").unlink()  # as if killed before mlflow.json was written
    start(sweep / "0").close("FINISHED")
    start(sweep / "3").close("FINISHED")
    assert sync_state(sweep)["run_id"] == parent
    assert (
        end_sweep(sweep, "FAILED") == "MLflow: status FAILED"
        and end_sweep(sweep, "FAILED") == "MLflow: nothing was missing"
    )
    run = client.get_run(parent)
    assert (run.info.run_name, run.info.status, run.data.tags["wmtp.sweep"]) == (sweep.name, "FAILED", str(sweep))
    assert [file.path for file in client.list_artifacts(parent)] == [SWEEP]
    assert run.data.params == {"algo": "critic", "seed": "0, 1, 2, 3"}
    assert run.data.metrics == {"best/val_loss": 1.25, "jobs/finished": 3, "jobs/failed": 1}
    rows = run.data.tags["mlflow.note.content"].splitlines()
    assert rows[2] == "| 0 | `seed=0` | `FINISHED` | 1.5000 | 1.2500 | 9 |" and len(rows) == 2 + len(jobs)


def test_system_metrics_are_sent(client: MlflowClient, outputs: Path) -> None:
    folder = outputs / "machine"

    def last_step() -> int:
        sent = sync_state(folder)["sent"].get("system.jsonl") if folder.exists() else None
        return -1 if sent is None else int(json.loads(sent["last"] or '{"step": -1}')["step"])

    for fetched in (False, False, True, True):
        before = last_step()
        if fetched:  # resumed on a machine without the file
            (folder / "system.jsonl").unlink()
        tracker = start(folder, system_seconds=0.05)
        wait_for(lambda before=before: last_step() > before + 2)  # type: ignore[misc]
        tracker.close("FINISHED")
        if fetched:
            first = (folder / "system.jsonl").read_text().splitlines()[0]
            assert json.loads(first)["step"] == before + 1
        with (folder / "system.jsonl").open("a") as file:
            file.write('{"step": 99, "torn')
    run_id = sync_state(folder)["run_id"]
    points = history(client, run_id, "system/cpu_utilization_percentage")
    assert [step for step, _ in points] == list(range(last_step() + 1))
    assert {"system/system_memory_usage_megabytes", "system/system_memory_usage_percentage"} <= set(
        client.get_run(run_id).data.metrics
    )


def test_evaluations_of_several_checkpoints_are_sent_once(
    client: MlflowClient, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their steps are not in order, and the file may be too long for one read."""
    folder = outputs / "many"
    for step in (8, 4, 2, 9):
        write(folder / "evaluations", [{"evaluation/loss": 1 / step}], first_step=step)
    run_id = track(folder, [])
    monkeypatch.setattr("wmtp.tracking.tail.BYTES_PER_READ", 120)  # one and a half lines
    (folder / "mlflow.json").write_text(json.dumps(sync_state(folder) | {"sent": {}}))
    assert send_pending(folder) == "MLflow: nothing was missing"
    assert sorted(step for step, _ in history(client, run_id, "evaluation/loss")) == [2, 4, 8, 9]


@pytest.mark.slow
def test_failed_calls_are_retried(
    client: MlflowClient, outputs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log_batch, failures = MlflowClient.log_batch, iter(range(3))

    def fail_three_times(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        if next(failures, None) is not None:
            raise MlflowException("out of order")
        return log_batch(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", fail_three_times)
    run_id = track(outputs / "flaky", [{"loss": 1.0}, {"loss": 2.0}], {"lr": 0.1})
    assert history(client, run_id, "loss") == [(1, 1.0), (2, 2.0)]
    assert client.get_run(run_id).data.params == {"lr": "0.1"}
    assert next(record.levelname for record in caplog.records if "out of order" in record.message) == "WARNING"


@pytest.mark.slow
def test_status_and_metrics_are_stored_if_the_artifact_store_fails(
    client: MlflowClient, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("no credentials")

    monkeypatch.setattr(MlflowClient, "log_artifact", fail)
    folder = outputs / "artifacts"
    write(folder, [{"loss": 1.0}])
    (folder / "train.log").touch()
    tracker = start(folder, close_seconds=2)
    with pytest.raises(PendingError, match=r"0 of 1 lines.*no credentials"):
        tracker.close("FAILED")
    run = client.get_run(sync_state(folder)["run_id"])
    assert run.info.status == "FAILED" and run.data.metrics == {"loss": 1.0}


@pytest.mark.slow
def test_training_does_not_wait_for_the_server(silent_server: str, tmp_path: Path) -> None:
    """The control is the direct call, which waits for the server."""
    started = time.perf_counter()
    with pytest.raises(MlflowException):
        MlflowClient(tracking_uri=silent_server).log_metric("0" * 32, "loss", 1.0)
    assert time.perf_counter() - started > 0.9

    constructions, trackers = [], []
    for i in range(3):
        folder = tmp_path / str(i)
        folder.mkdir()
        started = time.perf_counter()
        trackers.append(start(folder, uri=silent_server, close_seconds=0.1))
        constructions.append(time.perf_counter() - started)
    calls = []
    for step in range(200):
        started = time.perf_counter()
        trackers[0].log(step, 0, {"loss": 1.0})
        calls.append(time.perf_counter() - started)
        time.sleep(0.005)  # while the threads wait for the server
    assert statistics.median(constructions) < 0.05 and statistics.median(calls) < 0.05
    for tracker in trackers:
        with pytest.raises(PendingError):
            tracker.close("FINISHED")


@pytest.mark.slow
def test_an_unreachable_server_is_reported_after_the_time_limit(tmp_path: Path) -> None:
    write(tmp_path, [{"loss": float(i)} for i in range(20)])
    before = (tmp_path / FILE_NAME).read_bytes()
    tracker = start(tmp_path, uri="http://127.0.0.1:9", close_seconds=3)
    started = time.monotonic()
    with pytest.raises(PendingError, match="20 of 20 lines") as pending:
        tracker.close("FINISHED")
    assert 2.9 < time.monotonic() - started < 15
    assert str(tmp_path / FILE_NAME) in str(pending.value) and "refused" in str(pending.value)
    assert (tmp_path / FILE_NAME).read_bytes() == before
    tracker._sender._thread.join(10)
    assert not tracker._sender._thread.is_alive(), "the thread is still running after close"


def test_a_damaged_mlflow_json_is_reported(tmp_path: Path) -> None:
    (tmp_path / "mlflow.json").write_text("{")
    with pytest.raises(
        InputError, match="mlflow.json is damaged .*; delete it: the MLflow run is then found by the id in run.json"
    ):
        start(tmp_path, uri="http://127.0.0.1:9")


def test_importing_the_tracker_does_not_import_mlflow(tmp_path: Path) -> None:
    program = "import sys, wmtp.tracking.mlflow; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_timeout_grows_with_the_size_of_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server answers only after it has forwarded an artifact. The control is the timeout of other calls."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    with longer_timeout(3_000_000_000):
        assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "3010"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "10"


@pytest.mark.slow
def test_close_waits_for_a_running_artifact_upload(
    client: MlflowClient, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is an empty file, for which only `close_seconds` applies."""
    log_artifact = MlflowClient.log_artifact

    def slow(*args: Any) -> None:
        time.sleep(1.0)
        log_artifact(*args)

    monkeypatch.setattr(MlflowClient, "log_artifact", slow)
    for size in (0, 3_000_000):
        folder = outputs / f"slow {size}"
        folder.mkdir(parents=True)
        (folder / "samples.jsonl").write_bytes(b"x" * size)
        tracker = start(folder)
        wait_for(lambda folder=folder: sync_state(folder)["run_id"] != "")  # type: ignore[misc]
        tracker.close_seconds = 0.5
        with nullcontext() if size else pytest.raises(PendingError, match="a request was still running"):
            tracker.close("FINISHED")
