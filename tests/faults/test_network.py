"""Tests of the commands with a real MLflow server and a real S3 store."""

import math
from base64 import b64encode
from pathlib import Path

import pytest
from mlflow import MlflowClient
from omegaconf import OmegaConf

from tests.support.world import World, last_model, lines_of, points_of, read_json, wait_until

pytestmark = [pytest.mark.servers, pytest.mark.slow, pytest.mark.xdist_group("servers")]


def secrets_of(world: World) -> list[bytes]:
    """Return the secrets that must not be written anywhere, in every form in which they are used."""
    pair = f"{world.server.username}:{world.server.password}".encode()
    return [world.server.password.encode(), world.store.secret_key.encode(), b64encode(pair)]


def files_with_secrets(world: World, *paths: Path) -> list[Path]:
    """Return the files at or below some paths that contain a secret."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return [file for file in files if any(secret in file.read_bytes() for secret in secrets_of(world))]


def flatten(node: object, key: str = "") -> dict[str, object]:
    """Return a nested config as one dictionary with dotted keys; empty groups and all lists are values."""
    if isinstance(node, dict) and node:
        return {name: value for part in node for name, value in flatten(node[part], f"{key}.{part}").items()}
    return {key.removeprefix("."): node}


def test_a_run_is_read_back_from_both_servers(world: World) -> None:
    world.home.mkdir()
    environment = world.home / ".env"
    environment.write_text("".join(f"{name}={value}\n" for name, value in world.variables.items()))
    variables, world.variables = world.variables, {"PYTHON_DOTENV_DISABLED": "0"}
    child = world.train(*world.tracked, *world.stored, "algo=critic", "pretrain.num_epochs=1", "tags.note=first",
                        "run_name=a name")  # fmt: skip
    assert child.wait() == 0, child.text
    world.variables = variables
    (folder,), (run,) = world.folders(), world.runs()

    assert (run.info.run_name, run.info.status) == ("a name", "FINISHED")
    expected = flatten(OmegaConf.to_container(OmegaConf.load(folder / "config.yaml")))
    options = run.data.params.keys() - expected.keys()
    assert run.data.params.keys() >= expected.keys() and {"algo", "model", "data", "optimizer"} <= options
    assert {run.data.params[name] for name in ("max_steps", "algo.beta")} == {"20", str(expected["algo.beta"])}
    run_identity = read_json(folder / "run.json")
    assert run_identity["remote"] == world.url(folder)
    assert run.data.tags["note"] == "first" and run.data.tags["wmtp.run"] == run_identity["id"]
    assert run.inputs is not None
    assert {each.tags[0].value for each in run.inputs.dataset_inputs} == {"train", "validation"}

    logged = {name for line in lines_of(folder) for name in line if "/" in name}
    assert {"train/loss", "train/head_1_loss", "val/loss", "train/weight_mean"} <= logged
    for name in logged:
        expected_points = [point for point in points_of(folder, name) if math.isfinite(point[1])]
        assert world.history(run, name) == expected_points, name
    assert [step for step, _ in world.history(run)] == list(range(1, 21))
    assert world.history(run, "pretrain/train/loss") or world.history(run, "pretrain/train/value_loss")

    artifacts = {each.path for each in world.client.list_artifacts(run.info.run_id)}
    assert {"config.yaml", "summary.json", "checkpoints"} <= artifacts
    copied = Path(world.client.download_artifacts(run.info.run_id, "config.yaml", str(world.home)))
    assert copied.read_bytes() == (folder / "config.yaml").read_bytes()

    checkpoints = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    keys = world.keys(folder)
    assert sorted({key.split("/")[1] for key in keys if key.startswith("checkpoints/step_")}) == checkpoints
    sent = [key for key in keys if key.startswith("checkpoints/step_")]
    assert {key.split("/")[-1] for key in sent} >= {"manifest.json", "model.safetensors", "optimizer.safetensors"}
    for key in [*sent, "config.yaml", "metrics.jsonl"]:
        assert world.has_copy(folder, key), key

    environment.unlink()
    assert files_with_secrets(world, world.home, world.server.database) == []
    (world.home / "planted").write_text(f"password={world.server.password}")
    assert files_with_secrets(world, world.home) == [world.home / "planted"], "control: the search finds a secret"


def test_the_model_in_the_bucket_is_the_model_on_disk(world: World, tmp_path: Path) -> None:
    assert world.train(*world.tracked, *world.stored).wait() == 0
    (folder,) = world.folders()
    elsewhere = tmp_path / "elsewhere"
    answers = [
        world.start("generate", f"checkpoint={place}", "prompt=print", "hardware=cpu", home=elsewhere)
        for place in (folder, world.url(folder))
    ]
    assert [answer.wait() for answer in answers] == [0, 0], answers[1].text
    assert answers[0].out.splitlines()[-1] == answers[1].out.splitlines()[-1]
    world.store.stop()
    assert world.start("generate", f"checkpoint={world.url(folder)}", "prompt=print", home=tmp_path / "third").wait()


def test_downloaded_model_does_not_replace_newer_records(world: World, tmp_path: Path) -> None:
    """A run that is downloaded for its model lacks newer records; sync must not treat it as a newer copy of the run."""
    assert world.train("tracking=none", *world.stored, "max_steps=10").wait() == 0
    (folder,) = world.folders()
    elsewhere = world.start("train", f"resume={world.url(folder)}", "max_steps=15", home=tmp_path / "elsewhere")
    assert elsewhere.wait() == 0, elsewhere.text
    before = world.modification_times(folder)
    used = world.start("generate", f"checkpoint={world.url(folder)}", "prompt=print", "hardware=cpu")
    assert used.wait() == 0, used.text
    assert not (folder / "checkpoints" / "step_00000015").exists()
    synced = world.sync()
    assert synced.wait() == 0 and "nothing to send" in synced.out and "resumed elsewhere" in synced.out
    assert world.modification_times(folder) == before
    assert world.start("train", f"resume={folder}", "max_steps=20").wait() == 2, "the run was resumed elsewhere"


def test_a_sweep_is_an_mlflow_run_with_its_jobs_as_children(world: World) -> None:
    child = world.train(*world.tracked, *world.stored, "-m", "max_grad_norm=1.0,0.5", "sweep.jobs=2")
    assert child.wait() == 0, child.text
    runs = world.runs()
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run is not parent]
    assert {run.data.params["max_grad_norm"] for run in children} == {"1.0", "0.5"}
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    assert [run.info.status for run in runs] == ["FINISHED"] * 3
    assert {run.info.run_name for run in children} == {"max_grad_norm=1.0", "max_grad_norm=0.5"}
    assert {(run.data.params["algo"], run.data.params["model"]) for run in children} == {("baseline", "nano")}
    assert parent.data.params["max_grad_norm"] == "1.0, 0.5" and parent.data.metrics["jobs/finished"] == 2
    assert all(len(world.history(run)) == 20 for run in children) and world.history(parent) == []


def test_ten_simultaneous_launches_are_ten_runs_in_ten_folders(world: World) -> None:
    """All runs use one SQLite database that does not exist yet; on busy cores, its creation can take a minute."""
    local = ["tracking.uri=null", "tracking.experiment=together", "tracking.system_seconds=null", "max_steps=2",
             "tracking.stall_seconds=150", "tracking.close_seconds=150"]  # fmt: skip
    no_server = dict.fromkeys(world.server.environment(), "")
    children = [world.train(*local, f"seed={seed}", variables=no_server) for seed in range(10)]
    assert [child.text for child in children if child.wait(240)] == []
    folders = world.folders()
    assert len(folders) == 10 and {read_json(folder / "summary.json")["total_steps"] for folder in folders} == {2}
    client = MlflowClient(f"sqlite:///{world.home / 'outputs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("together")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.data.params["seed"] for run in runs} == {str(seed) for seed in range(10)} and len(runs) == 10
    assert {run.info.run_name for run in runs} == {folder.name for folder in folders}
    assert all(len(client.get_metric_history(run.info.run_id, "train/loss")) == 2 for run in runs)


@pytest.mark.parametrize("end", ["fails", "interrupted"])
def test_failures_and_interruptions_are_recorded(world: World, end: str) -> None:
    overrides = ["optimizer.lr=1e30"] if end == "fails" else ["max_steps=2000"]
    child = world.train(*world.tracked, *world.stored, *overrides)
    if end == "interrupted":
        wait_until(lambda: world.folders() and len(lines_of(world.folders()[0])) > 5, child)
        assert child.kill(15) == 143, child.text
    assert child.wait() == (1 if end == "fails" else 143), child.text
    (run,), (folder,) = world.runs(), world.folders()
    assert run.info.status == ("FAILED" if end == "fails" else "KILLED")
    assert world.history(run) == points_of(folder)
    if end == "fails":  # the uploaded log contains the error, and only once
        log = world.content(folder, "train.log").decode()
        assert world.has_copy(folder, "train.log") and log.count("Traceback") == 1 and "TrainingError" in log
    if end == "interrupted":
        step = lines_of(folder)[-1]["step"]
        assert world.content(folder, f"checkpoints/step_{step:08d}/model.safetensors") == last_model(folder, step)


WRONG = {
    "password": {"MLFLOW_TRACKING_PASSWORD": "not the password"},
    "no user": {"MLFLOW_TRACKING_USERNAME": "", "MLFLOW_TRACKING_PASSWORD": ""},
    "secret key": {"AWS_SECRET_ACCESS_KEY": "not the key"},
    "access key": {"AWS_ACCESS_KEY_ID": "NOBODY"},
    "no keys": {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""},
}


@pytest.mark.parametrize("dry_run", [True, False])
def test_wrong_credentials_are_reported_at_the_start(world: World, dry_run: bool) -> None:
    overrides = [*world.tracked, *world.stored, f"dry_run={dry_run}"]
    children = [(world.train(*overrides, variables=wrong), wrong) for wrong in WRONG.values()]
    children.append((world.train(*overrides, "checkpoint.s3.url=s3://no-such-bucket/runs"), {}))
    for child, wrong in children:
        assert child.wait() == 2, child.text
        assert len(child.err.splitlines()) == 1 and child.out == "", child.text
        assert "set " in child.err or "no-such-bucket" in child.err
        assert not any(value in child.text for value in wrong.values() if value)
    assert files_with_secrets(world, world.home) == [] and world.folders() == []
    assert world.runs() == [] and world.store.keys(world.store.bucket) == []
    if dry_run:
        child = world.train(*overrides)
        assert child.wait() == 0, child.text
        assert world.runs() == [] and world.store.keys(world.store.bucket) == [] and world.folders() == []
