"""Pages of runs that ended before there was all to draw; no command fails because of a page."""

import logging
from collections.abc import Sequence
from pathlib import Path

from wmtp.report.runs import RunRecord

log = logging.getLogger(__name__)
FILE_NAME = "report.html"


def redraw(folder: Path) -> None:
    """Draw a run's page again, if it has one."""
    if (folder / FILE_NAME).exists():
        draw(folder)


def without_page(runs: Sequence[RunRecord]) -> list[Path]:
    """The folders of runs that have no page."""
    return [run.folder for run in runs if not (run.folder / FILE_NAME).exists()]


def draw(folder: Path) -> None:
    """Draw a run's page; a warning where that fails."""
    from wmtp.report.run_page import write_run_page  # imports matplotlib, which takes a second

    try:
        write_run_page(folder)
    except OSError as error:
        log.warning("%s could not be written: %s", folder / FILE_NAME, error)
    except Exception as error:
        log.warning("%s could not be drawn: %s: %s", folder / FILE_NAME, type(error).__name__, error, exc_info=True)
