"""Run the programs of a run's samples.jsonl against their tests: `scripts/check_samples.py RUN`.

The programs come from a model. Each runs in a process of its own with a time limit, but nothing else
keeps it from the files and the network of this machine.
"""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

SECONDS = 5


def passes(sample: dict[str, Any]) -> bool:
    """Whether a completion, followed by its tests, ends without an error in time."""
    program = "\n".join([sample["completion"], sample["setup"], *sample["tests"]])
    try:
        done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def main(run: Path) -> None:
    """Print the passes, by difficulty and in all."""
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    asked = Counter(sample["difficulty"] for sample in samples)
    passed = Counter(sample["difficulty"] for sample in samples if passes(sample))
    for difficulty in sorted(asked):
        print(f"difficulty {difficulty}: {passed[difficulty]} of {asked[difficulty]}")
    print(f"all: {passed.total()} of {asked.total()} programs pass their tests")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
