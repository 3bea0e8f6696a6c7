"""Download a run from S3 into a folder, as far as needed to resume it or to use its model."""

import json
import logging
import os
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from typing import Literal

from rich.console import Console

from wmtp.checkpoint import manifest
from wmtp.checkpoint.listing import STEP, complete_checkpoints, step_of
from wmtp.checkpoint.manifest import damage
from wmtp.errors import InputError
from wmtp.runtime.atomic_files import encode_json, fsync_path, read_or_none, replace_atomically
from wmtp.runtime.locks import file_lock
from wmtp.runtime.run_dir import OUTPUTS, RUN, SYNC_STATE, display_path, is_running, read_run
from wmtp.s3.client import S3Folder
from wmtp.s3.download import CheckpointDownloader, retry_on_store_error
from wmtp.s3.layout import FINAL_FILES, RECORDS, STAGE1_RESULT, STAGES
from wmtp.s3.options import S3Options
from wmtp.s3.retention import read_remote_best

log = logging.getLogger(__name__)
CONFIG = "config.yaml"
LOCK = Path(".hydra") / "fetch.lock"
UNFINISHED = Path(".hydra") / "fetch.unfinished"
"""Marker file that exists while checkpoints are downloaded that are newer than the other local files."""
CHECKPOINT_URL = re.compile(r"(.*?)/((?:pretrain/)?)checkpoints/(step_\d{8,})")
DATE = re.compile(r"\d{4}-\d\d-\d\d")
MAX_RUNS_LISTED = 10
CheckpointChoice = Literal["latest", "best"]


def local_folder(url: str) -> Path:
    """Return the default folder for a run from S3: `outputs/<date>/<name>`, as on the machine where it started.

    Raises:
        InputError: the URL names no run.
    """
    parts = _split_checkpoint_url(url)[0].removeprefix("s3://").split("/")[1:]
    dated = next((n for n, part in enumerate(parts) if DATE.fullmatch(part) and n < len(parts) - 1), len(parts) - 1)
    name = Path(*parts[dated:]) if parts else Path()
    if not parts or ".." in name.parts:
        raise InputError(f"{url}: names no run; use s3://bucket/prefix/<date>/<name>")
    return OUTPUTS / name


def find_run(url: str, options: S3Options | None = None) -> str:
    """Return the URL of a run: `url` itself, the run of a checkpoint URL, or the only run below `url`.

    Raises:
        InputError: there is no run, or more than one; or the store refuses.
        StoreUnreachable: the store does not respond.
    """
    remote = S3Folder(_split_checkpoint_url(url)[0], options)
    if retry_on_store_error(lambda: remote.get(CONFIG)) is not None:
        return remote.url
    found = retry_on_store_error(lambda: list(islice(_runs_below(remote), MAX_RUNS_LISTED + 1)))
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(f"{remote.where}: there is no run, here or below; the folder of a run holds its {CONFIG}")
    lines = [*found[:MAX_RUNS_LISTED], *(["…"] if len(found) > MAX_RUNS_LISTED else [])]
    raise InputError("\n  ".join([f"{remote.where}: there are several runs; name one of them:", *lines]))


def _runs_below(remote: S3Folder) -> Iterator[str]:
    for key, _ in remote.list_objects():
        run, _, name = key.rpartition("/")
        if name == CONFIG and run and run.rpartition("/")[2] not in ("pretrain", ".hydra"):
            yield f"{remote.url}/{run}"


def fetch_run(
    url: str,
    folder: Path,
    options: S3Options | None = None,
    *,
    checkpoints: CheckpointChoice = "latest",
    console: Console | None = None,
) -> Path:
    """Download a run into a folder that is new or holds an earlier copy of it.

    Existing files are not downloaded again, an interrupted download is continued, and a local copy with a later
    checkpoint than S3 stays unchanged.

    Args:
        url: URL of the run, or of one of its checkpoints; then only this checkpoint is downloaded.
        folder: the local folder.
        options: connection options of the store.
        checkpoints: `latest` downloads the newest and the best checkpoint of each stage, as needed to resume; `best`
            only what is needed to use the model.
        console: shows the progress.

    Returns:
        The folder of the run, or of the checkpoint if `url` names one.

    Raises:
        InputError: there is no such run, or it has no complete checkpoint; or the folder is in use, or holds
            something else.
        StoreError: the store failed in several attempts.
    """
    run_url, stage, name = _split_checkpoint_url(url)
    fetch = _RunDownloader(S3Folder(run_url, options), folder, console)
    fetch.check_folder()
    with file_lock(folder / LOCK):  # a second command with the same run waits, and then finds the files here
        fetch.fetch_files([RUN], replace=False)  # first, to identify the run after an interruption
        if name is not None:
            if not fetch.checkpoints.fetch(stage, name):
                raise InputError(f"{url}: there is no complete checkpoint")
            fetch.fetch_files([CONFIG, SYNC_STATE], replace=False)
            return folder / stage / "checkpoints" / name
        if checkpoints == "best":
            fetch.fetch_best()
        else:
            fetch.fetch_latest()
    return folder


