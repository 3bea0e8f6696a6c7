"""Helpers for end-to-end tests with both servers: start commands, and read what they stored on the servers."""

import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from mlflow.entities import Run

from tests.conftest import TINY
from tests.support.forking import Child, ForkServer
from tests.support.servers import ObjectStore, TrackingServer

SMALL = [
    *TINY, "max_steps=20", "num_epochs=99", "batch_size=4", "log_interval=1", "save_interval=5", "eval_interval=10",
    "early_stopping=none", "model.dropout=0.1", "num_samples=0", "hardware=cpu",
]  # fmt: skip
"""Overrides of a training run of about one second that saves four times, with random sample order and dropout."""
QUICK_TRACKING = ["tracking.poll_seconds=0.1", "tracking.stall_seconds=8", "tracking.system_seconds=null"]
UPLOADED = ["checkpoint=s3", "checkpoint.s3.stall_seconds=8"]


@dataclass
class World:
    """The environment of one test user: an empty folder, an empty bucket and a new experiment."""

    fork_server: ForkServer
    store: ObjectStore
    server: TrackingServer
    cache: Path
    home: Path
    experiment: str = field(default_factory=lambda: f"experiment-{uuid.uuid4().hex[:8]}")
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables of the user's commands."""

    def __post_init__(self) -> None:
        self.variables = self.store.environment() | self.server.environment()
        self.client = self.server.client()

    @property
    def remote(self) -> str:
        """The URL below which runs are uploaded."""
        return f"s3://{self.store.bucket}/runs"

    @property
    def tracked(self) -> list[str]:
        """Overrides of a training run that is tracked on the MLflow server."""
        return [f"tracking.experiment={self.experiment}", *QUICK_TRACKING]

    @property
    def stored(self) -> list[str]:
        """Overrides of a training run that is uploaded to the store."""
        return [*UPLOADED, f"checkpoint.s3.url={self.remote}"]

    def start(
        self, command: str, *arguments: str, home: Path | None = None, variables: dict[str, str] | None = None
    ) -> Child:
        """Start a command of the user, by default in the user's folder with the user's variables."""
        environment = self.variables | (variables or {})
        return self.fork_server.start(f"wmtp.{command}", *arguments, folder=home or self.home, variables=environment)

    def train(self, *overrides: str, variables: dict[str, str] | None = None) -> Child:
        """Start a small training run."""
        return self.start("train", *SMALL, f"cache_dir={self.cache}", *overrides, variables=variables)

    def sync(self, folder: Path | str = "outputs") -> Child:
        """Run `python -m wmtp.sync` to its end."""
        child = self.start("sync", str(folder))
        child.wait()
        return child

    def folders(self) -> list[Path]:
        """Return the folders of the user's runs."""
        return sorted(path.parent for path in (self.home / "outputs").glob("*/*/status.json"))

    def url(self, folder: Path) -> str:
        """Return the URL of a run in the store."""
        return f"{self.remote}/{folder.parent.name}/{folder.name}"

    def runs(self) -> list[Run]:
        """Return all runs of the experiment, the oldest first."""
        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            return []
        return sorted(self.client.search_runs([found.experiment_id]), key=lambda run: int(run.info.start_time))

    def history(self, run: Run, name: str = "train/loss") -> list[tuple[int, float]]:
        """Return all points of a metric on the server."""
        points = self.client.get_metric_history(run.info.run_id, name)
        return sorted((point.step, point.value) for point in points)

    def prefix(self, folder: Path) -> str:
        """Return the prefix of a run's keys."""
        return self.url(folder).removeprefix(f"s3://{self.store.bucket}/") + "/"

    def keys(self, folder: Path) -> list[str]:
        """Return the keys of a run in the store, relative to its prefix."""
        prefix = self.prefix(folder)
        return [key.removeprefix(prefix) for key in self.store.keys(self.store.bucket, prefix)]

    def modification_times(self, folder: Path) -> dict[str, datetime]:
        """Return the modification time of each object of a run."""
        response = self.store.client().list_objects_v2(Bucket=self.store.bucket, Prefix=self.prefix(folder))
        return {item["Key"]: item["LastModified"] for item in response["Contents"]}

    def content(self, folder: Path, key: str) -> bytes:
        """Return the content of an object of a run."""
        response = self.store.client().get_object(Bucket=self.store.bucket, Key=self.prefix(folder) + key)
        return bytes(response["Body"].read())

    def has_copy(self, folder: Path, key: str) -> bool:
        """Return whether an object equals the local file.

        The local log may have one more line: the notice of slow uploads is written after the log is uploaded.
        """
        remote, local = self.content(folder, key), (folder / key).read_bytes()
        added = local.removeprefix(remote) if key == "train.log" and local.startswith(remote) else b""
        is_notice = b"; Ctrl-C leaves the rest to wmtp.sync" in added and added.count(b"\n") == 1
        return remote == (local.removesuffix(added) if is_notice else local)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text())


def lines_of(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Return the parsed complete lines of a JSONL file in a run's folder; an empty list if there is no file yet."""
    path = folder / name
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def points_of(folder: Path, name: str = "train/loss") -> list[tuple[int, float]]:
    """Return the points of a metric in a run's metrics.jsonl."""
    return [(line["step"], line[name]) for line in lines_of(folder) if name in line]


def last_model(folder: Path, step: int) -> bytes:
    """Return the content of the model file in the checkpoint of a step."""
    return (folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors").read_bytes()


def wait_until(condition: Callable[[], object], child: Child | None = None, seconds: float = 60.0) -> None:
    """Wait until `condition` holds; fail if `child` ends first, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert child is None or child.poll() is None, child.text
        assert time.monotonic() < deadline, child.text if child else ""
        time.sleep(0.02)
