import itertools
import json
import math
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_metric_name

from wmtp.errors import PendingError
from wmtp.tracking.follow import Position, Stored, batches, clean_name, count_lines, line_points, lines_after
from wmtp.tracking.jsonl import FILE_NAME, MetricsFile
from wmtp.tracking.mlflow import MlflowTracker, absolute_uri

Metrics = dict[str, float]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs and the one store of these tests lie; a path as people have them."""
    return tmp_path_factory.mktemp("my runs 50%") / "outputs"


@pytest.fixture(scope="module")
def client(outputs: Path) -> MlflowClient:
    """Reads the store back, once a first run has made it."""
    track(outputs / "first", [])
    return MlflowClient(tracking_uri=f"sqlite:///{outputs}/mlflow.db")


@pytest.fixture
def silent_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that takes connections and never answers; one request to it lasts a second."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def write(folder: Path, steps: list[Metrics], first_step: int = 1, resume_step: int | None = None) -> None:
    """Lines of metrics.jsonl, as a run writes them."""
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
    """A whole run; returns its id in MLflow."""
    tracker = start(folder, parameters)
    write(folder, steps)
    tracker.close("FINISHED")
    return receipt(folder)["run_id"]


def receipt(folder: Path) -> Any:
    return json.loads((folder / "mlflow.json").read_text())


def sent_lines(folder: Path) -> dict[str, int]:
    """How many lines of each file the receipt says were sent."""
    if not (folder / "mlflow.json").exists():
        return {}
    return {name: position["lines"] for name, position in receipt(folder)["sent"].items()}


def attempt(folder: Path, tracker: MlflowTracker, resume_step: int, logged: dict[int, list[Metrics]]) -> None:
    """What one process of a run writes: the lines of its steps, after it dropped those that it makes again."""
    file = MetricsFile(folder, resume_step)
    for step, lines in logged.items():
        for metrics in lines:
            file.log(step, 0, metrics)
            tracker.log(step, 0, metrics)
    file.close("RUNNING")


def held(folder: Path) -> set[tuple[str, int, float]]:
    """The points that metrics.jsonl holds."""
    lines = (folder / FILE_NAME).read_bytes().splitlines()
    return {(name, step, value) for line in lines for name, value, _, step in line_points(json.loads(line))}


def history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, name)]


def stored(client: MlflowClient, run_id: str) -> list[tuple[str, int, float]]:
    """The points that MLflow has."""
    names = client.get_run(run_id).data.metrics
    return sorted((name, *point) for name in names for point in history(client, run_id, name))


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
    assert receipt(folder) == {"run_id": run_id, "uri": uri, "sent": {FILE_NAME: position}}
    assert {artifact.path for artifact in client.list_artifacts(run_id)} == {"config.yaml", "summary.json"}
    assert (outputs / "mlartifacts" / run_id / "artifacts" / "config.yaml").read_text() == "seed: 0"


@pytest.mark.parametrize("state", ["FINISHED", "FAILED", "KILLED"])
def test_the_final_status(client: MlflowClient, outputs: Path, state: str) -> None:
    tracker = start(outputs / state)
    tracker.close(state)
    assert client.get_run(receipt(outputs / state)["run_id"]).info.status == state


def test_metrics_arrive_while_the_run_goes_on(client: MlflowClient, outputs: Path) -> None:
    folder = outputs / "live"
    tracker = start(folder)
    attempt(folder, tracker, 0, {1: [{"train/loss": 2.0}]})
    wait_for(lambda: sent_lines(folder) == {FILE_NAME: 1})
    run = client.get_run(receipt(folder)["run_id"])
    assert run.info.status == "RUNNING" and run.data.metrics == {"train/loss": 2.0}
    tracker.close("FINISHED")
    assert client.get_run(run.info.run_id).info.status == "FINISHED"


def test_values_that_are_not_finite_are_counted(client: MlflowClient, outputs: Path) -> None:
    run_id = track(outputs / "nan", [{"a": 1.0}, {"a": float("nan"), "b": float("inf"), "c": 2.0}])
    assert client.get_run(run_id).data.metrics == {"a": 1.0, "c": 2.0, "nonfinite": 2.0}
    assert history(client, run_id, "nonfinite") == [(2, 2.0)]


def test_a_continued_run_has_nothing_twice(client: MlflowClient, outputs: Path) -> None:
    folder, steps = outputs / "resumed", [{"loss": float(i)} for i in range(1, 7)]
    run_id = track(folder, steps[:4], {"lr": 0.1, "same": 1, "long": "x" * 7000})

    write(folder, [], resume_step=2)  # the checkpoint was at step 2, so steps 3 and 4 are written again
    tracker = start(folder, {"lr": 0.2, "same": 1, "new": True, "long": "x" * 7000})
    wait_for(lambda: client.get_run(run_id).info.status == "RUNNING")
    write(folder, steps[2:], first_step=3)
    tracker.close("FINISHED")

    assert receipt(folder)["run_id"] == run_id and sent_lines(folder) == {FILE_NAME: 6}
    assert history(client, run_id, "loss") == [(i, float(i)) for i in range(1, 7)]
    run = client.get_run(run_id)
    assert run.data.params == {"lr": "0.1", "same": "1", "new": "True", "long": "x" * 6000}
    assert {name: value for name, value in run.data.tags.items() if "resumed" in name} == {"resumed.lr": "0.2"}
    assert run.info.status == "FINISHED"

    track(folder, [], {"lr": 0.1})
    assert client.get_run(run_id).data.tags["resumed.lr"] == "0.1"


def test_the_stage_before_the_training_is_shown_in_the_same_run(client: MlflowClient, outputs: Path) -> None:
    folder, stage, stage_file = outputs / "staged", outputs / "staged" / "pretrain", f"pretrain/{FILE_NAME}"
    tracker = start(folder)
    stage.mkdir()
    attempt(stage, tracker, 0, {1: [{"train/loss": 9.0}], 2: [{"train/loss": 8.0, "b": math.nan}, {"val/loss": 7.0}]})
    wait_for(lambda: sent_lines(folder) == {stage_file: 3})
    (stage / "result.json").write_text("{}")
    (stage / "value_head.safetensors").write_bytes(b"weights")
    attempt(folder, tracker, 0, {1: [{"train/loss": 2.0}], 2: [{"train/loss": 1.0}]})
    tracker.close("KILLED")

    tracker = start(folder)  # the stage is done, the training goes on from step 1
    attempt(folder, tracker, 1, {2: [{"train/loss": 1.0}], 3: [{"train/loss": 0.5}]})
    tracker.close("FINISHED")

    run_id = receipt(folder)["run_id"]
    assert stored(client, run_id) == [
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
    """The control is a receipt that only counts lines: it takes the new ones for those of the dead attempt."""
    folder = outputs / "interval"
    run_id = track(folder, [{"loss": 1 / step} for step in range(1, 8)])
    tracker = start(folder)
    attempt(folder, tracker, 5, {step: [{"loss": 1 / step}] for step in (6, 8, 10)})
    tracker.close("FINISHED")

    by_count = (folder / FILE_NAME).read_text().splitlines()[7:]
    assert [json.loads(line)["step"] for line in by_count] == [10]
    points = history(client, run_id, "loss")
    assert points == [(step, 1 / step) for step in (1, 2, 3, 4, 5, 6, 7, 8, 10)]  # MLflow cannot forget step 7


def test_what_a_resumed_run_changed_is_sent_beside_what_was_there(client: MlflowClient, outputs: Path) -> None:
    folder = outputs / "changed"
    run_id = track(folder, [{"loss": 3.0, "same": 1.0}, {"loss": 2.0, "same": 1.0}, {"loss": 1.0, "same": 1.0}])
    tracker = start(folder)
    attempt(folder, tracker, 1, {2: [{"loss": 2.5, "same": 1.0}], 3: [{"loss": 1.5, "same": 1.0}]})
    tracker.close("FINISHED")
    assert history(client, run_id, "loss") == [(1, 3.0), (2, 2.0), (3, 1.0), (2, 2.5), (3, 1.5)]
    assert client.get_run(run_id).data.metrics == {"loss": 1.5, "same": 1.0}, "the latest is the resumed run's"
    assert history(client, run_id, "same") == [(1, 1.0), (2, 1.0), (3, 1.0)]


def test_lines_that_resuming_drops_are_not_sent(client: MlflowClient, outputs: Path) -> None:
    """Resuming drops lines while the tracker is there. The control is one that sends before the first new line."""
    found = {}
    for early in (True, False):
        folder = outputs / f"early {early}"
        write(folder, [{"loss": float(step)} for step in range(1, 5)])
        tracker = start(folder)
        if early:
            tracker.log(2, 0, {})
            wait_for(lambda folder=folder: sent_lines(folder) == {FILE_NAME: 4})  # type: ignore[misc]
        else:
            wait_for((folder / "mlflow.json").exists)
            time.sleep(0.2)  # four times as long as it pauses
        attempt(folder, tracker, 2, {3: [{"loss": 3.0}], 4: [{"loss": 40.0}], 6: [{"loss": 6.0}]})
        tracker.close("FINISHED")
        found[early] = stored(client, receipt(folder)["run_id"])
        assert sent_lines(folder) == {FILE_NAME: 5}
    assert found[False] == [
        ("loss", step, value) for step, value in ((1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (6, 6.0))
    ]
    assert found[True] == sorted([*found[False], ("loss", 4, 4.0)])


@pytest.mark.parametrize("asks", [True, False])
def test_points_that_were_sent_but_not_noted_are_not_sent_again(
    client: MlflowClient, outputs: Path, monkeypatch: pytest.MonkeyPatch, asks: bool
) -> None:
    """The control trusts the receipt instead of asking MLflow."""
    folder = outputs / f"unnoted {asks}"
    run_id = track(folder, [{"loss": 1.0}, {"loss": 2.0}])
    noted = (folder / "mlflow.json").read_bytes()
    tracker = start(folder)
    attempt(folder, tracker, 2, {3: [{"loss": 3.0}], 4: [{"loss": 4.0}]})
    tracker.close("RUNNING")
    (folder / "mlflow.json").write_bytes(noted)  # as if it had been killed between the request and the receipt

    if not asks:
        monkeypatch.setattr(MlflowTracker, "_ask", lambda *args: Stored())
    tracker = start(folder)
    attempt(folder, tracker, 2, {3: [{"loss": 3.0}], 4: [{"loss": 4.0}], 5: [{"loss": 5.0}]})
    tracker.close("FINISHED")
    steps = [step for step, _ in history(client, run_id, "loss")]
    assert sorted(steps) == ([1, 2, 3, 4, 5] if asks else [1, 2, 3, 3, 4, 4, 5])


def test_both_lines_of_a_step_are_sent_and_what_they_share_once(client: MlflowClient, outputs: Path) -> None:
    folder = outputs / "two lines"
    tracker = start(folder)
    attempt(
        folder, tracker, 0, {1: [{"train/loss": 1.0, "both": 0.0, "a": 1.0}, {"val/loss": 2.0, "both": 0.0, "a": 2.0}]}
    )
    tracker.close("FINISHED")
    points = [("a", 1, 1.0), ("a", 1, 2.0), ("both", 1, 0.0), ("train/loss", 1, 1.0), ("val/loss", 1, 2.0)]
    assert stored(client, receipt(folder)["run_id"]) == points


@pytest.mark.parametrize("seed", range(3))
def test_any_crashes_leave_every_point_once(
    client: MlflowClient, outputs: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Attempts log at intervals of their own, and die anywhere, also between a request and its receipt."""
    draw, folder = random.Random(seed), outputs / f"crashes {seed}"
    acknowledge, step, ever = MlflowTracker._acknowledge, 0, set[tuple[str, int]]()
    for lives in (False, False, False, False, True):
        calls, last_call = itertools.count(1), math.inf if lives else draw.randint(2, 8)

        def mortal(*args: Any, calls: Iterator[int] = calls, last_call: float = last_call) -> None:
            if next(calls) > last_call:
                raise RuntimeError("killed")
            acknowledge(*args)

        monkeypatch.setattr(MlflowTracker, "_acknowledge", mortal)
        monkeypatch.setattr("wmtp.tracking.follow.POINTS_PER_CALL", draw.choice([1, 7, 500]))
        tracker = start(folder)
        lines: dict[int, list[Metrics]] = {}
        for logged in range(step + 1, step + 12, draw.randint(1, 3)):
            same = {"early_stopping/patience": float(logged // 4)}
            lines[logged] = [{"train/loss": 1 / logged, "train/tokens_per_second": time.perf_counter()} | same]
            if logged % 3 == 0:
                lines[logged].append({"val/loss": 2 / logged} | same)
        attempt(folder, tracker, step, lines)
        with nullcontext() if lives else suppress(PendingError):
            tracker.close("FINISHED")
        ever |= {(name, at) for name, at, _ in held(folder)}
        step += draw.randint(0, 8)

    points = stored(client, receipt(folder)["run_id"])
    steps = [(name, at) for name, at, _ in points]
    assert len(set(steps)) == len(steps), "a step was sent twice"
    assert {(name, at) for name, at, _ in held(folder)} <= set(steps) <= ever
    assert {point for point in held(folder) if "per_second" not in point[0]} <= set(points)


def test_a_receipt_of_another_form_is_a_reason_to_ask(client: MlflowClient, outputs: Path) -> None:
    folder = outputs / "old receipt"
    run_id = track(folder, [{"loss": 1.0}, {"loss": 2.0}])
    old = {"run_id": run_id, "uri": receipt(folder)["uri"], "sent_lines": 2}
    (folder / "mlflow.json").write_text(json.dumps(old))
    start(folder).close("FINISHED")
    assert history(client, run_id, "loss") == [(1, 1.0), (2, 2.0)] and sent_lines(folder) == {FILE_NAME: 2}


def test_a_run_that_was_deleted_is_made_again(client: MlflowClient, outputs: Path) -> None:
    folder = outputs / "deleted"
    first = track(folder, [{"loss": 1.0}])
    client.delete_run(first)
    second = track(folder, [{"loss": 2.0}])
    assert second != first and client.get_run(second).data.metrics == {"loss": 2.0}
    assert [value for _, value in history(client, second, "loss")] == [1.0, 2.0]


def test_failing_calls_are_tried_again(
    client: MlflowClient, outputs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log_batch, failures = MlflowClient.log_batch, iter(range(3))

    def flaky(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        if next(failures, None) is not None:
            raise MlflowException("out of order")
        return log_batch(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", flaky)
    run_id = track(outputs / "flaky", [{"loss": 1.0}, {"loss": 2.0}], {"lr": 0.1})
    assert history(client, run_id, "loss") == [(1, 1.0), (2, 2.0)]
    assert client.get_run(run_id).data.params == {"lr": "0.1"}
    assert next(record.levelname for record in caplog.records if "out of order" in record.message) == "WARNING"


def test_a_failing_artifact_store_leaves_status_and_metrics_right(
    client: MlflowClient, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise OSError("no credentials")

    monkeypatch.setattr(MlflowClient, "log_artifact", broken)
    folder = outputs / "artifacts"
    write(folder, [{"loss": 1.0}])
    (folder / "train.log").touch()
    tracker = start(folder, close_seconds=2)
    with pytest.raises(PendingError, match=r"0 of 1 lines.*no credentials"):
        tracker.close("FAILED")
    run = client.get_run(receipt(folder)["run_id"])
    assert run.info.status == "FAILED" and run.data.metrics == {"loss": 1.0}


def test_training_never_waits(silent_server: str, tmp_path: Path) -> None:
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


def test_a_server_that_cannot_be_reached(tmp_path: Path) -> None:
    write(tmp_path, [{"loss": float(i)} for i in range(20)])
    before = (tmp_path / FILE_NAME).read_bytes()
    tracker = start(tmp_path, uri="http://127.0.0.1:9", close_seconds=3)
    started = time.monotonic()
    with pytest.raises(PendingError, match="20 of 20 lines") as pending:
        tracker.close("FINISHED")
    assert 2.9 < time.monotonic() - started < 15
    assert str(tmp_path / FILE_NAME) in str(pending.value) and "refused" in str(pending.value)
    assert (tmp_path / FILE_NAME).read_bytes() == before
    tracker._thread.join(10)
    assert not tracker._thread.is_alive(), "the thread goes on after it was given up"


def test_a_broken_receipt_is_reported(tmp_path: Path) -> None:
    (tmp_path / "mlflow.json").write_text("{")
    with pytest.raises(PendingError, match="JSONDecodeError"):
        start(tmp_path, uri="http://127.0.0.1:9").close("FINISHED")


def test_importing_and_constructing_leave_mlflow_to_the_thread(tmp_path: Path) -> None:
    program = "import sys, wmtp.tracking.mlflow; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@given(st.text(max_size=300) | st.text("./ _a[]=@:é\n", max_size=300))
def test_clean_names_are_taken_by_mlflow(name: str) -> None:
    cleaned = clean_name(name)
    _validate_metric_name(cleaned)
    assert 0 < len(cleaned) <= 250
    assert clean_name(cleaned) == cleaned


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("train/head_1_loss", "train/head_1_loss"),
        ("a[0]=b@c", "a_0__b_c"),
        ("../up", "_/up"),
        ("..a", "_a"),
        ("/a//b/./c/", "a/b/_/c"),
        ("", "_"),
    ],
)
def test_clean_names(name: str, cleaned: str) -> None:
    assert clean_name(name) == cleaned


def test_lines_are_read_once_and_whole(tmp_path: Path) -> None:
    path, position = tmp_path / "lines", Position()
    assert lines_after(path, position) == []
    path.write_bytes(b"a\nb")
    assert lines_after(path, position) == [b"a\n"]
    position = position.after([b"a\n"])
    assert lines_after(path, position) == []
    with path.open("ab") as file:
        file.write(b"c\nd\n")
    assert lines_after(path, position) == [b"bc\n", b"d\n"]
    position = position.after([b"bc\n", b"d\n"])
    assert position == Position(3, 7, "d\n") and count_lines(path, position) == (3, 0)


@pytest.mark.parametrize(
    ("content", "cut", "pending"),
    [
        (b"aa\nbb\ncc\n", False, 1),
        (b"aa\nbb\n", False, 0),
        (b"aa\n", True, 1),
        (b"aa\nb2\ncc\n", True, 3),
        (b"", True, 0),
    ],
)
def test_a_file_that_was_cut_is_noticed_whatever_was_written_since(
    tmp_path: Path, content: bytes, cut: bool, pending: int
) -> None:
    path = tmp_path / "lines"
    path.write_bytes(content)
    position = Position().after([b"aa\n", b"bb\n"])
    assert (lines_after(path, position) is None) == cut
    assert count_lines(path, position) == (content.count(b"\n"), pending)


@given(st.lists(st.integers(0, 600), max_size=12))
def test_batches_hold_whole_lines(sizes: list[int]) -> None:
    lines = [
        json.dumps({"step": step, "epoch": 0, "time": 1.5} | {f"m{i}": i for i in range(size)}).encode()
        for step, size in enumerate(sizes)
    ]
    cut = list(batches(lines))
    assert [line for batch, _ in cut for line in batch] == lines
    assert all(len(points) <= 500 or len(batch) == 1 for batch, points in cut)
    assert [point for _, points in cut for point in points] == [
        point for line in lines for point in line_points(json.loads(line))
    ]


def test_the_store_lies_in_outputs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert absolute_uri(None, Path("/x/outputs/day/outputs/run")) == "sqlite:////x/outputs/day/outputs/mlflow.db"
    assert absolute_uri(None, Path("/x/sweep/run")) == "sqlite:////x/sweep/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert absolute_uri("sqlite:///my.db", Path("/x")) == f"sqlite:///{Path.cwd()}/my.db"
    assert absolute_uri("https://host", Path("/x")) == "https://host"
