"""Measure the cost of MLflow and S3 in a training: `scripts/benchmark_network.py [pairs] [updates] [--faults]`.

A pair is two trainings of the micro model on the generated tasks, with one thread each. One sends its metrics and
checkpoints to real servers on this machine, the other does not. Every update is logged, and every twentieth update is
saved (19 MB). The two trainings alternate in turns of two seconds, while the other is stopped (SIGSTOP), so that both
run under the same load. Only updates that lie completely within a turn are counted. With `--faults`, the store
responds five times with status 503, drops two connections, and does not respond for eight seconds.

The script prints the ratio of the median update times for each pair, and the median of the ratios. The exit code is 1
if this median is above the limit.
"""

import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.forking import Child, ForkServer
from tests.support.proxy import FaultyProxy
from tests.support.servers import ObjectStore, TrackingServer, start_store, start_tracking_server

LIMIT, LIMIT_WITH_FAULTS = 1.05, 1.10
"""Limits for the ratio of the update times, with servers to without servers."""
WARM_UP = 3
"""Number of updates of each training before the measurement."""
TURN = 2.0
"""Length of a turn in seconds."""
Turns = list[tuple[float, float]]


def times_of(folder: Path) -> list[float]:
    """Return the time at which each update was logged."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["time"] for line in lines if line.endswith("\n") and "train/loss" in line]


def take_turns(children: dict[str, Child], folders: dict[str, Path]) -> dict[str, Turns]:
    """Run the trainings in turns until one ends; return the start and end times of the turns of each."""
    while any(len(times_of(folder)) < WARM_UP for folder in folders.values()):
        require_none_failed(children)
        time.sleep(0.05)
    for child in children.values():
        os.kill(child.pid, signal.SIGSTOP)
    turns: dict[str, Turns] = {name: [] for name in children}
    for name in itertools.cycle(children):
        start = time.time()
        os.kill(children[name].pid, signal.SIGCONT)
        time.sleep(TURN)
        if children[name].poll() is not None:
            break
        os.kill(children[name].pid, signal.SIGSTOP)
        turns[name].append((start, time.time()))
    for child in children.values():
        if child.poll() is None:
            os.kill(child.pid, signal.SIGCONT)
    for child in children.values():
        child.wait()
    require_none_failed(children)
    return turns


def require_none_failed(children: dict[str, Child]) -> None:
    """Raise RuntimeError if a training failed."""
    for name, child in children.items():
        if child.poll() not in (None, 0):
            raise RuntimeError(f"the training {name} ended with {child.poll()}:\n{child.text}")


def median_update(times: list[float], turns: Turns) -> float:
    """Return the median duration of the updates that lie within a turn, in seconds."""
    pairs = itertools.pairwise(times)
    return statistics.median(b - a for a, b in pairs if any(start <= a and b <= end for start, end in turns))


def ratio_of(
    pair: int,
    updates: int,
    fork_server: ForkServer,
    store: ObjectStore,
    server: TrackingServer,
    home: Path,
    network: FaultyProxy | None,
) -> float:
    """Run one pair, and return the ratio of its median update times; `network` is a proxy before the store."""
    if network is not None:
        network.answer(503, 5)
        network.drop(2)
        network.stall(8)
    stored = ["checkpoint=s3", f"checkpoint.s3.url=s3://{store.new_bucket()}/runs"]
    plan = [f"max_steps={updates}", "num_epochs=99", "log_interval=1", "save_interval=20", "eval_interval=100000"]
    rest = ["early_stopping=none", "num_samples=0", "num_validation_samples=0", "hardware=cpu"]
    variables = store.environment(network and network.url) | server.environment()
    own = {"with": stored, "without": ["tracking=none"]}
    folders = {name: home / f"{pair}-{name}" for name in own}
    children: dict[str, Child] = {}
    for name in own if pair % 2 else reversed(own):  # each starts first in every second pair
        overrides = [*plan, *rest, *own[name], f"cache_dir={home / 'cache'}", f"hydra.run.dir={folders[name]}"]
        children[name] = fork_server.start("train", *overrides, folder=home, variables=variables)
    turns = take_turns(children, folders)
    medians = {name: median_update(times_of(folder), turns[name]) for name, folder in folders.items()}
    ratio = medians["with"] / medians["without"]
    words = ", ".join(f"{median * 1e3:6.1f} ms {name}" for name, median in sorted(medians.items()))
    print(f"  pair {pair + 1}: {words}, ratio {ratio:.3f}", flush=True)
    return ratio


def main(num_pairs: int, updates: int, *, has_faults: bool) -> int:
    """Print the ratio of every pair, their median, and whether it is within the limit; return the exit code."""
    with tempfile.TemporaryDirectory() as name, ForkServer() as fork_server, ExitStack() as stack:
        home = Path(name)
        for folder in ("s3", "mlflow"):
            (home / folder).mkdir()
        store = start_store(home / "s3")
        server = start_tracking_server(home / "mlflow", store)
        network = stack.enter_context(FaultyProxy(store.endpoint_url)) if has_faults else None
        try:
            ratios = [ratio_of(pair, updates, fork_server, store, server, home, network) for pair in range(num_pairs)]
        finally:
            server.kill()
            store.stop()
    ratio, limit = statistics.median(ratios), LIMIT_WITH_FAULTS if has_faults else LIMIT
    print(f"median of {num_pairs}: {ratio:.3f} ({'within' if ratio <= limit else 'ABOVE'} {limit})")
    return int(ratio > limit)


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:] if argument != "--faults"]
    sys.exit(main(*numbers, *[5, 100][len(numbers) :], has_faults="--faults" in sys.argv))
