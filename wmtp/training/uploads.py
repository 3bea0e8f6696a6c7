"""Uploads of a run to MLflow and S3. They need only the config and the folder of the run."""

import copy
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from omegaconf import DictConfig, OmegaConf

from wmtp.checkpoint.listing import complete_checkpoints, step_of
from wmtp.config.flatten import flatten
from wmtp.config.overrides import shell_argument
from wmtp.config.schema import ConfigError, build, iter_nodes, node_issues, to_plain
from wmtp.config.trust import load_run_config
from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError, InterruptedRun, PendingError, WmtpError
from wmtp.report.run_record import RunRecord
from wmtp.runtime.background import SHUTDOWN_STALL_S
from wmtp.runtime.console import Console
from wmtp.runtime.destinations import require_known
from wmtp.runtime.run_dir import PRETRAIN, RUN, FolderLock, read_run
from wmtp.runtime.untrusted_files import require_inside
from wmtp.s3.client import S3Folder, StoreError, StoreUnreachable
from wmtp.s3.layout import STAGES
from wmtp.s3.options import S3Settings
from wmtp.s3.retention import newest_remote_step
from wmtp.s3.uploader import CheckpointUploader
from wmtp.tracking.base import State, Tracker
from wmtp.tracking.mlflow import MlflowTracker, ServerUnreachable, check_server, end_sweep, require_known_store
from wmtp.training.provenance import remote_url

log = logging.getLogger(__name__)
WAIT_NOTICE_S = 3.0
"""Seconds of waiting for a server at the end of a run, after which a log message about the wait is written."""


class RemoteIsAhead(InputError):
    """An error that is raised if the copy of a run in S3 has a later checkpoint than the local folder.

    In this case, the local folder has nothing to upload.
    """


class Uploader(Protocol):
    """The interface of an object that sends the data of one run to a server in the background.

    An uploader can describe which data was sent and which data was not sent.
    """

    @property
    def server(self) -> str:
        """The name of the server, as it appears in messages."""

    @property
    def report(self) -> str:
        """A description of the data that was sent."""

    def close(self, state: State) -> None:
        """Send all pending data of a run whose final state is `state`.

        Raises:
            PendingError: some data could not be sent.
        """

    def unsent(self) -> str:
        """Return a description of the data that was not sent."""


def check_servers(config: DictConfig, folder: Path) -> list[str]:
    """Check that the servers accept this run, and return a message for each server that cannot be reached.

    Raises:
        InputError: a server rejects the run, or the run's S3 URL contains a different run.
        RemoteIsAhead: the copy in S3 has a later checkpoint than `folder`.
    """
    unreachable: list[str] = []
    if config.tracking is not None:
        try:
            check_server(config.tracking.uri, config.tracking.experiment)
        except ServerUnreachable as error:
            unreachable.append(f"{error}; metrics are kept in the run's folder until it can be reached")
    if settings := s3_settings(config):
        run = read_run(folder) or {"id": None, "remote": None}
        s3_folder = S3Folder(remote_url(folder, settings.url, run["remote"]), settings)
        try:
            s3_folder.check()
            require_same_run(s3_folder, folder, run["id"])
        except StoreUnreachable as error:
            unreachable.append(f"{error}; checkpoints are kept in the run's folder until it can be reached")
        except StoreError as error:
            hint = "if the store does not support this request, try checkpoint.s3.checksums=when_required"
            raise InputError(f"{error}; {hint}") from error
    return unreachable


def require_same_run(s3_folder: S3Folder, folder: Path, run_id: str | None) -> None:
    """Check that a folder in S3 is unused, or that it contains the run `run_id` and no later checkpoint than `folder`.

    Raises:
        InputError: the folder in S3 contains a different run.
        RemoteIsAhead: the copy in S3 has a later checkpoint than `folder`.
    """
    remote_run = s3_folder.read_json(RUN)
    if remote_run is not None and remote_run["id"] != run_id:
        message = "holds another run; name another folder (hydra.run.dir) or URL"
        raise InputError(f"checkpoint.s3.url: {s3_folder.url} {message}")
    for stage in reversed(STAGES):
        newest = newest_remote_step(s3_folder, stage)
        newest_local = max((step_of(path.name) for path in complete_checkpoints(folder / stage)), default=0)
        if newest > newest_local:
            message = f"is at update {newest} and the local folder at {newest_local}: the run was resumed elsewhere"
            argument = shell_argument("resume", s3_folder.url)
            raise RemoteIsAhead(f"{s3_folder.url} {message}; continue it with {argument}")
        if newest_local:
            break


