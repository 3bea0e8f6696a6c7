"""Download a run from S3 into a folder, either to resume the run or to use its model."""

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
from wmtp.checkpoint.listing import STEP, checkpoint_path, complete_checkpoints, step_of
from wmtp.checkpoint.manifest import find_damage
from wmtp.errors import InputError
from wmtp.runtime.atomic_files import encode_json, fsync_path, read_or_none, replace_atomically
from wmtp.runtime.locks import file_lock
from wmtp.runtime.run_dir import OUTPUTS, RUN, SYNC_STATE, display_path, is_running, read_run
from wmtp.s3.client import S3Folder
from wmtp.s3.download import CheckpointDownloader
from wmtp.s3.layout import FINAL_FILES, RECORDS, STAGE1_RESULT, STAGES
from wmtp.s3.options import S3Options
from wmtp.s3.retention import read_remote_best

log = logging.getLogger(__name__)
CONFIG = "config.yaml"
LOCK = Path(".hydra") / "fetch.lock"
UNFINISHED = Path(".hydra") / "fetch.unfinished"
"""File that exists while a download is unfinished. Then local checkpoints may be newer than the other local files."""
CHECKPOINT_URL = re.compile(r"(.*?)/((?:pretrain/)?)checkpoints/(step_\d{8,})")
DATE = re.compile(r"\d{4}-\d\d-\d\d")
MAX_RUNS_LISTED = 10
CheckpointChoice = Literal["latest", "best"]


def local_folder(url: str) -> Path:
    """Return the folder to which a run is downloaded by default.

    This is `outputs/<date>/<name>`, the same path as on the machine that started the run.

    Raises:
        InputError: the URL is not the URL of a run.
    """
    parts = _split_checkpoint_url(url)[0].removeprefix("s3://").split("/")[1:]
    dated = next((n for n, part in enumerate(parts) if DATE.fullmatch(part) and n < len(parts) - 1), len(parts) - 1)
    name = Path(*parts[dated:]) if parts else Path()
    if not parts or ".." in name.parts:
        raise InputError(f"{url}: is not the URL of a run; use s3://bucket/prefix/<date>/<name>")
    return OUTPUTS / name


def find_run(url: str, options: S3Options | None = None) -> str:
    """Return the URL of the run to which a URL belongs.

    `url` may be the URL of a run, of a checkpoint of a run, or of a prefix that contains exactly one run.

    Raises:
        InputError: there is no run at or below `url`, there are several, or the store refuses access.
        StoreUnreachable: the store does not respond.
    """
    remote = S3Folder(_split_checkpoint_url(url)[0], options)
    if remote.get(CONFIG) is not None:
        return remote.url
    found = list(islice(_runs_below(remote), MAX_RUNS_LISTED + 1))
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(
            f"{remote.display_url}: there is no run at or below this URL; the folder of a run contains {CONFIG}"
        )
    lines = [*found[:MAX_RUNS_LISTED], *(["…"] if len(found) > MAX_RUNS_LISTED else [])]
    raise InputError("\n  ".join([f"{remote.display_url}: there are several runs; choose one of them:", *lines]))


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
    """Download a run into a new folder, or update a folder that contains an earlier copy of the run.

    Checkpoints that exist locally are not downloaded again. An interrupted download is continued. If the local copy has
    a later checkpoint than S3, the files of the copy are not changed.

    Args:
        url: URL of the run, or URL of one of its checkpoints. In the second case, only this checkpoint is downloaded.
        folder: the local folder of the run.
        options: connection options of the store.
        checkpoints: `latest` downloads the newest and the best checkpoint of each stage, which are needed to resume the
            run. `best` downloads only the checkpoint that is needed to use the model.
        console: console on which the progress is shown. None shows no progress.

    Returns:
        The folder of the run, or the folder of the checkpoint if `url` is the URL of a checkpoint.

    Raises:
        InputError: the run does not exist in S3, it has no complete checkpoint, or the local folder is in use or
            contains other data.
        StoreError: the store failed in all attempts.
    """
    run_url, stage, name = _split_checkpoint_url(url)
    downloader = _RunDownloader(S3Folder(run_url, options), folder, console)
    downloader.check_folder()
    with file_lock(folder / LOCK):  # a second command for the same run waits here, and then uses the downloaded files
        downloader.fetch_files([RUN], replace=False)  # first, to identify the run after an interruption
        if name is not None:
            if not downloader.checkpoints.fetch(stage, name):
                raise InputError(f"{url}: there is no complete checkpoint")
            downloader.fetch_files([CONFIG, SYNC_STATE], replace=False)
            return folder / stage / "checkpoints" / name
        if checkpoints == "best":
            downloader.fetch_best()
        else:
            downloader.fetch_latest()
    return folder


