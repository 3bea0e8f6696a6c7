"""Runs with small checkpoints, for tests of uploads and downloads."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from wmtp.checkpoint.state import Snapshot
from wmtp.distributed.process_group import Processes
from wmtp.errors import PendingError
from wmtp.s3.client import S3Folder
from wmtp.s3.options import S3Settings
from wmtp.s3.store import RemoteCheckpointStore
from wmtp.s3.uploader import CheckpointUploader

RUN_ID = "0123456789abcdef0123456789abcdef"


class QuickUploader(CheckpointUploader):
    """An uploader that polls often."""

    poll_seconds = 0.05


class RunInS3:
    """A run's local folder and its copy in a bucket."""

    def __init__(self, folder: Path, url: str, keep_last: int = 2, **options: Any) -> None:
        self.folder, self.url, self.keep_last = folder, url, keep_last
        self.settings = S3Settings(url=url.rpartition("/")[0], close_seconds=90.0, **options)
        (folder / ".hydra").mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"id": RUN_ID, "remote": url}))
        (folder / "config.yaml").write_text("model: tiny\n")
        (folder / ".hydra" / "accepted.json").write_text("[]")
        (folder / ".hydra" / "overrides.yaml").write_text("[]")
        (folder / "metrics.jsonl").touch()
        self.remote = S3Folder(url, self.settings)
        self.store = self.checkpoints()

    def checkpoints(self, stage: str = "") -> RemoteCheckpointStore:
        """Return the checkpoint store of a stage."""
        return RemoteCheckpointStore(
            self.folder / stage,
            Processes.single_process(),
            s3=self.settings,
            keep_last=self.keep_last,
        )

    def save(self, step: int, *, best: float | None = None, num_values: int = 1000, stage: str = "") -> Path:
        """Log a step, write its checkpoint, and return the checkpoint's folder."""
        (self.folder / stage).mkdir(exist_ok=True)
        with (self.folder / stage / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "epoch": 0, "time": 0.0, "train/loss": 1.0}) + "\n")
        store = self.checkpoints(stage) if stage else self.store
        tensor = torch.frombuffer(bytearray(random.Random(step).randbytes(4 * num_values)), dtype=torch.int32)
        path = store.save(step, Snapshot({"w": tensor}, {"w:exp_avg": tensor[:9]}, {"step": step}))
        if best is not None:
            store.mark_best(step, {"val/loss": best})
        return path

    def start_uploader(
        self, console: Console | None = None, is_training: bool = True, **changes: Any
    ) -> CheckpointUploader:
        """Return a started uploader of the run. `changes` are changes of the settings."""
        settings = replace(self.settings, **changes)
        return QuickUploader(self.folder, self.url, settings, self.keep_last, console, is_training)

    def upload_all(self, **options: Any) -> CheckpointUploader:
        """Upload everything, and return the closed uploader. Raises PendingError."""
        uploader = self.start_uploader(**options)
        uploader.close("FINISHED")
        return uploader

    def pending(self, **options: Any) -> str:
        """Return the message of the PendingError when the uploader cannot upload everything."""
        try:
            self.upload_all(**({"stall_seconds": 1.0} | options))
        except PendingError as error:
            return str(error)
        raise AssertionError("the uploader sent everything")

    def local_steps(self, stage: str = "") -> list[str]:
        """Return the names of the checkpoints in the local folder."""
        return sorted(path.name for path in (self.folder / stage / "checkpoints").glob("step_*"))

    def remote_steps(self, stage: str = "") -> list[str]:
        """Return the names of the checkpoints in the bucket that have a manifest."""
        keys = [key for key, _ in self.remote.list_objects(f"{stage}checkpoints/")]
        return sorted(key.split("/")[-2] for key in keys if key.endswith("/manifest.json"))

    def incomplete_steps(self) -> set[str]:
        """Return the names of the checkpoints in the bucket that have no manifest."""
        names = {key.split("/")[1] for key, _ in self.remote.list_objects("checkpoints/") if key.count("/") == 2}
        return names - set(self.remote_steps())

    def delete_folder(self) -> None:
        """Delete the run's local folder, as if the machine were lost."""
        shutil.rmtree(self.folder)


MakeRun = Callable[..., RunInS3]


def step(number: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step_{number:08d}"
