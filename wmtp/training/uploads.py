"""The servers that a run is delivered to, MLflow and S3, made from its config and its folder alone."""

import copy
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from omegaconf import DictConfig
from rich.console import Console

from wmtp.checkpoint.listing import step_of, whole_checkpoints
from wmtp.config.flatten import flat
from wmtp.config.moved_targets import load_run_config
from wmtp.config.schema import ConfigError, build, node_faults, plain
from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError, InterruptedRun, PendingError, WmtpError
from wmtp.runtime.background import IN_HASTE
from wmtp.runtime.run_dir import PRETRAIN, RUN, FolderLock, read_run
from wmtp.s3.client import S3Folder, S3Options, StoreError, StoreUnreachable
from wmtp.s3.layout import STAGES
from wmtp.s3.retention import newest_there
from wmtp.s3.uploader import Mirror
from wmtp.tracking.base import State, Tracker
from wmtp.tracking.mlflow import MlflowTracker, ServerUnreachable, check_server, end_sweep
from wmtp.training.provenance import place

log = logging.getLogger(__name__)
NOTICE = 3.0
"""Seconds after which somebody who waits at the end is told what for."""


class GoneOnElsewhere(InputError):
    """A run's copy in S3 is further than its folder here, which has nothing to add to it."""


class Delivery(Tracker, Protocol):
    """A tracker that tells a server, and says when it is closed what it has told and what not."""

    @property
    def server(self) -> str:
        """Whom it tells."""

    @property
    def report(self) -> str:
        """What was sent, in words."""

    def left_behind(self) -> str:
        """What was not sent, in words."""


def check_servers(config: DictConfig, folder: Path) -> list[str]:
    """Ask the servers whether they will take this run; what is wrong with those that cannot be reached, in words.

    Raises:
        InputError: one of them refuses it, or keeps another run in its place.
    """
    problems: list[str] = []
    if config.tracking is not None:
        try:
            check_server(config.tracking.uri, config.tracking.experiment)
        except ServerUnreachable as error:
            problems.append(f"{error}; metrics stay in the run's folder until it is back")
    if remote := config.checkpoint.get("remote"):
        known = read_run(folder) or {"id": None, "remote": None}
        there = S3Folder(place(folder, remote, known["remote"]), build(config.checkpoint, S3Options))
        try:
            there.check()
            require_own_place(there, folder, known["id"])
        except StoreUnreachable as error:
            problems.append(f"{error}; checkpoints stay in the run's folder until it is back")
        except StoreError as error:
            problem = "if it does not know what it is asked for, checkpoint.checksums=when_required may help"
            raise InputError(f"{error}; {problem}") from error
    return problems


def require_own_place(there: S3Folder, folder: Path, run_id: str | None) -> None:
    """Raises `InputError` where a place in S3 holds another run, and `GoneOnElsewhere` where this one is further."""
    found = there.read_json(RUN)
    if found is not None and found["id"] != run_id:
        problem = "holds another run; name another folder (hydra.run.dir) or remote"
        raise InputError(f"checkpoint.remote: {there.url} {problem}")
    for stage in reversed(STAGES):
        newest = newest_there(there, stage)
        here = max((step_of(path.name) for path in whole_checkpoints(folder / stage)), default=0)
        if newest > here:
            problem = f"is at update {newest}, and the folder here at {here}: the run was gone on with elsewhere"
            raise GoneOnElsewhere(f"{there.url} {problem}; go on from there with resume={there.url}")
        if here:
            break


def open_deliveries(
    config: DictConfig, folder: Path, console: Console, *, is_training: bool, hurries: bool = False
) -> list[Delivery]:
    """Begin to deliver a run, in the background, to the servers that its config names.

    `hurries` leaves little patience with those that do not answer.
    """
    run, parameters = read_run(folder), flat(plain(config))
    if hurries:
        config = in_haste(config)
    deliveries: list[Delivery] = []
    if config.tracking is not None:
        tags = {str(key): str(value) for key, value in config.tags.items()}
        name = config.run_name or folder.name
        about = {"folder": folder, "run_name": name, "parameters": parameters, "tags": tags}
        deliveries.append(build(config.tracking, MlflowTracker, **about, is_training=is_training))
    if run is not None and run["remote"] is not None and config.checkpoint.get("remote"):
        remote = S3Folder(run["remote"], build(config.checkpoint, S3Options))
        about = {"folder": folder, "remote": remote, "console": console, "is_training": is_training}
        deliveries.append(build(config.checkpoint, Mirror, **about))
    return deliveries


def in_haste(config: DictConfig) -> DictConfig:
    """A config with little patience."""
    config = copy.deepcopy(config)
    for node in (config.tracking, config.checkpoint):
        if node is not None and "stall_seconds" in node:
            node.stall_seconds = min(node.stall_seconds, IN_HASTE)
    return config


def deliver_rest(folder: Path, state: State) -> list[str]:
    """Deliver what an ended run or sweep left behind; what was sent, in words.

    Raises:
        InputError: a server refuses it, or the run's config has faults.
        PendingError: not everything was taken.
    """
    if not (folder / "config.yaml").exists():
        report = end_sweep(folder, state)
        return [report] if report else []
    config = load_run_config(folder / "config.yaml")
    named = [key for key in ("tracking", "checkpoint") if config[key] is not None]
    if faults := [fault for key in named for fault in node_faults(config[key], key)]:
        raise ConfigError(faults)
    unreachable = check_servers(config, folder)
    console = Console(markup=False)
    deliveries = open_deliveries(config, folder, console, is_training=False, hurries=bool(unreachable))
    problems = conclude(deliveries, state)
    if problems:
        raise pending(problems)
    _prune(config, folder)
    return [delivery.report for delivery in deliveries]


def _prune(config: DictConfig, folder: Path) -> None:
    """Let go of checkpoints that stayed for their upload, unless a training has begun here, which does so itself."""
    try:
        lock = FolderLock(folder)
    except InputError:
        return
    try:
        for stage in (folder, folder / PRETRAIN):
            build(config.checkpoint, folder=stage, processes=Processes.alone()).prune()
    finally:
        lock.release()


def conclude(deliveries: Sequence[Delivery], state: State) -> list[WmtpError | OSError]:
    """Close all deliveries of a run; what is left behind is returned.

    An interruption ends the wait for a server, and with it nothing else, if the run has finished.
    """
    problems: list[WmtpError | OSError] = []
    for delivery in deliveries:
        notice = threading.Timer(
            NOTICE, log.warning, ("waiting for %s; Ctrl-C leaves the rest to wmtp.sync", delivery.server)
        )
        notice.daemon = True
        notice.start()
        try:
            problems += close([delivery], state)
        except InterruptedRun:
            if state != "FINISHED":
                raise
            problems.append(PendingError(delivery.left_behind()))
        finally:
            notice.cancel()
    return problems


def close(trackers: Sequence[Tracker], state: State) -> list[WmtpError | OSError]:
    """Close every tracker; what went wrong with any of them is returned, so that all have their turn."""
    problems: list[WmtpError | OSError] = []
    for tracker in trackers:
        try:
            tracker.close(state)
        except (WmtpError, OSError) as problem:
            problems.append(problem)
    return problems


def pending(problems: list[WmtpError | OSError]) -> PendingError:
    """What several deliveries left behind, as one error."""
    return PendingError("\n".join(str(problem) for problem in problems))
