"""Compare two processes of one thread with one process of two threads: tokens per second, and bytes sent by gloo.

    python scripts/benchmark_scaling.py [rounds]

Each round trains the micro model for some updates in one process, then with DDP, then with FSDP, on the same
batches. Ratios are those of the medians. Bytes are those received on the loopback during the run. Linux only.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

UPDATES = 40
ARMS = {
    "1 process × 2 threads": (["hardware=cpu"], "2"),
    "2 processes × 1 thread, ddp": (["hardware=cpux2"], "1"),
    "2 processes × 1 thread, fsdp": (["hardware=cpux2", "hardware.strategy=fsdp"], "1"),
}


def loopback_bytes() -> int:
    """Return the bytes received on the loopback interface since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counters = line.strip().partition(":")
        if name == "lo":
            return int(counters.split()[0])
    raise SystemExit("no loopback interface in /proc/net/dev, so sent bytes cannot be counted")


def measured(folder: Path, overrides: list[str], threads: str) -> tuple[float, float, int]:
    """Train a short run, and return its tokens per second, bytes per update and number of parameters."""
    command = [
        sys.executable, "-m", "wmtp.train", *overrides, f"max_steps={UPDATES}", "log_interval=5", "tracking=none",
        "eval_interval=null", "data.num_validation=8", "num_samples=0", "num_validation_samples=0",
        f"hydra.run.dir={folder}",
    ]  # fmt: skip
    before = loopback_bytes()
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    moved = (loopback_bytes() - before) / UPDATES
    summary = json.loads((folder / "summary.json").read_text())
    return summary["tokens_per_second"], moved, summary["parameters"]


def main() -> None:
    """Print the medians and their ratios to one process."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    speeds: dict[str, list[float]] = {arm: [] for arm in ARMS}
    moved: dict[str, list[float]] = {arm: [] for arm in ARMS}
    parameters = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for place, (arm, (overrides, threads)) in enumerate(ARMS.items()):
                run = Path(folder) / f"{place}-{number}"
                speed, bytes_moved, parameters = measured(run, overrides, threads)
                speeds[arm].append(speed)
                moved[arm].append(bytes_moved)
    base = statistics.median(speeds[next(iter(ARMS))])
    print(
        f"{parameters:,} parameters: {4 * parameters / 1e6:.1f} MB of gradients; {rounds} rounds of {UPDATES} updates"
    )
    for arm in ARMS:
        speed = statistics.median(speeds[arm])
        print(
            f"{arm:30} {speed:8,.0f} tokens/s   {speed / base:.2f} of one process   "
            f"{statistics.median(moved[arm]) / 1e6:6.1f} MB per update over the loopback"
        )


if __name__ == "__main__":
    main()
