"""Send what runs left behind: `python -m wmtp.sync RUN|outputs …`: metrics, statuses and checkpoints.

Safe to run twice, and beside a running training, which sends by itself.
"""

import argparse
import logging
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main listens, Ctrl-C ends this process without a word

from wmtp.environment import load_environment
from wmtp.errors import InputError, InterruptedRun, PendingError
from wmtp.runtime.folder import RECEIPT, RUN, close_dead, is_running, read_status, typed
from wmtp.runtime.signals import raised_signals


def main(arguments: list[str] | None = None) -> int:
    """Deliver every run below the named folders; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m wmtp.sync", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN|outputs", help="a run's folder, or one above it")
    folders: list[Path] = parser.parse_args(arguments).folders
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    load_environment()
    code = 0
    try:
        with raised_signals():
            for folder in runs_below(folders):
                code = max(code, deliver(folder))
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except InterruptedRun as error:
        print(f"{error}; what was not sent is still there", file=sys.stderr)
        return error.exit_code
    return code


def runs_below(folders: list[Path]) -> list[Path]:
    """The folders of runs, the oldest first, and then of sweeps.

    Raises:
        InputError: there is none.
    """
    found: set[Path] = set()
    for folder in folders:
        marked = [path.parent for path in folder.rglob("status.json")]
        runs = [run for run in marked if (run / RUN).exists() or (run / RECEIPT).exists()]
        if not runs:
            problem = "holds no run" if folder.exists() else "nothing is there"
            raise InputError(f"{folder}: {problem}; name a run's folder, or one above several")
        found |= set(runs)
    return sorted(found, key=lambda run: ((run / "multirun.yaml").exists(), run))


def deliver(folder: Path) -> int:
    """Send what is left of one run, and say so; the exit code."""
    where = typed(folder)
    if is_running(folder):
        print(f"{where}: is running, and sends by itself")
        return 0
    from wmtp.deliveries import GoneOnElsewhere, deliver_rest  # imports torch

    was = read_status(folder)["state"]
    state = close_dead(folder)
    if state != was:
        print(f"{where}: was {was}, but nothing runs there; recorded as {state}")
    try:
        reports = deliver_rest(folder, state)
    except GoneOnElsewhere as error:
        print(f"{where}: nothing to send: {error}")
        return 0
    except (InputError, PendingError) as error:
        print(f"{where}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{where}: {'; '.join(reports) if reports else 'nothing to send'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
