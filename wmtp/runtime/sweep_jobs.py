"""The jobs of a sweep as its sweep.json lists them, and their labels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmtp.errors import InputError
from wmtp.runtime.run_dir import SWEEP


def read_jobs(sweep: Path) -> list[dict[str, Any]]:
    """Return the jobs in the sweep.json of a sweep's folder. They have the fields of `wmtp.sweep.state.Job`.

    Raises:
        InputError: sweep.json is damaged.
    """
    path = sweep / SWEEP
    try:
        jobs: list[dict[str, Any]] = json.loads(path.read_text())["jobs"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error!r}") from error
    return jobs


def job_labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Return a label for each job. The label lists the overrides of the job that are not the same in all jobs."""
    common = set.intersection(*(set(job) for job in jobs)) if len(jobs) > 1 else set()
    return [" ".join(each.lstrip("+") for each in job if each not in common) for job in jobs]


def sweep_label(folder: Path) -> str | None:
    """Return the label of the job whose folder is given, or None if the folder does not belong to a job of a sweep."""
    if not (folder.parent / SWEEP).exists():
        return None
    jobs = read_jobs(folder.parent)
    labels = {
        str(job["number"]): text for job, text in zip(jobs, job_labels([j["overrides"] for j in jobs]), strict=True)
    }
    return labels.get(folder.name) or None
