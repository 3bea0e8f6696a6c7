"""Resource limits of an untrusted program."""

from dataclasses import dataclass

from wmtp.field_types import Positive, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of one program."""

    wall_seconds: PositiveFloat = 5.0
    """Elapsed time from when the process is ready: for all assertion tests in total, and for each stdio test."""
    cpu_seconds: Positive = 5
    """Processor time of each process."""
    memory_mib: Positive = 512
    """Address space of each process."""
    processes: Positive = 16
    """Processes and threads in total."""
    file_kib: Positive = 1024
    """Size of one file."""
    output_kib: Positive = 64
    """Size of standard output and standard error in total, and of each answer in assertion tests."""

    @property
    def output_bytes(self) -> int:
        """The limit `output_kib` in bytes."""
        return self.output_kib * 1024

    @property
    def folder_bytes(self) -> int:
        """Size limit in bytes of the writable folder."""
        return 4 * self.file_kib * 1024
