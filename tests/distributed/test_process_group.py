"""Tests of the collectives of the process group."""

import os
import time
from typing import Any

import pytest
import torch

from tests.support.ranks import Ranks
from tests.support.training import STRATEGIES
from wmtp.distributed.process_group import OtherProcessFailed, Processes

pytestmark = pytest.mark.xdist_group("ranks")


def all_collectives() -> dict[str, Any]:
    """Return the results of all collectives in this rank."""
    processes = Processes()
    mine = torch.tensor([1.0, float(processes.rank)])
    return {
        "sum": processes.sum(mine).tolist(),
        "own": mine.tolist(),
        "max": processes.max(processes.rank, -processes.rank),
        "gather": processes.gather({"rank": processes.rank, "text": "ä" * (1 + 9 * processes.rank)}),
        "run_on_main": processes.run_on_main(lambda: {"rank": processes.rank}),
        "run_on_all": processes.run_on_all(lambda: processes.rank),
    }


@pytest.mark.slow
def test_collectives_give_the_same_result_on_all_ranks(ranks: Ranks) -> None:
    first, second = ranks(all_collectives)
    assert first["sum"] == second["sum"] == [2.0, 1.0]
    assert first["own"] == [1.0, 0.0], "the input tensor is unchanged"
    assert first["max"] == second["max"] == [1.0, 0.0]
    assert first["gather"] == second["gather"] == [{"rank": 0, "text": "ä"}, {"rank": 1, "text": "ä" * 10}]
    assert first["run_on_main"] == second["run_on_main"] == {"rank": 0}
    assert (first["run_on_all"], second["run_on_all"]) == (0, 1)


def fail_on(rank: int) -> str:
    """Let an action of `run_on_all` fail on one rank, and return the error of this rank."""
    processes = Processes()

    def action() -> None:
        if processes.rank == rank:
            raise OSError(28, "No space left on device")

    try:
        processes.run_on_all(action)
    except OSError as error:
        return f"own: {error}"
    except OtherProcessFailed as error:
        return f"other: {error}"
    return "nothing"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_on_one_rank_is_raised_on_all(ranks: Ranks, rank: int) -> None:
    started = time.monotonic()
    outcomes = ranks(fail_on, rank)
    assert outcomes[rank] == "own: [Errno 28] No space left on device"
    assert outcomes[1 - rank] == f"other: process {rank}: [Errno 28] No space left on device"
    assert time.monotonic() - started < 20


def fail_alone() -> None:
    """Fail on rank 0 without `run_on_all`, while the other rank waits."""
    processes = Processes()
    if processes.is_main:
        raise OSError(28, "No space left on device")
    processes.barrier()


@pytest.mark.slow
def test_control_without_run_on_all_the_other_rank_times_out(ranks: Ranks) -> None:
    waiting = ranks.outcomes(fail_alone, timeout=3.0)[1]
    assert waiting.error is not None


def test_a_single_process_does_not_wait() -> None:
    processes = Processes()
    assert processes.is_main and processes.size == 1
    assert processes.sum(torch.ones(2)).tolist() == [1.0, 1.0]
    assert processes.max(3, 4) == [3, 4]
    assert processes.gather("a") == ["a"] and processes.run_on_main(lambda: object) is object


def process_id(overrides: list[str]) -> int:
    """Return the process id of this rank."""
    return os.getpid()


@pytest.mark.slow
def test_fsdp_runs_in_other_processes_than_ddp(ranks: Ranks) -> None:
    ddp, fsdp = (ranks(process_id, STRATEGIES[strategy]) for strategy in ("ddp", "fsdp"))
    assert set(ddp).isdisjoint(fsdp)
    assert ranks(process_id, STRATEGIES["ddp"]) == ddp, "control: the processes of a strategy stay the same"