def _split_checkpoint_url(url: str) -> tuple[str, str, str | None]:
    """Split the URL of a checkpoint into the run's URL, the path prefix of the stage, and the checkpoint's name.

    For any other URL, the prefix is empty and the name is None.
    """
    match = CHECKPOINT_URL.fullmatch(url.rstrip("/"))
    return (match[1], match[2], match[3]) if match else (url.rstrip("/"), "", None)


class _RunDownloader:
    """Downloader of one run from S3 into a local folder."""

    def __init__(self, remote: S3Folder, folder: Path, console: Console | None) -> None:
        self.remote, self.folder = remote, folder
        self.checkpoints = CheckpointDownloader(remote, folder, console)
        self.sizes: dict[str, int] = {}
        """Size in bytes of each object of the run in S3. The dictionary key is the key of the object."""
        self._list()

    def check_folder(self) -> None:
        """Check that the run exists in S3, and that the local folder is empty or contains a copy of the same run.

        Raises:
            InputError: the run does not exist in S3, or the local folder is in use or contains other data.
        """
        where = display_path(self.folder)
        if CONFIG not in self.sizes:
            raise InputError(f"{self.remote.display_url}: there is no run: it has no {CONFIG}")
        if is_running(self.folder):
            raise InputError(f"{where}: a command is running in it; wait for its end, or use another folder")
        local_run, run = read_run(self.folder), self.remote.read_json(RUN)
        is_empty = not any(path.name != LOCK.parent.name for path in self.folder.glob("*"))
        if not is_empty and (local_run is None or run is None or local_run["id"] != run["id"]):
            raise InputError(f"{where}: contains other data than the run at {self.remote.url}; use another folder")

    def fetch_latest(self) -> None:
        """Download the checkpoints and other files that are needed to resume the run.

        If the newest local checkpoint is later than the newest checkpoint in S3, nothing is downloaded.

        Raises:
            InputError: the run has no complete checkpoint in S3.
        """
        local, remote, marker = self._local_progress(), self._remote_progress(), self.folder / UNFINISHED
        if local > remote:
            log.warning(
                "%s has a later checkpoint than %s, so it stays unchanged", display_path(self.folder), self.remote.url
            )
            return
        replace = local < remote or marker.exists()
        if replace:
            marker.touch()
        found = [self._fetch_newest_and_best(stage) for stage in STAGES]
        if not any(found):
            raise InputError(f"{self.remote.display_url}: the run has no complete checkpoint there")
        self._list()
        self.fetch_files(sorted(key for key in self.sizes if _is_run_file(key)), replace=replace)
        self._fetch_stage1_result()
        self.fetch_files([CONFIG], replace=replace)  # last, because a folder with a config counts as a run
        marker.unlink(missing_ok=True)

    def fetch_best(self) -> None:
        """Download the best checkpoint of stage 2, and the other files that are needed to use the model.

        If the run has no best checkpoint in S3, the newest complete checkpoint is downloaded instead. If the newest
        local checkpoint is later than the newest checkpoint in S3, nothing is downloaded.

        Raises:
            InputError: the run has no complete checkpoint in S3.
        """
        if self._local_progress() > self._remote_progress():
            return
        best = self._remote_best("")
        if (best is None or not self.checkpoints.fetch("", best)) and self._fetch_newest("") is None:
            raise InputError(f"{self.remote.display_url}: the run has no complete checkpoint there")
        self._fetch_pointer("", "best")
        self.fetch_files([CONFIG, SYNC_STATE])

    def fetch_files(self, keys: list[str], *, replace: bool = True) -> None:
        """Download the files of the run whose keys are in `keys`. Skip keys that do not exist in S3.

        If `replace` is False, a file that exists locally is not downloaded again.
        """
        for key in keys:
            path = self.folder / key
            if key in self.sizes and (replace or not path.exists()):
                path.parent.mkdir(parents=True, exist_ok=True)
                staged = path.with_name(f".{path.name}.fetching")
                staged.unlink(missing_ok=True)
                self.remote.download(key, staged, self.sizes[key])
                fsync_path(staged)
                os.replace(staged, path)
                fsync_path(path.parent)

    def _list(self) -> None:
        self.sizes = {key: size for key, size in self.remote.list_objects() if is_safe_key(key)}

    def _remote_checkpoints(self, stage: str) -> list[str]:
        """Return the names of all checkpoints of a stage in S3 that have a manifest. The oldest checkpoint is first."""
        parts = [key.removeprefix(f"{stage}checkpoints/").split("/") for key in self.sizes if key.startswith(stage)]
        names = {part[0] for part in parts if len(part) == 2 and part[1] == manifest.NAME and STEP.fullmatch(part[0])}
        return sorted(names, key=step_of)

    def _local_progress(self) -> tuple[int, int]:
        """Return the stage and the step of the newest undamaged local checkpoint.

        The stage is an index of `STAGES`. If there is no such checkpoint, the result is (-1, -1).
        """
        for number, stage in reversed(list(enumerate(STAGES))):
            for path in reversed(complete_checkpoints(self.folder / stage)):
                if find_damage(path) is None:
                    return number, step_of(path.name)
        return -1, -1

    def _remote_progress(self) -> tuple[int, int]:
        """Return the stage and the step of the newest checkpoint that has a manifest in S3.

        The stage is an index of `STAGES`. If there is no such checkpoint, the result is (-1, -1).
        """
        steps = [
            (number, step_of(name)) for number, stage in enumerate(STAGES) for name in self._remote_checkpoints(stage)
        ]
        return max(steps, default=(-1, -1))

    def _fetch_newest_and_best(self, stage: str) -> bool:
        """Download the newest and the best checkpoint of a stage, and the pointer files best.json and latest.json.

        Return False if the stage has no complete checkpoint in S3.
        """
        newest, best = self._fetch_newest(stage), self._remote_best(stage)
        if best is not None and best != newest:
            self.checkpoints.fetch(stage, best)
        for name in ("best", "latest"):
            self._fetch_pointer(stage, name)
        return newest is not None

    def _fetch_newest(self, stage: str) -> str | None:
        """Download the newest complete checkpoint of a stage, and return its name.

        Return None if the stage has no complete checkpoint in S3.
        """
        tried: set[str] = set()
        while names := [name for name in self._remote_checkpoints(stage) if name not in tried]:
            if self.checkpoints.fetch(stage, names[-1]):
                return names[-1]
            tried.add(names[-1])
            self._list()  # if the run is still training, a newer checkpoint may exist by now
        return None

    def _remote_best(self, stage: str) -> str | None:
        """Return the name of a stage's best checkpoint.

        Return None if best.json is missing or damaged in S3, or if S3 does not contain the checkpoint that it names.
        """
        try:
            best = read_remote_best(self.remote, stage)
        except InputError as error:
            log.warning("%s; the best checkpoint is unknown", error)
            return None
        return best if best in self._remote_checkpoints(stage) else None

    def _fetch_pointer(self, stage: str, name: str) -> None:
        """Download best.json or latest.json of a stage. Such a pointer file contains the name of a checkpoint.

        The local pointer file is not replaced if it names a newer local checkpoint, or if the checkpoint that the file
        in S3 names does not exist locally. If no local latest.json names an existing checkpoint after this, a new
        latest.json with the newest local checkpoint is written.

        Args:
            stage: path prefix of the stage, one of `STAGES`.
            name: `best` or `latest`.
        """
        folder = self.folder / stage / "checkpoints"
        content = self.remote.get(f"{stage}checkpoints/{name}.json")
        remote, local = (_parse_pointer(each, "folder") for each in (content, read_or_none(folder / f"{name}.json")))
        found = [path.name for path in complete_checkpoints(folder.parent)]
        if content is not None and remote in found and (local not in found or step_of(local) <= step_of(remote)):
            replace_atomically(folder / f"{name}.json", content)
        elif name == "latest" and found and local not in found:
            replace_atomically(folder / "latest.json", encode_json({"folder": found[-1], "step": step_of(found[-1])}))

    def _fetch_stage1_result(self) -> None:
        """Download the file with the result of stage 1, unless it exists locally.

        If the checkpoint that the result names does not exist locally, the file is not written and a warning is logged.
        """
        content = self.remote.get(STAGE1_RESULT)
        if content is None or (self.folder / STAGE1_RESULT).exists():
            return
        saved = _parse_pointer(content, "saved")
        if saved and (self.folder / saved / manifest.NAME).exists():
            replace_atomically(self.folder / STAGE1_RESULT, content)
        else:
            log.warning("%s: the checkpoint of the result of stage 1 is missing; stage 1 is resumed", self.remote.url)


def is_safe_key(key: str) -> bool:
    """Return whether the path of an object's file, which is given by its key, is inside the run's folder."""
    return "\0" not in key and not {"", ".", ".."}.intersection(key.split("/"))


def _is_run_file(key: str) -> bool:
    """Return whether a key matches a pattern in `RECORDS` or `FINAL_FILES`. Return False for run.json and config.yaml.

    These two files are downloaded separately.
    """
    patterns = [pattern.split("/") for pattern in RECORDS + FINAL_FILES if pattern not in (RUN, CONFIG)]
    parts = key.split("/")
    return any(len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern)) for pattern in patterns)


def _parse_pointer(content: bytes | None, field: str) -> str:
    """Return the name or the path of the checkpoint in the content of a pointer file.

    `field` is the JSON key of this value. If `content` is None or invalid, the result is an empty string.
    """
    try:
        return checkpoint_path(json.loads(content or b"")[field])
    except (ValueError, KeyError, TypeError):
        return ""
