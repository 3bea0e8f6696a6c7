"""Resource limits of an untrusted program."""

import math
from dataclasses import dataclass, replace

from wmtp.field_types import Positive, PositiveFloat

MIN_TIME_LIMIT, MAX_TIME_LIMIT = 1.0, 60.0
"""Bounds of the time limit that a record sets, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of one program."""

    wall_seconds: PositiveFloat = 5.0
    """Maximum elapsed time in seconds, measured from the time when the sandbox is ready. All assertions together have
    this time, and each stdio test has this time separately."""
    cpu_seconds: Positive = 5
    """Maximum processor time of each process, in seconds."""
    total_seconds: PositiveFloat = 300.0
    """Maximum elapsed time of all tests of one program together, in seconds."""
    memory_mib: Positive = 512
    """Maximum address space of each process, in MiB."""
    processes: Positive = 16
    """Maximum number of processes and threads in total."""
    file_kib: Positive = 1024
    """Maximum size of each file that the program writes, in KiB."""
    output_kib: Positive = 64
    """Maximum size of standard output in a stdio test, in KiB, to which twice the size of the expected output is added.
    In assertion tests, this is the maximum size of each answer."""

    @property
    def output_bytes(self) -> int:
        """The limit `output_kib`, converted to bytes."""
        return self.output_kib * 1024

    @property
    def folder_bytes(self) -> int:
        """The maximum size of the sandbox's writable folder, in bytes."""
        return 4 * self.file_kib * 1024

    def with_time_limit(self, seconds: float | None) -> "Limits":
        """Return the limits with the time limit of a contest, which limits the processor time of a test.

        It is rounded up to whole seconds, as the kernel counts them, and bounded by `MIN_TIME_LIMIT` and
        `MAX_TIME_LIMIT`. The elapsed time, which depends on what else the machine does, is only raised.
        """
        if seconds is None:
            return self
        bounded = min(max(seconds, MIN_TIME_LIMIT), MAX_TIME_LIMIT)
        return replace(self, cpu_seconds=math.ceil(bounded), wall_seconds=max(self.wall_seconds, bounded))
