"""Test of SIGKILL at random times of a run that saves every five updates."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_result() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killing", "12"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    counts = eval(done.stdout.splitlines()[-1])
    assert counts["kills"] >= 12 and counts["resumed"] >= 6 and counts["completed"] >= 1
