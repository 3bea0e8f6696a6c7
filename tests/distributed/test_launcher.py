"""Tests of the launcher: start of several processes, signals, failures and the exit of all processes."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY
from tests.support.forking import Child, ForkServer
from tests.support.launching import ONE_PROCESS, TWO_PROCESSES, StartedCommand
from tests.support.servers import free_ports
from wmtp.checkpoint.store import find_damage
from wmtp.distributed import launcher
from wmtp.distributed.exit_reports import FAILED, FINISHED, INTERRUPTED, PEER_FAILED, ExitReport, root_cause
from wmtp.distributed.launcher import start_workers
from wmtp.errors import InputError, InterruptedRun
from wmtp.runtime.run_dir import FolderLock, JobProgress, RunStatus, is_running
from wmtp.runtime.signals import raise_on_signals

pytestmark = pytest.mark.xdist_group("servers")  # these tests also fork commands from the server of this session

Start = Callable[..., StartedCommand]
STEP_FILES = "step-0", "step-1"


@pytest.fixture
def start(tmp_path: Path, fork_server: ForkServer) -> Iterator[Start]:
    """Yield a function that starts commands; kill those that are still running at the end of a test.

    With `cold=True` or torchrun, the processes are new interpreters, as for a user.
    """
    started: list[StartedCommand] = []

    def begin(*overrides: str, cold: bool = False, **options: Any) -> StartedCommand:
        server = None if cold or options.get("torchrun") else fork_server
        started.append(StartedCommand(tmp_path / str(len(started)), *overrides, server=server, **options))
        return started[-1]

    yield begin
    for command in started:
        command.kill()


@pytest.mark.slow
def test_two_processes_train_in_one_folder_and_a_signal_during_training_saves_once(start: Start, cache: Path) -> None:
    # on busy cores, the imports of the two new interpreters can end many seconds apart
    options = ["hardware=cpux2", "hardware.timeout=60", "tracking=none", f"cache_dir={cache}", *TINY, "log_interval=1"]
    short = start(*options, "max_steps=4", module="wmtp.train")
    endless = start(*options, "num_epochs=100000", module="wmtp.train", cold=True)
    code, out, _ = short.end(90)
    assert code == 0, out
    assert short.status()["state"] == "FINISHED" and short.status()["step"] == 4
    assert out.count("updates of 16 samples") == 1 and "2 processes" in out, "only one process prints"
    lines = [json.loads(line) for line in (short.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4], "only one process writes"
    endless.wait_for("metrics.jsonl")
    while (endless.run / "metrics.jsonl").read_text().count("\n") < 5:
        time.sleep(0.05)
    endless.send(signal.SIGTERM)
    code, out, _ = endless.end()
    status = endless.status()
    assert (code, status["state"], status["exit_code"]) == (143, "KILLED", 143), out
    assert find_damage(endless.run / "checkpoints" / f"step_{status['step']:08d}") is None
    assert " -m wmtp.train resume=" in out and "Traceback" not in out


@pytest.mark.slow
def test_the_other_ranks_wait_while_rank_0_uploads(start: Start) -> None:
    """In the control, the time limit of the exit barrier is shorter than the upload."""
    two = (*TWO_PROCESSES, "tags.action=upload")
    run, control = start(*two), start(*two, without="upload_barrier")
    code, out, _ = run.end(60)
    assert (code, run.status()["state"]) == (0, "FINISHED"), out
    assert "process 0: the last sum is 2" in out and "process 1" not in out, "only rank 0 prints"
    assert control.end(60)[0] != 0


@pytest.mark.slow
def test_a_killed_process_ends_the_others(start: Start) -> None:
    worker, command, stopped = (start(*TWO_PROCESSES) for _ in range(3))
    control = start(*TWO_PROCESSES, without="kill_on_parent_death")
    for run in (worker, command, control, stopped):
        run.wait_for(*STEP_FILES)
        if run in (stopped, control):
            run.send(signal.SIGSTOP, rank=1)
        run.send(signal.SIGKILL, rank=1 if run is worker else None)
    assert len(control.survivors(1)) == 1, "control: a stopped worker survives without the parent-death signal"
    assert command.survivors(1) == [] and stopped.survivors(1) == []
    code, out, seconds = worker.end()
    assert code == 1 and seconds < 5 and worker.survivors() == []
    assert worker.status()["state"] == "FAILED"
    assert "process 1: was ended by SIGKILL" in out and "process 1: was ended by SIGKILL" in worker.log()
    assert "Traceback" not in out


@pytest.mark.slow
def test_an_error_in_one_process_fails_the_run_and_its_traceback_is_logged(start: Start) -> None:
    run = start(*TWO_PROCESSES, "tags.action=close")
    code, out, _ = run.end()
    assert (code, run.status()["state"], run.status()["exit_code"], run.status()["step"]) == (2, "FAILED", 2, 4)
    assert "process 1: out of luck" in out and "Traceback" not in out
    assert "InputError: out of luck" in run.log() and "in steps" in run.log(), "the traceback of process 1"
    assert all((run.run / f"closed-{rank}").exists() for rank in (0, 1)), "both processes had time to close their files"


@pytest.mark.slow
def test_a_process_that_hangs_is_ended_when_another_dies(start: Start) -> None:
    hanging, control = (start(*TWO_PROCESSES, "tags.action=hang", without=off) for off in ("", "watchdog"))
    for run in (hanging, control):
        run.wait_for("hangs")
        run.send(signal.SIGKILL, rank=1)
    code, out, seconds = hanging.end()
    assert code == 1 and seconds < 6 and hanging.status()["state"] == "FAILED"
    assert "process 1: was ended by SIGKILL" in out and hanging.survivors() == []
    assert control.process.poll() is None, "control: without the watchdog the process hangs"


@pytest.mark.slow
def test_a_second_signal_ends_a_process_that_waits_for_a_stopped_one(start: Start) -> None:
    """The wait is a collective operation, during which no handler of a signal can run."""
    two = [option for option in TWO_PROCESSES if not option.startswith("hardware.timeout")]
    stopped, control = (start(*two, "hardware.timeout=60", without=off) for off in ("", "watchdog"))
    for run in (stopped, control):
        run.wait_for(*STEP_FILES)
        run.send(signal.SIGSTOP, rank=1)
        time.sleep(0.5)
        run.send(signal.SIGINT)
        time.sleep(0.5)
        run.send(signal.SIGINT)
    code, out, seconds = stopped.end()
    assert (code, stopped.status()["state"]) == (130, "KILLED") and seconds < 8, out
    assert stopped.survivors(1) == []
    assert control.process.poll() is None, "control: without the watchdog the process waits for the time limit"


@pytest.mark.slow
def test_after_a_signal_all_processes_save_and_a_second_signal_ends_them(start: Start) -> None:
    slow, one_rank = start(*TWO_PROCESSES, "+tags.saving=2.0"), start(*TWO_PROCESSES)
    endless = start(*TWO_PROCESSES, "+tags.saving=30.0")
    for run in (slow, one_rank, endless):
        run.wait_for(*STEP_FILES)
    slow.send(signal.SIGTERM)
    one_rank.send(signal.SIGTERM, rank=1)
    endless.send(signal.SIGINT)
    endless.wait_for("saving-0")
    endless.send(signal.SIGINT)
    for run, expected_code, message in (
        (endless, 130, "interrupted by SIGINT"),
        (one_rank, 143, "interrupted after update"),
        (slow, 143, "interrupted after update"),
    ):
        code, out, seconds = run.end()
        assert (code, run.status()["state"]) == (expected_code, "KILLED"), out
        assert run.status()["error"].startswith(message) and "start again" in out and "Traceback" not in out
        assert seconds < 8 and run.survivors() == []


@pytest.mark.slow
def test_a_signal_while_the_workers_start_ends_them_at_once(start: Start) -> None:
    run = start(*TWO_PROCESSES, cold=True)
    run.wait_for("train.log")
    while len(run.children) < 1:
        run.wait_for("train.log")
    run.send(signal.SIGINT)
    code, out, seconds = run.end()
    assert (code, run.status()["state"]) == (130, "KILLED") and seconds < 10
    assert "Traceback" not in out and run.survivors(2) == []


def test_no_worker_is_left_when_rank_0_is_interrupted() -> None:
    before, started = dict(os.environ), time.monotonic()
    with suppress(KeyboardInterrupt), start_workers(["-S", "-c", "import time; time.sleep(60)"], size=3) as workers:
        assert os.environ["WORLD_SIZE"] == "3" and workers.exit_codes() == {}
        pids = [process.pid for process in workers._processes.values()]
        assert [os.getsid(pid) for pid in pids] == pids, "Ctrl-C would reach the workers"
        raise KeyboardInterrupt
    assert workers.exit_codes() == {1: -signal.SIGKILL, 2: -signal.SIGKILL}
    assert dict(os.environ) == before and time.monotonic() - started < 5


def test_a_signal_while_the_workers_end_does_not_replace_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a failed run would be recorded as KILLED. The control is a signal before the failure."""
    monkeypatch.setattr(launcher, "EXIT_GRACE_S", 0.5)
    entry = [
        "-S",
        "-c",
        "import os, signal, time; time.sleep(0.2); os.kill(os.getppid(), signal.SIGINT); time.sleep(60)",
    ]
    with raise_on_signals():
        with pytest.raises(ValueError, match="out of luck"), start_workers(entry, size=2):
            raise ValueError("out of luck")
        with pytest.raises(InterruptedRun), start_workers(entry, size=2):
            time.sleep(5)


