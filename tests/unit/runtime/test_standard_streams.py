"""Tests of standard streams that can no longer be written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import contextlib, os, sys
from wmtp.errors import WmtpError
from wmtp.runtime.standard_streams import lasting_streams, require_written_output
with {context}:
    for _ in range(3):
        print("ä", "x" * 100_000)
        print("warning", file=sys.stderr)
    file = open("file", "w")
    with contextlib.suppress(OSError):
        os.write(2, b"message of a library")
    try:
        require_written_output()
    except WmtpError as error:
        file.write(str(error))
    file.write(f"{{file.fileno() > 2}}")
"""
"""Program that prints, and writes to a file how it ended."""


def run_script(folder: Path, redirection: str, context: str = "lasting_streams()") -> tuple[int, str]:
    """Run the program in a shell with a redirection; return its exit code and the content of its file."""
    program = SCRIPT.format(context=context)
    command = f'"$0" -c "$1" {redirection}; exit ${{PIPESTATUS[0]}}'
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, program], cwd=folder, env=environment, capture_output=True, timeout=30
    )
    file = folder / "file"
    return done.returncode, file.read_text() if file.exists() else ""


@pytest.mark.parametrize(
    ("redirection", "expected"),
    [
        ("| head -c 1", "True"),
        (">/dev/full 2>/dev/full", "standard output cannot be written: No space left on device" + "True"),
        (">&- 2>&-", "True"),
        ("2>&1 | cat", "True"),
    ],
)
def test_a_program_continues_without_its_standard_streams(tmp_path: Path, redirection: str, expected: str) -> None:
    """The control shows that each of these cases ends the program, or writes a library's message to its file."""
    assert run_script(tmp_path, redirection) == (0, expected)
    assert run_script(tmp_path, redirection, "contextlib.nullcontext()") != (0, expected)


def test_a_reader_that_does_not_keep_up_with_a_nonblocking_stream_loses_nothing(tmp_path: Path) -> None:
    program = (
        "import os\nfrom wmtp.runtime.standard_streams import lasting_streams\nos.set_blocking(1, False)\n"
        "with lasting_streams():\n    print('x' * 1_000_000)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    command = '"$0" -c "$1" | (sleep 0.3; wc -c)'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, program], cwd=tmp_path, env=environment, capture_output=True, timeout=30
    )
    assert int(done.stdout) == 1_000_001
