"""A fast fake training job without torch.

A file `behavior-<job>` next to the run's folder can contain "fail", "die" (killed after a checkpoint), "forget" (no
summary.json) or "wait". Without this file, the job succeeds.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from wmtp.runtime.run_dir import SAVED_OVERRIDES, FolderLock, JobProgress, RunStatus  # noqa: F401 - a test uses FolderLock
from wmtp.sweep.state import RESULT_KEYS

LOG = "started\nTraceback (most recent call last)\n  somewhere\nValueError: no luck\n"


def value_of(arguments: list[str], key: str) -> str | None:
    """Return the last value of a key in the overrides, or None."""
    found = [a.partition("=")[2].strip("'") for a in arguments if a.lstrip("+").startswith(f"{key}=")]
    return found[-1] if found else None


def main(arguments: list[str]) -> None:
    """Write the files of a run, as the behavior file requests. The last argument is the file of the job."""
    arguments = json.loads(Path(arguments[-1]).read_text())["overrides"]
    resumed = value_of(arguments, "resume")
    folder = Path(resumed or value_of(arguments, "hydra.run.dir") or "")
    folder.mkdir(parents=True, exist_ok=True)
    cores = os.environ.get("WMTP_CORES")
    with (folder.parent / "calls").open("a") as file:
        file.write(json.dumps({"job": folder.name, "resume": resumed, "cores": cores, "time": time.time()}) + "\n")
    status, behavior = RunStatus(folder), folder.parent / f"behavior-{folder.name}"
    (folder / SAVED_OVERRIDES).parent.mkdir(exist_ok=True)
    (folder / SAVED_OVERRIDES).write_text(json.dumps(arguments))
    seed, beta = int(value_of(arguments, "seed") or 0), float(value_of(arguments, "algo.beta") or 0)
    match behavior.read_text() if behavior.exists() else "":
        case "fail":
            (folder / "train.log").write_text(LOG)
            status.end("FAILED", 1, JobProgress(), error="ValueError: no luck")
            print("ValueError: no luck", file=sys.stderr)
            sys.exit(1)
        case "die":
            saved = folder / "checkpoints" / "step_00000001"
            saved.mkdir(parents=True)
            (saved / "manifest.json").write_text("{}")
            os.kill(os.getpid(), signal.SIGKILL)
        case "forget":
            status.end("FINISHED", 0, JobProgress())
            return
        case "wait":
            signal.signal(signal.SIGINT, lambda *_: end(status))
            print("waiting", flush=True)
            time.sleep(30)
    config: dict[str, Any] = {"seed": seed, "algo": {"beta": beta}}
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is valid YAML
    line = {"step": 1, "val/loss": beta + seed / 100}
    summary = dict.fromkeys(RESULT_KEYS) | {"final_loss": line["val/loss"], "best": line, "last": line}
    (folder / "summary.json").write_text(json.dumps(summary))
    status.end("FINISHED", 0, JobProgress())
    print("done")


def end(status: RunStatus) -> None:
    """Record an interruption in the status, and exit."""
    status.end("KILLED", 130, JobProgress(), error="interrupted")
    sys.exit(130)


if __name__ == "__main__":
    main(sys.argv[1:])