@pytest.mark.slow
def test_a_worker_that_ends_before_the_run_starts_fails_the_run(start: Start) -> None:
    run, control = (start(*TWO_PROCESSES, without=off) for off in ("joining", "joining,exit_codes"))
    code, out, _ = run.end()
    assert (code, run.status()["state"]) == (1, "FAILED")
    assert "process 1: ended with exit code 3" in out and "Traceback" not in out
    assert control.process.poll() is None, "control: rank 0 waits for a rank that never comes"


@pytest.mark.slow
def test_a_failure_before_the_process_group_exists_ends_the_others(start: Start) -> None:
    """Rank 0 waits for the other rank in a call that cannot be interrupted."""
    two = [*TWO_PROCESSES, "hardware.timeout=60"]
    run, control = (start(*two, without=off) for off in ("initializing", "initializing,watchdog"))
    code, out, seconds = run.end()
    assert (code, run.status()["state"]) == (1, "FAILED") and seconds < 15
    assert "process 1: ZeroDivisionError" in out and "ZeroDivisionError" in run.log()
    assert control.process.poll() is None, "control: without the watchdog rank 0 waits for the time limit"


@pytest.mark.slow
def test_under_torchrun_all_ranks_share_one_folder_and_one_status(start: Start) -> None:
    failing, endless = start(*TWO_PROCESSES, "tags.action=value", torchrun=True), start(*TWO_PROCESSES, torchrun=True)
    invalid = start(*TWO_PROCESSES, "model=mikro", torchrun=True)
    endless.wait_for(*STEP_FILES)
    endless.send(signal.SIGTERM)
    endless.end()
    assert endless.status()["state"] == "KILLED" and endless.status()["error"].startswith("interrupted after update")
    assert endless.survivors() == []
    code, out, _ = failing.end()
    assert code == 1 and "process 1: ValueError: out of luck" in out
    assert failing.status()["state"] == "FAILED" and "ValueError: out of luck" in failing.log()
    assert [path.parent.name for path in failing.folder.rglob("status.json")] == ["run"]
    code, out, _ = invalid.end(20)
    assert code == 1 and "did you mean micro?" in out and not invalid.run.exists(), (
        "no rank waits for a run that never starts"
    )


