"""Kill a training run at random times, resume it each time, and check its final state.

    python -m tests.support.killing [kills] [seed]

One process imports everything once and forks the trainings, so that each start takes one second instead of ten.
"""

import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import wmtp.training.run  # noqa: F401 - imported once for all forked processes
from tests.conftest import TINY
from tests.support.forking import fork, run_module
from wmtp.checkpoint.store import find_damage

UPDATES = 60
RUN = [
    *TINY, "tracking=none", f"max_steps={UPDATES}", "num_epochs=99", "batch_size=4", "save_interval=5",
    "eval_interval=25", "early_stopping=none", "model.dropout=0.1", "num_samples=0", "hardware=cpu",
]  # fmt: skip


def start(folder: Path, log: Path, *overrides: str) -> int:
    """Fork a process that runs the command with its output in `log`, and return its process id."""

    def run() -> None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        run_module("wmtp.train", list(overrides))

    return fork(run)


def wait(pid: int) -> int:
    """Wait for a process, and return its exit code; negative after a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def last_model(run: Path) -> bytes:
    """Return the content of the model file after the last update."""
    return (run / "checkpoints" / f"step_{UPDATES:08d}" / "model.safetensors").read_bytes()


def kill_at_random(kills: int, seed: int, folder: Path) -> dict[str, int]:
    """Kill a training run at least `kills` times, and return the counts of kills, resumed runs and completed runs.

    Checks that every start resumes from a complete checkpoint, and that every completed run ends with the same model
    as an undisturbed run. Each kill happens within half the duration of the undisturbed run, so that slow and fast
    machines are tested at the same points. Kills continue until at least `kills` / 2 runs were resumed from a
    checkpoint.
    """
    rng, log = random.Random(seed), folder / "log"
    first_overrides = [*RUN, f"cache_dir={folder / 'cache'}"]
    undisturbed, run = folder / "undisturbed", folder / "run"
    started = time.monotonic()
    assert wait(start(folder, log, *first_overrides, f"hydra.run.dir={undisturbed}")) == 0, log.read_text()
    longest = (time.monotonic() - started) / 2
    counts = {"kills": 0, "resumed": 0, "completed": 0, "steps found": 0}
    found: set[str] = set()
    while (more := counts["kills"] < kills or counts["resumed"] < kills / 2) or run.exists():
        checkpoints = sorted((run / "checkpoints").glob("step_*"))
        resumable = any((path / "manifest.json").exists() for path in checkpoints)
        if not resumable:
            shutil.rmtree(run, ignore_errors=True)
        overrides = [f"resume={run}"] if resumable else [*first_overrides, f"hydra.run.dir={run}"]
        pid = start(folder, log, *overrides)
        if more:
            time.sleep(rng.uniform(0, longest))
            os.kill(pid, signal.SIGKILL)
        code = wait(pid)
        text = log.read_text()
        assert code in (0, -signal.SIGKILL), text
        assert "damaged" not in text, text
        counts["kills"] += code == -signal.SIGKILL
        if resumable and "resuming from" in text:
            counts["resumed"] += 1
            found.add(text.partition("resuming from ")[2].split()[0][-13:])
        for path in checkpoints:
            assert not path.exists() or find_damage(path) is None, path
        if code == 0:
            assert last_model(run) == last_model(undisturbed), "the final model differs from the undisturbed run's"
            counts["completed"] += 1
            shutil.rmtree(run)
    return counts | {"steps found": len(found)}


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]] or [100]
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(kill_at_random(arguments[0], arguments[1] if len(arguments) > 1 else 0, Path(folder))))
