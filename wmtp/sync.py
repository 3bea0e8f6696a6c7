"""Upload the pending metrics, statuses and checkpoints of runs: `python -m wmtp.sync RUN|outputs …`.

It is safe to repeat this command, and to run it during a training. A running training uploads its own data.
"""

import argparse
import logging
import sys
from pathlib import Path

from wmtp.errors import InputError, InterruptedRun, PendingError
from wmtp.runtime.run_dir import RUN, SWEEP, SYNC_STATE, display_path, is_running, mark_dead_run, read_status
from wmtp.runtime.signals import raise_on_signals
from wmtp.runtime.standard_streams import lasting_streams
from wmtp.runtime.untrusted_files import require_inside
from wmtp.runtime.versions import version_text

DESCRIPTION = """\
Upload the pending metrics, statuses and checkpoints of runs to the servers in
their configs. It is safe to repeat this command, and to run it during a
training. A running training uploads its own data.
"""
EXAMPLES = """\
examples:
  python -m wmtp.sync outputs                                all runs
  python -m wmtp.sync outputs/2026-11-21                     all runs of a day
  python -m wmtp.sync outputs/2026-11-21/09-30-00-abcd       one run

Addresses, users and keys are read from the environment or .env. The exit code
is 3 while data are pending, and 2 if a server refuses access. The script
wmtp-sync is the same command.
"""


def main(arguments: list[str] | None = None) -> int:
    """Upload the pending data of all runs in the folders named in `arguments`, and return the exit code."""
    with lasting_streams():
        return upload(arguments)


def upload(arguments: list[str] | None) -> int:
    """Parse the arguments, upload the pending data of all runs in their folders, and return the exit code."""
    formatted = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m wmtp.sync", None, DESCRIPTION, EXAMPLES, formatter_class=formatted)
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN|outputs", help="folder of a run, or a folder that contains runs"
    )
    parser.add_argument("--version", action="store_true", help="print the versions of wmtp and its packages, and exit")
    if "--version" in (sys.argv[1:] if arguments is None else arguments):
        print(version_text())
        return 0
    folders: list[Path] = parser.parse_args(arguments).folders
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    code = 0
    try:
        with raise_on_signals():
            from wmtp.cli.env import load_environment  # imports Hydra, which takes a second

            load_environment()
            for folder in find_run_folders(folders):
                code = max(code, sync_run(folder))
    except InputError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except InterruptedRun as error:
        print(f"{error}; the unsent data are still on disk", file=sys.stderr)
        return error.exit_code
    return code


def find_run_folders(folders: list[Path]) -> list[Path]:
    """Return the folders of all runs and sweeps that are in the given folders and may have pending data.

    A folder may have pending data if `has_remote` or `has_running_status` is true for it. The folders are sorted by
    path, and the folders of sweeps come last.

    Raises:
        InputError: one of the given folders contains no such run.
    """
    found: set[Path] = set()
    for folder in folders:
        candidates = [path.parent for path in folder.rglob("status.json")]
        runs = [each for each in candidates if has_remote(each) or has_running_status(each)]
        if not runs:
            problem = "contains no run" if folder.exists() else "does not exist"
            raise InputError(f"{folder}: {problem}; give the folder of a run, or a folder that contains runs")
        found |= set(runs)
    return sorted(found, key=lambda run: ((run / SWEEP).exists(), run))


def has_remote(folder: Path) -> bool:
    """Return whether a folder contains run.json or mlflow.json. Only data from such folders is uploaded."""
    return (folder / RUN).exists() or (folder / SYNC_STATE).exists()


def has_running_status(folder: Path) -> bool:
    """Return whether the state in status.json is RUNNING, or the file is damaged. Damage is reported later."""
    try:
        return bool(read_status(folder)["state"] == "RUNNING")
    except (ValueError, KeyError):
        return True


def sync_run(folder: Path) -> int:
    """Upload the pending data of one run, print the result, and return the exit code."""
    from wmtp.training.uploads import RemoteIsAhead  # imports torch

    where = display_path(folder)
    try:
        result = upload_pending(folder)
    except RemoteIsAhead as error:
        result = f"nothing to send: {error}"
    except (InputError, PendingError) as error:
        print(f"{where}: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - one damaged folder must not stop the upload of the others
        print(f"{where}: cannot be read: {type(error).__name__}: {error}", file=sys.stderr)
        return InputError.exit_code
    print(f"{where}: {result}")
    return 0


def upload_pending(folder: Path) -> str:
    """Upload the pending data of one run, and return a description of the result.

    If the run is still running, nothing is uploaded. If it was killed, its state is first recorded as KILLED.
    """
    require_inside(folder)  # before anything in it is locked or written
    if is_running(folder):
        return "is running, and uploads its own data"
    from wmtp.training.uploads import send_pending

    before = read_status(folder)["state"]
    state = mark_dead_run(folder)
    changes = [f"was {before}, but no process is running: recorded as {state}"] if state != before else []
    reports = send_pending(folder, state) if has_remote(folder) else []
    return "; ".join(changes + reports) or "nothing to send"


if __name__ == "__main__":
    sys.exit(main())
