"""Tests of the watchdog: detection of failed ranks."""

import pytest

from tests.support.ranks import Ranks
from wmtp.distributed.process_group import Processes
from wmtp.distributed.store import ProcessAddress
from wmtp.distributed.watchdog import Watchdog

pytestmark = pytest.mark.xdist_group("ranks")


def dead_ranks(reports: bool) -> list[int | None]:
    """Return the dead rank that this rank detects before and after rank 1 reports a failure, while both run on."""
    from torch.distributed.distributed_c10d import _get_default_store

    processes = Processes()
    ranks = [ProcessAddress(*address) for address in processes.gather(ProcessAddress.own())]
    watchdog = Watchdog(processes.rank, ranks, _get_default_store(), lambda error: 1)
    before = watchdog.dead_rank()
    processes.barrier()
    if reports and not processes.is_main:
        watchdog.report_failure()
    processes.barrier()
    after = watchdog.dead_rank()
    watchdog.stop()  # otherwise the watchdog would end this process
    processes.barrier()
    return [before, after]


@pytest.mark.slow
def test_a_reported_failure_is_detected_while_the_process_is_alive(ranks: Ranks) -> None:
    assert ranks(dead_ranks, True) == [[None, 1], [None, None]]
    assert ranks(dead_ranks, False) == [[None, None], [None, None]], "control: without a report no rank is dead"
