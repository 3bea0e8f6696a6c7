"""Tests of the commands with missing, killed or faulty servers, and with killed training runs."""

import itertools
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.forking import Child
from tests.support.proxy import FaultyProxy
from tests.support.world import World, last_model, lines_of, points_of, read_json, wait_until

pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.xdist_group("servers")]


@pytest.fixture
def s3_proxy(world: World) -> Iterator[FaultyProxy]:
    """Yield a proxy between the commands and the store."""
    with FaultyProxy(world.store.endpoint_url) as proxy:
        world.variables["AWS_ENDPOINT_URL_S3"] = proxy.url
        yield proxy


@pytest.fixture
def mlflow_proxy(world: World) -> Iterator[FaultyProxy]:
    """Yield a proxy between the commands and the MLflow server."""
    with FaultyProxy(world.server.uri) as proxy:
        world.variables["MLFLOW_TRACKING_URI"] = proxy.url
        yield proxy


def wait_for_steps(world: World, child: Child, steps: int) -> Path:
    """Wait until metrics.jsonl of the newest run has `steps` lines, and return the run's folder."""
    wait_until(lambda: world.folders() and len(lines_of(world.folders()[-1])) >= steps, child)
    return world.folders()[-1]


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in a run's local folder."""
    return sorted(path.parent for path in folder.glob("checkpoints/step_*/manifest.json"))


def resumed_from(child: Child) -> int:
    """Return the step from which a training run was resumed, as printed in its output."""
    found = re.search(r"resuming from .*step_0*(\d+)", child.text)
    assert found is not None, child.text
    return int(found[1])


