"""Send what runs left behind: `python -m wmtp.sync RUN|outputs …`: metrics, statuses and checkpoints.

Safe to run twice, and beside a running training, which sends by itself.
"""

import argparse
import logging
import sys
from pathlib import Path

from wmtp.errors import InputError, InterruptedRun, PendingError
from wmtp.runtime.run_dir import RECEIPT, RUN, SWEEP, close_dead, is_running, read_status, typed
from wmtp.runtime.signals import raised_signals

DESCRIPTION = """\
Send what runs left behind to the servers that their configs name: metrics,
statuses and checkpoints. Safe to run twice, and beside a running training,
which sends by itself.
"""
EXAMPLES = """\
examples:
  python -m wmtp.sync outputs                                all runs
  python -m wmtp.sync outputs/2026-11-21                     those of a day
  python -m wmtp.sync outputs/2026-11-21/09-30-00-abcd       one

Addresses, users and keys come from the environment or .env. The exit code is 3
as long as something is left, and 2 if a server refuses. The script wmtp-sync is
the same command.
"""


def main(arguments: list[str] | None = None) -> int:
    """Deliver every run below the named folders; the exit code."""
    formatted = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m wmtp.sync", None, DESCRIPTION, EXAMPLES, formatter_class=formatted)
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN|outputs", help="a run's folder, or one above it")
    folders: list[Path] = parser.parse_args(arguments).folders
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    code = 0
    try:
        with raised_signals():
            from wmtp.cli.env import load_environment  # imports Hydra, which takes a second

            load_environment()
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
        runs = [each for each in marked if is_delivered(each) or says_running(each)]
        if not runs:
            problem = "holds no run" if folder.exists() else "nothing is there"
            raise InputError(f"{folder}: {problem}; name a run's folder, or one above several")
        found |= set(runs)
    return sorted(found, key=lambda run: ((run / SWEEP).exists(), run))


def is_delivered(folder: Path) -> bool:
    """Whether what a folder holds goes to servers."""
    return (folder / RUN).exists() or (folder / RECEIPT).exists()


def says_running(folder: Path) -> bool:
    """Whether a folder's status.json says so; of a damaged one, that is seen later."""
    try:
        return bool(read_status(folder)["state"] == "RUNNING")
    except (ValueError, KeyError):
        return True


def deliver(folder: Path) -> int:
    """Send what is left of one run, and say so; the exit code."""
    from wmtp.training.uploads import GoneOnElsewhere  # imports torch

    where = typed(folder)
    try:
        said = delivered(folder)
    except GoneOnElsewhere as error:
        said = f"nothing to send: {error}"
    except (InputError, PendingError) as error:
        print(f"{where}: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - one damaged folder must not keep the others from being sent
        print(f"{where}: cannot be read: {type(error).__name__}: {error}", file=sys.stderr)
        return InputError.exit_code
    print(f"{where}: {said}")
    return 0


def delivered(folder: Path) -> str:
    """Send what is left of one run; what that was, in words."""
    if is_running(folder):
        return "is running, and sends by itself"
    from wmtp.training.uploads import deliver_rest

    was = read_status(folder)["state"]
    state = close_dead(folder)
    closed = [f"was {was}, but nothing runs there: recorded as {state}"] if state != was else []
    reports = deliver_rest(folder, state) if is_delivered(folder) else []
    return "; ".join(closed + reports) or "nothing to send"


if __name__ == "__main__":
    sys.exit(main())
