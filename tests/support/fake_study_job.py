"""A fake run of a study without torch: `python -m tests.support.fake_study_job OVERRIDES…`.

Its metric is a simple function of the arm, the searched setting, the number of updates and the seed. Each start is a
line of the file `calls` in the study's folder. A file `behavior` there contains "wait", "fail" or "kill" for the name
of a run's folder; a run that waits or is killed has no checkpoint.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.support.fake_runs import fake_run
from wmtp.config.overrides import override_key, override_text
from wmtp.runtime.run_dir import SAVED_OVERRIDES, RunStatus

EFFECTS = {"baseline": 0.0, "good": -0.4, "equal": 0.0, "bad": 0.5}


def end_loss(algo: str, lr: float, updates: int, seed: int) -> float:
    """Return the end loss of a run: lower for good arms, for lr near 0.01, and for more updates."""
    noise = random.Random(f"{algo}/{seed}/{updates}").gauss(0, 0.01) + random.Random(seed).gauss(0, 0.05)
    return 2.0 + EFFECTS[algo] + abs(lr - 0.01) + 30 / updates + noise


def main(arguments: list[str]) -> None:
    """Write the folder of a run."""
    values = {override_key(each): override_text(each) for each in arguments}
    folder = Path(values["hydra.run.dir"])
    study = next(parent for parent in folder.parents if (parent / "study.lock.json").exists())
    name = str(folder.relative_to(study))
    with (study / "calls").open("a") as file:
        file.write(json.dumps({"name": name, "pid": os.getpid()}) + "\n")
    behaviors = json.loads((study / "behavior").read_text()) if (study / "behavior").exists() else {}
    if behaviors.get(name) in ("wait", "kill"):
        RunStatus(folder)
        time.sleep(60 if behaviors[name] == "wait" else 0)
        os.kill(os.getpid(), signal.SIGKILL)
    algo, lr, updates = values.get("algo", "baseline"), float(values["optimizer.lr"]), int(values["max_steps"])
    seed = int(values["seed"])
    if folder.exists():
        shutil.rmtree(folder)
    state = "FAILED" if behaviors.get(name) == "fail" else "FINISHED"
    loss = end_loss(algo, lr, updates, seed)
    fake_run(
        folder, algo=algo, seed=seed, val_losses=[3.0] * (updates // 10 - 1) + [loss], state=state,
        started="2099-01-01T00:00:00+00:00", **{"optimizer.lr": lr, "max_steps": updates},
    )  # fmt: skip
    (folder / SAVED_OVERRIDES).write_text(json.dumps(arguments))
    if state == "FAILED":
        status = json.loads((folder / "status.json").read_text())
        (folder / "status.json").write_text(json.dumps(status | {"exit_code": 1}))
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
