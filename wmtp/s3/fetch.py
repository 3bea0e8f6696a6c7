"""Bringing a run from S3 to a folder, where it can be gone on with or used, and no further than that needs."""

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
from wmtp.checkpoint.listing import STEP, step_of, whole_checkpoints
from wmtp.checkpoint.manifest import damage
from wmtp.errors import InputError
from wmtp.runtime.atomic_files import content_if_there, encode_json, replace_atomically, sync
from wmtp.runtime.locks import one_at_a_time
from wmtp.runtime.run_dir import OUTPUTS, RECEIPT, RUN, is_running, read_run, typed
from wmtp.s3.client import S3Folder
from wmtp.s3.download import Download, patiently
from wmtp.s3.layout import CONCLUSIONS, RECORDS, RESULT, STAGES
from wmtp.s3.options import S3Options
from wmtp.s3.retention import noted_best

log = logging.getLogger(__name__)
CONFIG = "config.yaml"
LOCK = Path(".hydra") / "fetch.lock"
UNFINISHED = Path(".hydra") / "fetch.unfinished"
"""Is there while checkpoints come that are newer than the other files here."""
ONE_CHECKPOINT = re.compile(r"(.*?)/((?:pretrain/)?)checkpoints/(step_\d{8,})")
DATE = re.compile(r"\d{4}-\d\d-\d\d")
MOST_NAMED = 10
Which = Literal["latest", "best"]


def local_folder(url: str) -> Path:
    """Where a run of S3 is kept here if nobody says: under its date and name, as it was where it began."""
    parts = _run_and_checkpoint(url)[0].removeprefix("s3://").split("/")[1:]
    dated = next((n for n, part in enumerate(parts) if DATE.fullmatch(part) and n < len(parts) - 1), len(parts) - 1)
    name = Path(*parts[dated:]) if parts else Path()
    if not parts or ".." in name.parts:
        raise InputError(f"{url}: names no run; say which: s3://bucket/prefix/<date>/<name>")
    return OUTPUTS / name


def find_run(url: str, options: S3Options | None = None) -> str:
    """The run that a URL means: the one there, the one that a checkpoint there belongs to, or the only one below.

    Raises:
        InputError: there is none, or more than one; or the store refuses.
        StoreUnreachable: it does not answer.
    """
    place = S3Folder(_run_and_checkpoint(url)[0], options)
    if patiently(lambda: place.get(CONFIG)) is not None:
        return place.url
    found = patiently(lambda: list(islice(_runs_below(place), MOST_NAMED + 1)))
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(f"{place.where}: there is no run, nor below; a run's place holds its {CONFIG}")
    more = [*found[:MOST_NAMED], *(["…"] if len(found) > MOST_NAMED else [])]
    raise InputError("\n  ".join([f"{place.where}: several runs lie there; name one of them:", *more]))


def _runs_below(place: S3Folder) -> Iterator[str]:
    for key, _ in place.listed():
        run, _, name = key.rpartition("/")
        if name == CONFIG and run and run.rpartition("/")[2] not in ("pretrain", ".hydra"):
            yield f"{place.url}/{run}"


def fetch_run(
    url: str,
    folder: Path,
    options: S3Options | None = None,
    *,
    checkpoints: Which = "latest",
    console: Console | None = None,
) -> Path:
    """Bring a run, whole enough to be gone on with, to a folder that is new or holds an earlier copy of it.

    What is there already is not brought again, and a copy that is further than S3 stays as it is. A download that
    was interrupted is gone on with.

    Args:
        url: the run's place, or one of its checkpoints, which alone is brought then.
        folder: where to.
        options: how to talk to the store.
        checkpoints: `latest` brings the newest and the best of each stage, `best` what it takes to use the model.
        console: where progress is shown.

    Returns:
        The folder; where one checkpoint was asked for, the folder of that.

    Raises:
        InputError: no such run, or none of its checkpoints is whole; the folder is in use, or holds something else.
        StoreError: the store fails, also after several attempts.
    """
    address, stage, name = _run_and_checkpoint(url)
    fetch = _Fetch(S3Folder(address, options), folder, console)
    fetch.require_fit()
    with one_at_a_time(folder / LOCK):  # a second command with the same run waits, and then finds it here
        fetch.records([RUN], replace=False)  # first, so that the run is known again after an interruption
        if name is not None:
            if not fetch.download.bring(stage, name):
                raise InputError(f"{url}: there is no whole checkpoint")
            fetch.records([CONFIG, RECEIPT], replace=False)
            return folder / stage / "checkpoints" / name
        if checkpoints == "best":
            fetch.best()
        else:
            fetch.latest()
    return folder