def open_uploaders(
    config: DictConfig, folder: Path, console: Console, *, is_training: bool, short_timeouts: bool = False
) -> list[Uploader]:
    """Start the uploads of a run in the background, one for each server that the config names.

    If `short_timeouts` is true, uploads to a server that does not respond are ended sooner.
    """
    run, record = read_run(folder), RunRecord(folder)
    chosen = {group.partition("@")[0]: option for group, option in record.choices.items() if "/" not in group}
    parameters = flatten(to_plain(config)) | chosen
    if short_timeouts:
        config = with_short_timeouts(config)
    uploaders: list[Uploader] = []
    if config.tracking is not None:
        tags = {str(key): str(value) for key, value in config.tags.items()}
        options = {"folder": folder, "run_name": record.name, "parameters": parameters, "tags": tags}
        uploaders.append(build(config.tracking, MlflowTracker, **options, is_training=is_training))
    settings = s3_settings(config)
    if run is not None and run["remote"] is not None and settings is not None:
        keep_last = int(config.checkpoint.keep_last)
        url = remote_url(folder, settings.url, run["remote"])  # the folder that `check_servers` has checked
        uploaders.append(CheckpointUploader(folder, url, settings, keep_last, console, is_training))
    return uploaders


def s3_settings(config: DictConfig) -> S3Settings | None:
    """Return the settings of the copy in S3, or None if the checkpoints are only in the run's folder."""
    node = config.checkpoint.get("s3")
    settings: S3Settings | None = None if node is None else build(node)
    return settings


def with_short_timeouts(config: DictConfig) -> DictConfig:
    """Return a copy of the config in which each option `stall_seconds` is at most `SHUTDOWN_STALL_S`."""
    config = copy.deepcopy(config)
    for node in (config.tracking, config.checkpoint.get("s3")):
        if node is not None:
            node.stall_seconds = min(node.stall_seconds, SHUTDOWN_STALL_S)
    return config


def send_pending(folder: Path, state: State) -> list[str]:
    """Upload the pending data of an ended run or sweep, and return a report for each server.

    Raises:
        InputError: a server rejects the data, the config of the run is invalid, or it names an unknown server.
        PendingError: some data could still not be uploaded.
    """
    require_inside(folder)
    require_known_store(folder)
    if not (folder / "config.yaml").exists():
        report = end_sweep(folder, state)
        return [report] if report else []
    config = load_run_config(folder / "config.yaml")
    for key in ("tracking.uri", "checkpoint.s3.endpoint_url"):
        require_known(folder, key, OmegaConf.select(config, key))
    nodes = [(key, node) for key, node in iter_nodes(config) if key.partition(".")[0] in ("tracking", "checkpoint")]
    if issues := [issue for key, node in nodes for issue in node_issues(node, key)]:
        raise ConfigError(issues)
    unreachable = check_servers(config, folder)
    console = Console()
    uploaders = open_uploaders(config, folder, console, is_training=False, short_timeouts=bool(unreachable))
    errors = close_all(uploaders, state)
    if errors:
        raise pending_error(errors)
    _prune(config, folder)
    return [uploader.report for uploader in uploaders]


def _prune(config: DictConfig, folder: Path) -> None:
    """Delete checkpoints that were kept only because they had not been uploaded.

    If a job is running in the folder, nothing is deleted here, because the job itself deletes them.
    """
    try:
        lock = FolderLock(folder)
    except InputError:
        return
    try:
        for stage in (folder, folder / PRETRAIN):
            build(config.checkpoint, folder=stage, processes=Processes.single_process()).prune()
    finally:
        lock.release()


def close_all(uploaders: Sequence[Uploader], state: State) -> list[WmtpError | OSError]:
    """Close all uploaders of a run, and return their errors. Data that was not uploaded is reported as an error.

    If the run has finished, an interruption (Ctrl-C) during this call ends only the wait for the current server, and no
    error is raised.
    """
    errors: list[WmtpError | OSError] = []
    for uploader in uploaders:
        notice = threading.Timer(
            WAIT_NOTICE_S, log.warning, ("waiting for %s; Ctrl-C leaves the rest to wmtp.sync", uploader.server)
        )
        notice.daemon = True
        notice.start()
        try:
            errors += close_trackers([uploader], state)
        except InterruptedRun:
            if state != "FINISHED":
                raise
            errors.append(PendingError(uploader.unsent()))
        finally:
            notice.cancel()
    return errors


def close_trackers(trackers: Sequence[Tracker | Uploader], state: State) -> list[WmtpError | OSError]:
    """Close all trackers or uploaders, and return their errors. All of them are closed, even if one raises an error."""
    errors: list[WmtpError | OSError] = []
    for tracker in trackers:
        try:
            tracker.close(state)
        except (WmtpError, OSError) as error:
            errors.append(error)
    return errors


def pending_error(errors: list[WmtpError | OSError]) -> PendingError:
    """Return one error that contains the messages of all given errors about data that was not uploaded."""
    return PendingError("\n".join(str(error) for error in errors))
