"""Resource limits of an untrusted program."""

from dataclasses import dataclass

from wmtp.field_types import Positive, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Resource limits of one program."""

    wall_seconds: PositiveFloat = 5.0
    """Maximum elapsed time in seconds, measured from the time when the sandbox is ready. All assertions together have
    this time, and each stdio test has this time separately."""
    cpu_seconds: Positive = 5
    """Maximum processor time of each process, in seconds."""
    memory_mib: Positive = 512
    """Maximum address space of each process, in MiB."""
    processes: Positive = 16
    """Maximum number of processes and threads in total."""
    file_kib: Positive = 1024
    """Maximum size of each file that the program writes, in KiB."""
    output_kib: Positive = 64
    """Maximum size of standard output and standard error together, in KiB. In a stdio test, twice the size of the
    expected output is added to this limit. In assertion tests, this is also the maximum size of each answer."""

    @property
    def output_bytes(self) -> int:
        """The limit `output_kib`, converted to bytes."""
        return self.output_kib * 1024

    @property
    def folder_bytes(self) -> int:
        """The maximum size of the sandbox's writable folder, in bytes."""
        return 4 * self.file_kib * 1024