def start_ranks(server: ForkServer, folder: Path, *arguments: str, without: str = "") -> list[Child]:
    """Start two ranks as a launcher does that has no store of its own, so that rank 0 hosts the store."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": "2"}
    variables = [address | {"RANK": rank, "LOCAL_RANK": rank, "WITHOUT": without} for rank in ("0", "1")]
    overrides = (*arguments, *TWO_PROCESSES)
    return [
        server.start("tests.support.launched", *overrides, folder=folder / each["RANK"], variables=each)
        for each in variables
    ]


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_waits_for_others_says_so_and_ends_by_a_signal(
    fork_server: ForkServer, tmp_path: Path, rank: str
) -> None:
    """Variables that another program left behind name processes that never come. No signal ends torch's own wait."""
    variables = {"RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    variables |= {"MASTER_PORT": str(free_ports(1)[0]), "WITHOUT": "patience"}
    command = fork_server.start(
        "tests.support.launched", *TWO_PROCESSES, "hydra.run.dir=run", folder=tmp_path, variables=variables
    )
    deadline = time.monotonic() + 60
    while f"process {rank} of 2 waits for " not in command.err:
        assert time.monotonic() < deadline and command.poll() is None, command.text
        time.sleep(0.02)
    assert "unset RANK WORLD_SIZE" in command.err
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait(10) == 143
    if rank == "0":
        assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "KILLED"


@pytest.mark.slow
def test_rank_0_names_the_rank_that_died_if_it_did_not_start_it(fork_server: ForkServer, tmp_path: Path) -> None:
    main, other = start_ranks(fork_server, tmp_path, "hydra.run.dir=run")
    steps = [tmp_path / "0" / "run" / name for name in STEP_FILES]
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in steps):
        assert time.monotonic() < deadline and main.poll() is None, main.text
        time.sleep(0.02)
    other.kill()
    assert main.wait(15) == 1 and "process 1 died: " in main.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--help"], 0, "wmtp.train num_epochs=1"),
        (["-m", "seed=0,1"], 2, "a sweep starts its own processes"),
        (["model=mikro"], 2, "did you mean micro?"),
    ],
)
def test_all_ranks_end_if_no_run_starts(
    fork_server: ForkServer, tmp_path: Path, arguments: list[str], code: int, text: str
) -> None:
    """In the control, rank 0 ends without a message, and the other rank waits, or loses its connection."""

    ranks = start_ranks(fork_server, tmp_path / "ranks", *arguments)
    assert [rank.wait(20) for rank in ranks] == [code, code], ranks[0].text
    assert ranks[0].text.count(text) == 1 and ranks[1].text == ""
    main, other = start_ranks(fork_server, tmp_path / "control", *arguments, without="shutdown")
    assert main.wait(20) == code
    time.sleep(1)
    assert other.poll() in (None, 1)
    if other.poll() is None:
        other.kill()


