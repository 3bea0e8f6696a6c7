"""A job of a command with its config and folder, done by this process alone or by several together."""

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import setup_globals
from omegaconf import DictConfig, OmegaConf

from wmtp.distributed.worker import receive_task, set_up_output, tell_ready
from wmtp.errors import InterruptedAtOnce, InterruptedRun, PendingError, TrainingError
from wmtp.runtime.processes import module_arguments
from wmtp.runtime.run_dir import Ending
from wmtp.runtime.signals import ignored_signals, raised_signals

if TYPE_CHECKING:  # what knows torch is imported where it is needed, for --help needs none of it
    from wmtp.distributed.exit_reports import Board

log = logging.getLogger(__name__)
FAREWELL = 90.0
"""Seconds in which all processes of a run that they end together have closed what they opened, and say so."""
DELIVERY = 24 * 3600.0
"""Seconds that the others stay with the first process while it delivers what the run leaves."""
TOGETHER = (InterruptedRun, PendingError, TrainingError)
"""Errors that all processes raise, or none."""


@dataclass(frozen=True)
class Task:
    """What a job is given."""

    config: DictConfig
    folder: Path
    overrides: list[str]
    """As the user typed them."""
    ending: Ending = field(default_factory=Ending)
    """Where the job reports how far it came."""


Job = Callable[[Task], float | None]


def encoded(task: Task) -> dict[str, Any]:
    """A task as plain values for another process. The config keeps its references, which a stage's may redirect."""
    job_logging = HydraConfig.get().job_logging
    return {
        "config": OmegaConf.to_yaml(task.config),
        "folder": str(task.folder),
        "overrides": task.overrides,
        "logging": OmegaConf.to_container(job_logging, resolve=True),
    }


def decoded(values: Mapping[str, Any]) -> Task:
    """The task of these values."""
    setup_globals()
    config = OmegaConf.create(values["config"])
    assert isinstance(config, DictConfig)
    OmegaConf.set_struct(config, True)
    return Task(config, Path(values["folder"]), list(values["overrides"]))


def launch(job: Job, task: Task, size: int) -> float | None:
    """Do a job in `size` new processes of this machine."""
    from wmtp.distributed.launcher import launch as launch_workers

    name = job.__module__ if job.__module__ != "__main__" else sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
    outcome = launch_workers(module_arguments(name), size, encoded(task), task.ending)
    return outcome.value


def lead(job: Job, task: Task, last_act: Callable[[BaseException], None]) -> float | None:
    """Do a job together with the processes that torchrun started besides this one, the first.

    `last_act` is told what failed if this process hangs because of it, and must be ended.
    """
    from wmtp.distributed.exit_reports import FAILED, SUFFERED
    from wmtp.distributed.process_group import OtherProcessFailed
    from wmtp.distributed.rendezvous import StoreBoard, share_task

    share_task(encoded(task))
    board = StoreBoard()

    def end(lost: int) -> int:
        found = _cause(board) or OtherProcessFailed(lost, "is gone", 1)
        last_act(found)
        return getattr(found, "exit_code", 1)

    try:
        return take_part(job, task, board, end)
    except BaseException:
        with ignored_signals():  # the launcher ends this process soon, too
            outcome = board.read().get(0)
            if outcome is not None and outcome.end == SUFFERED:
                time.sleep(1)  # what failed first may still be about to say so
            if outcome is not None and outcome.end != FAILED and (found := _cause(board)) is not None:
                raise found from None
        raise


def dismiss(exit_code: int) -> None:
    """Let the processes that torchrun started besides this one end: there is no job."""
    from wmtp.distributed.rendezvous import dismiss as dismiss_others

    dismiss_others(exit_code)


def _cause(board: "Board") -> BaseException | None:
    """What the others say ended the run."""
    from wmtp.distributed.exit_reports import cause

    outcomes = board.read()
    for outcome in outcomes.values():
        if outcome.rank and outcome.traceback:
            log.info("process %d ended with exit code %d:\n%s", outcome.rank, outcome.exit_code, outcome.traceback)
    found = cause(outcomes, {}, None)
    return None if found is None else found.error(alone=found.rank == 0)


def follow(job: Job) -> NoReturn:
    """What a process does that torchrun started besides the first: wait for the task, and take part."""
    from wmtp.distributed.rendezvous import StoreBoard, wait_for_task

    def do() -> int:
        values = wait_for_task()
        if "exit_code" in values:
            return int(values["exit_code"])
        _help(job, values, StoreBoard())
        return 0

    _end_with(do)


def work(job: Job) -> NoReturn:
    """What a process does that `launch` started."""
    values, folder = receive_task()
    from wmtp.distributed.exit_reports import (
        FolderBoard,
    )  # imports torch, while a signal still ends this process quietly

    def do() -> int:
        tell_ready(folder)
        _help(job, values, FolderBoard(folder))
        return 0

    _end_with(do)


def _help(job: Job, values: Mapping[str, Any], board: "Board") -> None:
    """Take part in another process's task, that of these values."""
    from wmtp.distributed.exit_reports import Outcome

    try:
        set_up_output(values["logging"])
        task = decoded(values)
    except BaseException as error:
        board.put(Outcome.of(error, int(os.environ["RANK"]), Ending()))
        raise
    take_part(job, task, board)


def _end_with(do: Callable[[], int]) -> NoReturn:
    """Do something that signals interrupt, and end this process with its exit code; its error was recorded."""
    with raised_signals():
        try:
            code = do()
        except BaseException as error:  # noqa: BLE001 - take_part has recorded it, and the first process reports it
            code = getattr(error, "exit_code", 1)
        if code:
            logging.shutdown()
            sys.stdout.flush()
            os._exit(code)  # after a failure, an ordinary end may wait for the other processes for ever
    sys.exit()


def take_part(job: Job, task: Task, board: "Board", last_act: Callable[[int], int] | None = None) -> float | None:
    """Do a job together with the other processes, and leave on the board how it ended here.

    Args:
        job: what all processes do.
        task: with what.
        board: where each leaves its outcome.
        last_act: what to do if this process hangs since another is gone, whose rank it is told; gives the exit code.
    """
    from wmtp.distributed.device import device_of
    from wmtp.distributed.exit_reports import FINISHED, Outcome
    from wmtp.distributed.process_group import OtherProcessFailed, Processes, join, leave
    from wmtp.distributed.rendezvous import common_store
    from wmtp.distributed.watchdog import Peers

    rank, hardware = int(os.environ["RANK"]), task.config.hardware

    def give_up(lost: int) -> int:
        if rank not in board.read():
            board.put(Outcome.of(OtherProcessFailed(lost, "is gone", 1), rank, task.ending))
        return 1

    peers: Peers | None = None
    timeout = float(hardware.get("timeout", 1800))
    try:
        join(device_of(hardware.device), timeout)
        peers = Peers(Processes(), common_store(), last_act or give_up)
        value = job(task)
        step, reason = task.ending.step, task.ending.stop_reason
        board.put(Outcome(rank, FINISHED, step=step, stop_reason=reason, value=value, time=time.time()))
        peers.part(DELIVERY)
    except BaseException as error:
        with ignored_signals():
            outcome = Outcome.of(error, rank, task.ending)
            board.put(outcome if peers is None else peers.blamed(outcome))
        agreed = isinstance(error, TOGETHER) and not isinstance(error, InterruptedAtOnce)
        if peers is not None and not agreed:
            peers.tell_failed()
        if peers is not None and agreed:
            try:
                peers.part(FAREWELL)
            except OtherProcessFailed as lost:
                log.info("%s", lost)
            leave()
        raise
    leave()
    return value
