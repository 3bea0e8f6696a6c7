"""The watchdog: detection of failed ranks."""

import pytest

from tests.support.ranks import Ranks
from wmtp.distributed.process_group import Processes
from wmtp.distributed.watchdog import Watchdog

pytestmark = pytest.mark.xdist_group("ranks")


def dead_ranks(reports: bool) -> list[int | None]:
    """Return the dead rank that each rank sees before and after rank 1 reports a failure; both keep running."""
    from torch.distributed.distributed_c10d import _get_default_store

    processes = Processes()
    watchdog = Watchdog(processes, _get_default_store(), lambda rank: 1)
    before = watchdog.dead_rank()
    processes.barrier()
    if reports and not processes.is_main:
        watchdog.report_failure()
    processes.barrier()
    after = watchdog.dead_rank()
    watchdog._stopped.set()  # otherwise the watchdog would end this process
    processes.barrier()
    return [before, after]


@pytest.mark.slow
def test_a_reported_failure_is_seen_although_the_process_lives(ranks: Ranks) -> None:
    assert ranks(dead_ranks, True) == [[None, 1], [None, None]]
    assert ranks(dead_ranks, False) == [[None, None], [None, None]], "the control: the process is not missing"
