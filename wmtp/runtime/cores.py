"""How many cores this process may keep busy."""

import os

SHARE = "WMTP_CORES"
"""In the environment of a sweep's job: its share of the machine's cores, where several jobs run at once."""


def num_cores() -> int:
    """The share of a sweep's job, or all cores that the system lets this process use."""
    if SHARE in os.environ:
        return int(os.environ[SHARE])
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def keep_to_share() -> None:
    """Let torch compute in as many threads as the job has cores, unless the user has said how many."""
    if SHARE in os.environ and "OMP_NUM_THREADS" not in os.environ:
        import torch  # was imported before, when OMP_NUM_THREADS could not be known

        torch.set_num_threads(num_cores())
