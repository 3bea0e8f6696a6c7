"""What processes tell each other."""

import time
from typing import Any

import pytest
import torch

from tests.support.ranks import Ranks
from wmtp.distributed.process_group import OtherProcessFailed, Processes

pytestmark = pytest.mark.xdist_group("ranks")


def talk() -> dict[str, Any]:
    processes = Processes()
    mine = torch.tensor([1.0, float(processes.rank)])
    return {
        "sum": processes.sum(mine).tolist(),
        "own": mine.tolist(),
        "largest": processes.largest(processes.rank, -processes.rank),
        "gather": processes.gather({"rank": processes.rank, "text": "ä" * (1 + 9 * processes.rank)}),
        "main": processes.from_main(lambda: {"rank": processes.rank}),
        "together": processes.together(lambda: processes.rank),
    }


@pytest.mark.slow
def test_every_process_learns_the_same(ranks: Ranks) -> None:
    first, second = ranks(talk)
    assert first["sum"] == second["sum"] == [2.0, 1.0]
    assert first["own"] == [1.0, 0.0], "the tensor that was given stays as it is"
    assert first["largest"] == second["largest"] == [1.0, 0.0]
    assert first["gather"] == second["gather"] == [{"rank": 0, "text": "ä"}, {"rank": 1, "text": "ä" * 10}]
    assert first["main"] == second["main"] == {"rank": 0}
    assert (first["together"], second["together"]) == (0, 1)


def fail_on(rank: int) -> str:
    processes = Processes()

    def action() -> None:
        if processes.rank == rank:
            raise OSError(28, "No space left on device")

    try:
        processes.together(action)
    except OSError as error:
        return f"own: {error}"
    except OtherProcessFailed as error:
        return f"other: {error}"
    return "nothing"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_in_one_process_is_one_in_all(ranks: Ranks, rank: int) -> None:
    started = time.monotonic()
    outcomes = ranks(fail_on, rank)
    assert outcomes[rank] == "own: [Errno 28] No space left on device"
    assert outcomes[1 - rank] == f"other: process {rank}: [Errno 28] No space left on device"
    assert time.monotonic() - started < 20


def fail_alone() -> None:
    processes = Processes()
    if processes.is_main:
        raise OSError(28, "No space left on device")
    processes.wait()


@pytest.mark.slow
def test_the_control_a_process_that_is_not_told_waits_in_vain(ranks: Ranks) -> None:
    waiting = ranks.outcomes(fail_alone, timeout=3.0)[1]
    assert waiting.error is not None


def test_alone_there_is_nobody_to_wait_for() -> None:
    processes = Processes()
    assert processes.is_main and processes.size == 1
    assert processes.sum(torch.ones(2)).tolist() == [1.0, 1.0]
    assert processes.largest(3, 4) == [3, 4]
    assert processes.gather("a") == ["a"] and processes.from_main(lambda: object) is object
