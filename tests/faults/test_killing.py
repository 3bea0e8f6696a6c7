"""Test of SIGKILL at random times of a run that saves every five updates."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(40, marks=pytest.mark.deep)])
def test_killed_runs_resume_to_the_same_result(kills: int) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killing", str(kills)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["kills"] >= kills and counts["resumed"] >= kills / 2 and counts["completed"] >= 1
