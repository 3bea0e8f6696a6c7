"""Processes that learn of each other's failure."""

import pytest

from tests.support.ranks import Ranks
from wmtp.distributed.process_group import Processes
from wmtp.distributed.watchdog import Peers

pytestmark = pytest.mark.xdist_group("ranks")


def look(tells: bool) -> list[int | None]:
    """What each process knows of the other before and after the second says that it failed; both live on."""
    from torch.distributed.distributed_c10d import _get_default_store

    processes = Processes()
    peers = Peers(processes, _get_default_store(), lambda lost: 1)
    before = peers.lost()
    processes.wait()
    if tells and not processes.is_main:
        peers.tell_failed()
    processes.wait()
    after = peers.lost()
    peers._parted.set()  # or this process would soon be ended
    processes.wait()
    return [before, after]


@pytest.mark.slow
def test_a_failure_is_known_where_no_process_number_tells_of_it(ranks: Ranks) -> None:
    assert ranks(look, True) == [[None, 1], [None, None]]
    assert ranks(look, False) == [[None, None], [None, None]], "the control: it is not the process that is missing"