def _split_checkpoint_url(url: str) -> tuple[str, str, str | None]:
    """Return the URL of the run, and the stage and name of the checkpoint that `url` may end with."""
    match = CHECKPOINT_URL.fullmatch(url.rstrip("/"))
    return (match[1], match[2], match[3]) if match else (url.rstrip("/"), "", None)


class _RunDownloader:
    """Downloads one run into a folder."""

    def __init__(self, remote: S3Folder, folder: Path, console: Console | None) -> None:
        self.remote, self.folder = remote, folder
        self.checkpoints = CheckpointDownloader(remote, folder, console)
        self.sizes: dict[str, int] = {}
        """Length in bytes of each object of the run, by key."""
        self._list()

    def check_folder(self) -> None:
        """Check that the run exists in S3 and that the folder may hold it.

        Raises:
            InputError: it does not exist, or the folder is in use or holds something else.
        """
        where = display_path(self.folder)
        if CONFIG not in self.sizes:
            raise InputError(f"{self.remote.where}: there is no run: it has no {CONFIG}")
        if is_running(self.folder):
            raise InputError(f"{where}: a command is running in it; wait for that, or name another folder")
        local_run, run = read_run(self.folder), retry_on_store_error(lambda: self.remote.read_json(RUN))
        is_empty = not any(path.name != LOCK.parent.name for path in self.folder.glob("*"))
        if not is_empty and (local_run is None or run is None or local_run["id"] != run["id"]):
            raise InputError(f"{where}: holds something else than the run at {self.remote.url}; name another folder")

    def fetch_latest(self) -> None:
        """Download what is needed to resume the run, unless the local copy has a later checkpoint.

        Raises:
            InputError: the run has no complete checkpoint in S3.
        """
        local, remote, marker = self._local_progress(), self._remote_progress(), self.folder / UNFINISHED
        if local > remote:
            log.warning("%s is further than %s, and stays unchanged", display_path(self.folder), self.remote.url)
            return
        replace = local < remote or marker.exists()
        if replace:
            marker.touch()
        found = [self._fetch_newest_and_best(stage) for stage in STAGES]
        if not any(found):
            raise InputError(f"{self.remote.where}: the run has no complete checkpoint there")
        self._list()
        self.fetch_files(sorted(key for key in self.sizes if _is_run_file(key)), replace=replace)
        self._fetch_stage1_result()
        self.fetch_files([CONFIG], replace=replace)  # last, since a folder with a config counts as a run
        marker.unlink(missing_ok=True)

    def fetch_best(self) -> None:
        """Download what is needed to use the run's best model, or the newest if none is marked as the best.

        Raises:
            InputError: the run has no complete checkpoint in S3.
        """
        if self._local_progress() > self._remote_progress():
            return
        best = self._remote_best("")
        if (best is None or not self.checkpoints.fetch("", best)) and self._fetch_newest("") is None:
            raise InputError(f"{self.remote.where}: the run has no complete checkpoint there")
        self._fetch_pointer("", "best")
        self.fetch_files([CONFIG, SYNC_STATE])

    def fetch_files(self, keys: list[str], *, replace: bool = True) -> None:
        """Download the files of the run that exist in S3; existing local files only with `replace`."""
        for key in keys:
            path = self.folder / key
            if key in self.sizes and (replace or not path.exists()):
                path.parent.mkdir(parents=True, exist_ok=True)
                staged = path.with_name(f".{path.name}.fetching")
                staged.unlink(missing_ok=True)
                self.checkpoints.fetch_file(key, staged, self.sizes[key])
                fsync_path(staged)
                os.replace(staged, path)
                fsync_path(path.parent)

    def _list(self) -> None:
        self.sizes = retry_on_store_error(lambda: dict(self.remote.list_objects()))

    def _remote_checkpoints(self, stage: str) -> list[str]:
        """Return the names of a stage's checkpoints that have a manifest in S3, oldest first."""
        parts = [key.removeprefix(f"{stage}checkpoints/").split("/") for key in self.sizes if key.startswith(stage)]
        names = {part[0] for part in parts if len(part) == 2 and part[1] == manifest.NAME and STEP.fullmatch(part[0])}
        return sorted(names, key=step_of)

    def _local_progress(self) -> tuple[int, int]:
        """Return stage number and step of the newest undamaged local checkpoint, or (-1, -1)."""
        for number, stage in reversed(list(enumerate(STAGES))):
            for path in reversed(complete_checkpoints(self.folder / stage)):
                if damage(path) is None:
                    return number, step_of(path.name)
        return -1, -1

    def _remote_progress(self) -> tuple[int, int]:
        """Return stage number and step of the newest checkpoint in S3, or (-1, -1)."""
        steps = [
            (number, step_of(name)) for number, stage in enumerate(STAGES) for name in self._remote_checkpoints(stage)
        ]
        return max(steps, default=(-1, -1))

    def _fetch_newest_and_best(self, stage: str) -> bool:
        """Download the newest complete and the best checkpoint of a stage. Return False if there is none."""
        newest, best = self._fetch_newest(stage), self._remote_best(stage)
        if best is not None and best != newest:
            self.checkpoints.fetch(stage, best)
        for name in ("best", "latest"):
            self._fetch_pointer(stage, name)
        return newest is not None

    def _fetch_newest(self, stage: str) -> str | None:
        """Download the newest complete checkpoint of a stage, and return its name."""
        tried: set[str] = set()
        while names := [name for name in self._remote_checkpoints(stage) if name not in tried]:
            if self.checkpoints.fetch(stage, names[-1]):
                return names[-1]
            tried.add(names[-1])
            self._list()  # if the run is still training, a newer checkpoint may exist by now
        return None

    def _remote_best(self, stage: str) -> str | None:
        """Return the name of a stage's best checkpoint, or None if it is unknown or not in S3."""
        try:
            best = retry_on_store_error(lambda: read_remote_best(self.remote, stage))
        except InputError as error:
            log.warning("%s; the best checkpoint is unknown", error)
            return None
        return best if best in self._remote_checkpoints(stage) else None

    def _fetch_pointer(self, stage: str, name: str) -> None:
        """Download best.json or latest.json, unless its checkpoint is not local or older than the local pointer's."""
        folder = self.folder / stage / "checkpoints"
        content = retry_on_store_error(lambda: self.remote.get(f"{stage}checkpoints/{name}.json"))
        remote, local = (_parse_pointer(each, "folder") for each in (content, read_or_none(folder / f"{name}.json")))
        found = [path.name for path in complete_checkpoints(folder.parent)]
        if content is not None and remote in found and (local not in found or step_of(local) <= step_of(remote)):
            replace_atomically(folder / f"{name}.json", content)
        elif name == "latest" and found and local not in found:
            replace_atomically(folder / "latest.json", encode_json({"folder": found[-1], "step": step_of(found[-1])}))

    def _fetch_stage1_result(self) -> None:
        """Download the result of stage 1, if the checkpoint that it names is local."""
        content = retry_on_store_error(lambda: self.remote.get(STAGE1_RESULT))
        if content is None or (self.folder / STAGE1_RESULT).exists():
            return
        saved = _parse_pointer(content, "saved")
        if saved and (self.folder / saved / manifest.NAME).exists():
            replace_atomically(self.folder / STAGE1_RESULT, content)
        else:
            log.warning("%s: the result of stage 1 is incomplete there; stage 1 is resumed", self.remote.url)


def _is_run_file(key: str) -> bool:
    """Return whether an object is a file of the run outside its checkpoints, except run.json and the config."""
    patterns = [pattern.split("/") for pattern in RECORDS + FINAL_FILES if pattern not in (RUN, CONFIG)]
    parts = key.split("/")
    return any(len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern)) for pattern in patterns)


def _parse_pointer(content: bytes | None, field: str) -> str:
    """Return the checkpoint that a pointer file names, or an empty string if the file is missing or invalid."""
    try:
        name = str(json.loads(content or b"")[field])
    except (ValueError, KeyError, TypeError):
        return ""
    return name if STEP.fullmatch(name.rpartition("/")[2]) and ".." not in name else ""
