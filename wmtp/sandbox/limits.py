"""What one untrusted program may use."""

from dataclasses import dataclass

from wmtp.field_types import Positive, PositiveFloat


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one program.

    `wall_seconds` holds for all assertion tests together, and for each test by standard input by itself;
    it runs once the program's process is ready. `cpu_seconds`, `memory_mib` (of address space) and `file_kib`
    (of one file) hold for each process, `processes` counts processes and threads. `output_kib` bounds what is
    written to standard output and standard error together, and every single answer to a test's question.
    """

    wall_seconds: PositiveFloat = 5.0
    cpu_seconds: Positive = 5
    memory_mib: Positive = 512
    processes: Positive = 16
    file_kib: Positive = 1024
    output_kib: Positive = 64

    @property
    def output_bytes(self) -> int:
        """`output_kib` in bytes."""
        return self.output_kib * 1024

    @property
    def folder_bytes(self) -> int:
        """What all files in the writable folder may take together."""
        return 4 * self.file_kib * 1024