def _run_and_checkpoint(url: str) -> tuple[str, str, str | None]:
    """The run that a URL is or belongs to, and the stage and the name of a checkpoint."""
    match = ONE_CHECKPOINT.fullmatch(url.rstrip("/"))
    return (match[1], match[2], match[3]) if match else (url.rstrip("/"), "", None)


class _Fetch:
    """One run on its way into a folder."""

    def __init__(self, remote: S3Folder, folder: Path, console: Console | None) -> None:
        self.remote, self.folder = remote, folder
        self.download = Download(remote, folder, console)
        self.sizes: dict[str, int] = {}
        """The run's objects, and their lengths in bytes."""
        self._list()

    def require_fit(self) -> None:
        """Raises `InputError` if there is no run, or the folder may not hold it."""
        where = typed(self.folder)
        if CONFIG not in self.sizes:
            raise InputError(f"{self.remote.where}: there is no run: it has no {CONFIG}")
        if is_running(self.folder):
            raise InputError(f"{where}: a command is running in it; wait for that, or name another folder")
        known, run = read_run(self.folder), patiently(lambda: self.remote.read_json(RUN))
        is_empty = not any(path.name != LOCK.parent.name for path in self.folder.glob("*"))
        if not is_empty and (known is None or run is None or known["id"] != run["id"]):
            raise InputError(f"{where}: holds something else than the run at {self.remote.url}; name another folder")

    def latest(self) -> None:
        """Bring what it takes to go on with the run, unless what is here is further."""
        here, there, interrupted = self._furthest_here(), self._furthest_there(), self.folder / UNFINISHED
        if here > there:
            log.warning("%s is further than %s, and stays as it is", typed(self.folder), self.remote.url)
            return
        replace = here < there or interrupted.exists()
        if replace:
            interrupted.touch()
        brought = [self._newest_and_best(stage) for stage in STAGES]
        if not any(brought):
            raise InputError(f"{self.remote.where}: the run has no whole checkpoint there")
        self._list()
        self.records(sorted(key for key in self.sizes if _is_record(key)), replace=replace)
        self._result()
        self.records([CONFIG], replace=replace)  # last, as a folder with a config is a run's
        interrupted.unlink(missing_ok=True)

    def best(self) -> None:
        """Bring what it takes to use the run's best model, or its last where none was the best."""
        if self._furthest_here() > self._furthest_there():
            return
        best = self._noted_best("")
        if (best is None or not self.download.bring("", best)) and self._newest("") is None:
            raise InputError(f"{self.remote.where}: the run has no whole checkpoint there")
        self._note("", "best")
        self.records([CONFIG, RECEIPT])

    def records(self, keys: list[str], *, replace: bool = True) -> None:
        """Bring files of the run that are there; those that are here only if they are to be replaced."""
        for key in keys:
            path = self.folder / key
            if key in self.sizes and (replace or not path.exists()):
                path.parent.mkdir(parents=True, exist_ok=True)
                staged = path.with_name(f".{path.name}.fetching")
                staged.unlink(missing_ok=True)
                self.download.file(key, staged, self.sizes[key])
                sync(staged)
                os.replace(staged, path)
                sync(path.parent)

    def _list(self) -> None:
        self.sizes = patiently(lambda: dict(self.remote.listed()))

    def _there(self, stage: str) -> list[str]:
        """The names of a stage's checkpoints that have a manifest there, the oldest first."""
        parts = [key.removeprefix(f"{stage}checkpoints/").split("/") for key in self.sizes if key.startswith(stage)]
        names = {part[0] for part in parts if len(part) == 2 and part[1] == manifest.NAME and STEP.fullmatch(part[0])}
        return sorted(names, key=step_of)

    def _furthest_here(self) -> tuple[int, int]:
        """The last stage and step from which what is here can be gone on with."""
        for number, stage in reversed(list(enumerate(STAGES))):
            for path in reversed(whole_checkpoints(self.folder / stage)):
                if damage(path) is None:
                    return number, step_of(path.name)
        return -1, -1

    def _furthest_there(self) -> tuple[int, int]:
        steps = [(number, step_of(name)) for number, stage in enumerate(STAGES) for name in self._there(stage)]
        return max(steps, default=(-1, -1))

    def _newest_and_best(self, stage: str) -> bool:
        """Bring the newest whole checkpoint of a stage and its best; whether there is any."""
        newest, best = self._newest(stage), self._noted_best(stage)
        if best is not None and best != newest:
            self.download.bring(stage, best)
        for name in ("best", "latest"):
            self._note(stage, name)
        return newest is not None

    def _newest(self, stage: str) -> str | None:
        tried: set[str] = set()
        while names := [name for name in self._there(stage) if name not in tried]:
            if self.download.bring(stage, names[-1]):
                return names[-1]
            tried.add(names[-1])
            self._list()  # of a run that goes on, there may be a newer one by now
        return None

    def _noted_best(self, stage: str) -> str | None:
        try:
            best = patiently(lambda: noted_best(self.remote, stage))
        except InputError as error:
            log.warning("%s; which checkpoint is the best is not known", error)
            return None
        return best if best in self._there(stage) else None

    def _note(self, stage: str, name: str) -> None:
        """Bring best.json or latest.json, unless the checkpoint it names is not here or an older one than here."""
        folder = self.folder / stage / "checkpoints"
        content = patiently(lambda: self.remote.get(f"{stage}checkpoints/{name}.json"))
        there, here = (_named(each, "folder") for each in (content, content_if_there(folder / f"{name}.json")))
        found = [path.name for path in whole_checkpoints(folder.parent)]
        if content is not None and there in found and (here not in found or step_of(here) <= step_of(there)):
            replace_atomically(folder / f"{name}.json", content)
        elif name == "latest" and found and here not in found:
            replace_atomically(folder / "latest.json", encode_json({"folder": found[-1], "step": step_of(found[-1])}))

    def _result(self) -> None:
        """Bring how the stage before ended, if the checkpoint that it left is here."""
        content = patiently(lambda: self.remote.get(RESULT))
        if content is None or (self.folder / RESULT).exists():
            return
        saved = _named(content, "saved")
        if saved and (self.folder / saved / manifest.NAME).exists():
            replace_atomically(self.folder / RESULT, content)
        else:
            log.warning("%s: what the stage before left is not whole there; the stage is gone on with", self.remote.url)


def _is_record(key: str) -> bool:
    """Whether an object is one of those that belong to a run besides its checkpoints, but for its config."""
    patterns = [pattern.split("/") for pattern in RECORDS + CONCLUSIONS if pattern not in (RUN, CONFIG)]
    parts = key.split("/")
    return any(len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern)) for pattern in patterns)


def _named(note: bytes | None, field: str) -> str:
    """The checkpoint that a note names; nothing if there is no sound note."""
    try:
        name = str(json.loads(note or b"")[field])
    except (ValueError, KeyError, TypeError):
        return ""
    return name if STEP.fullmatch(name.rpartition("/")[2]) and ".." not in name else ""
