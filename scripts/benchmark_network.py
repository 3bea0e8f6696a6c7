"""What an MLflow server and an S3 store cost a training: `scripts/benchmark_network.py [pairs] [updates]`.

The micro model on the embedded tasks, with one thread, twice at the same time: with metrics and checkpoints going to
real servers on this machine, and without. Every update is logged and every twentieth saved, 19 MB each. As both run
at once, whatever else the machine does, the servers included, slows both; only the time when both ran counts. Prints
the ratio of the median times of an update for each pair, and the median of these.
"""

import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.forking import Child, Nursery
from tests.servers import ObjectStore, TrackingServer, started_store, started_tracking

LIMIT = 1.05
"""The most that an update may take, in updates of a training without servers."""
SERVERS_OFF = ["tracking=none"]


def times_of(folder: Path) -> list[float]:
    """When each update was logged."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [float(line["time"]) for line in lines if "train/loss" in line]


def median_update(times: list[float], start: float, end: float) -> float:
    """The median time of an update between two moments."""
    return statistics.median(b - a for a, b in itertools.pairwise(times) if start <= a and b <= end)


def require_success(child: Child, pair: int) -> None:
    """Raises where a training did not end well."""
    if (code := child.wait()) != 0:
        raise RuntimeError(f"a training of pair {pair} ended with {code}:\n{child.text}")


def ratio_of(
    pair: int, updates: int, nursery: Nursery, store: ObjectStore, server: TrackingServer, home: Path
) -> float:
    """Train once with the servers and once without, at the same time; the ratio of their median updates."""
    bucket = store.new_bucket()
    on = ["checkpoint=s3", f"checkpoint.remote=s3://{bucket}/runs"]
    plan = [f"max_steps={updates}", "num_epochs=99", "log_interval=1", "save_interval=20", "eval_interval=100000"]
    rest = ["early_stopping=none", "num_samples=0", "num_validation_samples=0", "hardware=cpu"]
    variables = store.environment() | server.environment()
    folders = {name: home / f"{pair}-{name}" for name in ("on", "off")}
    children = []
    for name in ("on", "off") if pair % 2 else ("off", "on"):  # neither always begins
        own = on if name == "on" else SERVERS_OFF
        overrides = [*plan, *rest, *own, f"cache_dir={home / 'cache'}", f"hydra.run.dir={folders[name]}"]
        children.append(nursery.start("train", *overrides, folder=home, variables=variables))
    for child in children:
        require_success(child, pair)
    times = {name: times_of(folder) for name, folder in folders.items()}
    start, end = max(each[0] for each in times.values()), min(each[-1] for each in times.values())
    medians = {name: median_update(each, start, end) for name, each in times.items()}
    ratio = medians["on"] / medians["off"]
    print(
        f"  pair {pair}: {medians['on'] * 1e3:6.1f} ms with, {medians['off'] * 1e3:6.1f} ms without, ratio {ratio:.3f}"
    )
    return ratio


def main(num_pairs: int, updates: int) -> None:
    """Print the ratio of every pair, their median, and whether that is within the limit."""
    with tempfile.TemporaryDirectory() as name, Nursery() as nursery:
        home = Path(name)
        for folder in ("s3", "mlflow"):
            (home / folder).mkdir()
        store = started_store(home / "s3")
        server = started_tracking(home / "mlflow", store)
        try:
            ratios = [ratio_of(pair, updates, nursery, store, server, home) for pair in range(num_pairs)]
        finally:
            server.kill()
            store.stop()
    ratio = statistics.median(ratios)
    print(f"median of {num_pairs}: {ratio:.3f} ({'within' if ratio <= LIMIT else 'ABOVE'} {LIMIT})")


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    main(*arguments, *[5, 100][len(arguments) :])