def uploaded_steps(world: World, folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints of a run in the store."""
    return [int(key.split("/")[1][5:]) for key in world.keys(folder) if key.endswith("/manifest.json")]


def step_seconds(folder: Path) -> float:
    """Return the seconds of the fastest step. If each step waited for the server, the fastest one would be slow too."""
    times = [float(line["time"]) for line in lines_of(folder)]
    return min(after - before for before, after in itertools.pairwise(times))


def test_training_continues_without_the_mlflow_server_and_loses_no_metrics(
    world: World, mlflow_proxy: FaultyProxy
) -> None:
    mlflow_proxy.dead = True
    alone, folder = (world.home / "outputs" / "day" / name for name in ("alone", "tracked"))
    # both run at the same time, so other load slows both equally
    untracked = world.train("tracking=none", f"hydra.run.dir={alone}", "max_steps=60")
    child = world.train(*world.tracked, f"hydra.run.dir={folder}", "max_steps=60")
    assert (untracked.wait(), child.wait()) == (0, 3), child.text
    assert points_of(folder) == points_of(alone) and len(points_of(folder)) == 60
    assert step_seconds(folder) < 1.5 * step_seconds(alone)
    assert read_json(folder / "status.json")["state"] == "FINISHED"
    assert f"python -m wmtp.sync outputs/{folder.parent.name}/{folder.name}" in child.err
    assert mlflow_proxy.done["dead"] < 40, "a dead server gets few requests"

    child = world.sync()
    assert child.wait() == 3, child.text
    mlflow_proxy.dead = False
    assert world.runs() == []
    child = world.sync()
    assert child.wait() == 0, child.text
    assert "status FINISHED" in child.out
    (run,) = world.runs()
    assert run.info.status == "FINISHED" and world.history(run) == points_of(folder)
    assert float(run.data.params["tracking.stall_seconds"]) == 8, "settings of sync do not replace those of the run"
    assert not any(name.startswith("resumed.") for name in run.data.tags)


def test_every_step_is_sent_once_after_kills_of_server_and_training(world: World) -> None:
    long = ["data.num_train=400", "max_steps=150", "save_interval=50", "eval_interval=1000"]
    child = world.train(*world.tracked, *long)
    folder = wait_for_steps(world, child, 40)
    wait_until(lambda: world.runs() and len(world.history(world.runs()[0])) > 55, child)
    world.server.kill()
    wait_for_steps(world, child, 80)
    child.kill()
    assert read_json(folder / "status.json")["state"] == "RUNNING"
    num_local = len(points_of(folder))
    world.server.start()
    (run,) = world.runs()
    known = world.history(run)
    assert run.info.status == "RUNNING" and 50 < len(known) < num_local < 150

    child = world.start("train", f"resume={folder}", "save_interval=40")
    assert child.wait() == 0, child.text
    assert resumed_from(child) < len(known), "steps that MLflow already had were computed again"
    (run,) = world.runs()
    assert [step for step, _ in points_of(folder)] == list(range(1, 151))
    assert world.history(run) == points_of(folder) and len(world.history(run)) == 150
    assert run.info.status == "FINISHED"
    assert run.data.params["save_interval"] == "50" and run.data.tags["resumed.save_interval"] == "40"


@pytest.mark.parametrize("attempts", [1, pytest.param(6, marks=pytest.mark.deep)])
def test_killed_training_resumes_elsewhere_from_s3_bit_for_bit(world: World, tmp_path: Path, attempts: int) -> None:
    """The first attempt is killed when MLflow has a step after the last checkpoint, the others at random times."""
    steps = 60
    settings = [f"max_steps={steps}", "eval_interval=30"]
    assert world.train("tracking=none", *settings).wait() == 0
    (undisturbed,) = world.folders()
    rng, repeated = random.Random(0), 0
    for attempt in range(attempts):
        world.home, world.experiment = tmp_path / f"home {attempt}", f"killed-{attempt}-{time.time_ns()}"
        child = world.train(*world.tracked, *world.stored, *settings)
        folder = wait_for_steps(world, child, 1)
        wait_until(lambda: uploaded_steps(world, folder), child)  # noqa: B023
        if attempt == 0:
            wait_until(lambda: len(world.history(world.runs()[0])) > max(uploaded_steps(world, folder)), child)  # noqa: B023
        else:
            time.sleep(rng.uniform(0, 1))
        child.kill()
        (run,) = world.runs()
        known, url = world.history(run), world.url(folder)
        folder.rename(tmp_path / f"lost {attempt}")
        if attempt == 0:  # mlflow.json, which names the MLflow run, may not be uploaded yet
            world.store.client().delete_object(Bucket=world.store.bucket, Key=f"{world.prefix(folder)}mlflow.json")

        world.home = tmp_path / f"another machine {attempt}"
        child = world.start("train", f"resume={url}")
        assert child.wait() == 0, child.text
        (folder,) = world.folders()
        assert world.url(folder) == url
        assert last_model(folder, steps) == last_model(undisturbed, steps)
        assert world.content(folder, f"checkpoints/step_{steps:08d}/model.safetensors") == last_model(folder, steps)
        repeated += resumed_from(child) < len(known)
        (run,) = world.runs()
        assert run.info.status == "FINISHED"
        assert world.history(run) == points_of(undisturbed) and len(world.history(run)) == steps
    assert repeated, "no step that MLflow already had was computed again, so the test proves nothing"


@pytest.mark.parametrize("sender", ["sync", "resume"])
def test_checkpoints_are_sent_after_an_outage_of_the_store(world: World, s3_proxy: FaultyProxy, sender: str) -> None:
    s3_proxy.dead = True
    child = world.train("tracking=none", *world.stored, "checkpoint.s3.stall_seconds=3")
    assert child.wait() == 3, child.text
    (folder,) = world.folders()
    pending = re.search(r"0 of (\d+) checkpoints uploaded", child.err)
    assert pending is not None and "wmtp.sync" in child.err and "Traceback" not in child.text, child.err
    assert len(complete_checkpoints(folder)) >= int(pending[1]) >= 2
    assert read_json(folder / "status.json")["state"] == "FINISHED"

    assert world.sync().wait() == 3
    s3_proxy.dead = False
    assert world.keys(folder) == []
    child = world.sync() if sender == "sync" else world.start("train", f"resume={folder}")
    assert child.wait() == 0, child.text
    assert sender == "resume" or f"{pending[1]} checkpoints" in child.out, child.text
    assert len(complete_checkpoints(folder)) == int(pending[1])
    for path in complete_checkpoints(folder):
        for file in path.iterdir():
            key = file.relative_to(folder).as_posix()
            assert file.name == "uploaded.json" or world.has_copy(folder, key), key

    assert world.has_copy(folder, "train.log")
    if world.content(folder, "train.log") != (folder / "train.log").read_bytes():
        assert world.sync().wait() == 0  # the notice of a slow upload was written after the log was uploaded
    before = world.modification_times(folder)
    child = world.sync()
    assert child.wait() == 0 and "nothing was missing" in child.out, child.text
    assert world.modification_times(folder) == before, "nothing is sent twice"


def test_sync_during_training_and_after_a_kill(world: World) -> None:
    child = world.train(*world.tracked, *world.stored, "max_steps=2000")
    folder = wait_for_steps(world, child, 10)
    sync_during = world.sync()
    assert sync_during.wait() == 0 and "is running, and uploads its own data" in sync_during.out, sync_during.text
    wait_for_steps(world, child, len(lines_of(folder)) + 5)
    child.kill()
    (run,) = world.runs()
    assert run.info.status == "RUNNING"

    sync_after = world.sync()
    assert sync_after.wait() == 0 and "recorded as KILLED" in sync_after.out, sync_after.text
    (run,) = world.runs()
    assert run.info.status == read_json(folder / "status.json")["state"] == "KILLED"
    assert world.history(run) == points_of(folder)
    newest = max(int(path.name.removeprefix("step_")) for path in complete_checkpoints(folder))
    assert world.content(folder, f"checkpoints/step_{newest:08d}/model.safetensors") == last_model(folder, newest)


def test_uploads_survive_network_faults(world: World, s3_proxy: FaultyProxy) -> None:
    child = world.train("tracking=none", *world.stored, "checkpoint.s3.checksums=when_required", "max_steps=60",
                        "checkpoint.s3.stall_seconds=30")  # fmt: skip
    folder = wait_for_steps(world, child, 1)
    s3_proxy.answer(503, 5)
    s3_proxy.drop(2, ("PUT",))
    s3_proxy.flip(2)
    s3_proxy.stall(2.0)
    assert child.wait() == 0, child.text
    assert s3_proxy.done == {"answer": 5, "drop": 2, "flip": 2, "stall": 1, "dead": 0}
    keys = world.keys(folder)
    checkpoints = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert sorted({key.split("/")[1] for key in keys if key.startswith("checkpoints/step_")}) == checkpoints
    for key in keys:
        assert world.has_copy(folder, key), key
    uploads = world.store.client().list_multipart_uploads(Bucket=world.store.bucket)
    assert uploads.get("Uploads", []) == []