def report(rank: int, end: str, when: float, message: str = "") -> ExitReport:
    """Return the exit report of a rank that ended at the time `when`."""
    return ExitReport(rank, end, {FAILED: 1, PEER_FAILED: 1, INTERRUPTED: 143, FINISHED: 0}[end], message, time=when)


def test_the_root_cause_is_distinguished_from_its_consequences() -> None:
    ends = [report(0, PEER_FAILED, 1.0), report(1, FAILED, 2.0), report(2, FAILED, 3.0), report(3, INTERRUPTED, 0.5)]
    by_rank = {end.rank: end for end in ends}
    assert root_cause(by_rank, {0: 1, 1: 1, 3: 143}) is ends[1], "the first rank that failed with an error of its own"
    died = root_cause({0: ends[0], 1: ends[1]}, {0: 1, 1: 1, 2: -9})
    assert died is not None and (died.rank, died.message) == (2, "was ended by SIGKILL")
    assert root_cause({0: ends[0], 3: ends[3]}, {1: -15}) is ends[3], "after a signal, deaths are consequences"
    assert root_cause({0: ends[0], 2: report(2, INTERRUPTED, 9.0), 3: ends[3]}, {}).rank == 2  # type: ignore[union-attr]
    assert root_cause({0: report(0, FINISHED, 1.0)}, {0: 0}) is None


@pytest.mark.slow
def test_only_a_running_command_locks_its_folder(start: Start) -> None:
    """A second signal without a handler kills the command, so its status stays RUNNING."""
    run = start(*ONE_PROCESS, "+tags.saving=30.0", without="second")
    run.wait_for("step-0")
    assert is_running(run.run)
    with pytest.raises(InputError, match=f"is in use by process {run.process.pid} on "):
        RunStatus(run.run)
    assert run.status()["state"] == "RUNNING"
    run.send(signal.SIGTERM)
    run.wait_for("saving-0")
    run.send(signal.SIGINT)
    assert run.end()[0] == -signal.SIGINT
    assert run.status()["state"] == "RUNNING" and not is_running(run.run), "the process id does not matter"
    status = RunStatus(run.run)
    assert not is_running(run.run), "a process ignores its own lock"
    status.end("FINISHED", 0, JobProgress())
    FolderLock(run.run).release()
