"""Search for everything in which the runs of a study differ from its lock."""

from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from wmtp.config.flatten import flatten
from wmtp.report.grouping import format_value
from wmtp.report.run_record import RunRecord
from wmtp.report.tables import format_count
from wmtp.studies.lock import StudyLock, model_hashes
from wmtp.studies.plan import JUDGING, TUNING, Plan
from wmtp.studies.results import ArmSearch
from wmtp.studies.space import is_in_range

VARYING_KEYS = (
    "seed", "order_seed", "algo.seed", "data.seed", "max_steps", "num_epochs", "pretrain.max_steps",
    "pretrain.num_epochs", "run_name", "tags", "resume", "resume_override", "dry_run", "cache_dir", "sweep", "report",
    "tracking", "checkpoint",
)  # fmt: skip
"""Config keys that differ between the runs of an arm, or that have no effect on what is compared."""
FINGERPRINTS = ("train_fingerprint", "validation_fingerprint", "test_fingerprint", "tokenizer")
"""Fields of the data in provenance.json that identify the data of a run."""


def fixed_values(config: Mapping[str, Any], searched: Iterable[str]) -> dict[str, Any]:
    """Return the values of a config that are the same in all runs of an arm, by dotted key."""
    varying = (*VARYING_KEYS, *searched)
    values = flatten(dict(config)).items()
    return {
        key: value for key, value in values if not any(key == name or key.startswith(f"{name}.") for name in varying)
    }


def find_departures(lock: StudyLock, folder: Path, runs: Iterable[RunRecord], searches: list[ArmSearch]) -> list[str]:
    """Return a sentence for each thing that departs from the lock.

    Args:
        lock: the lock of the study.
        folder: the folder of the study.
        runs: all runs of arms in this folder, of the search and judged ones.
        searches: the trials that were found for each arm.
    """
    by_arm: dict[tuple[str, str], list[RunRecord]] = {}
    for run in runs:
        phase, label, *_ = run.folder.relative_to(folder).parts
        by_arm.setdefault((phase, label), []).append(run)
    found = [] if lock.is_intact else ["the lock was edited after it was written: its hash does not fit its content"]
    found += _unequal_trials(lock, searches, {label for phase, label in by_arm if phase == JUDGING})
    found += _other_models(lock, folder)
    for (phase, label), members in by_arm.items():
        if label not in lock.options.arms:
            found.append(f"{label} is not an arm of the lock, but has {len(members)} runs in {phase}")
            continue
        found += _other_seeds(lock, phase, label, members)
        found += _other_limits(Plan(lock.options, folder), phase, label, members)
        found += _other_contents(lock, label, members)
    every = [run for members in by_arm.values() for run in members]
    found += _other_code(lock, every)
    if early := [run for run in every if _is_earlier(run, lock)]:
        found.append(f"{_count(early)} started before the lock was written, for example {_name(early[0], folder)}")
    found += _other_settings(folder, by_arm, searches)
    return found


def _unequal_trials(lock: StudyLock, searches: list[ArmSearch], judged: set[str]) -> Iterator[str]:
    """Yield a sentence for each arm that has more trials than the lock says, or fewer although it was judged.

    Trials with settings outside of the search space are listed, too.
    """
    for search in searches:
        num, planned = len(search.trials), lock.options.trials
        if num > planned or (num < planned and search.label in judged):
            text = f"{search.label} has {format_count(num, 'trial')}, and the lock says {planned} for every arm"
            yield f"unequal search: {text}"
        space = lock.options.space_of(search.label)
        for trial in search.trials:
            if others := [key for key, value in trial.settings.items() if not is_in_range(key, space[key], value)]:
                text = ", ".join(f"{key}={trial.settings[key]}" for key in others)
                yield f"{search.label}: trial {trial.number} is not in the search space of the lock: {text}"


def _other_models(lock: StudyLock, folder: Path) -> Iterator[str]:
    """Yield a sentence for each preparation whose model is not the one of the lock."""
    current = model_hashes(Plan(lock.options, folder)) if lock.models else {}
    for name, sha256 in lock.models.items():
        if current.get(name) != sha256:
            problem = "differs from the lock" if current.get(name) else "is missing"
            yield f"the model of the preparation {name} {problem}"


def _other_seeds(lock: StudyLock, phase: str, label: str, runs: list[RunRecord]) -> Iterator[str]:
    """Yield sentences about runs with seeds or horizons that the lock does not contain, and about missing seeds."""
    options = lock.options
    allowed = options.tuning_seeds if phase == TUNING else options.judging_seeds
    if others := sorted({run.seed for run in runs} - set(allowed)):
        yield f"{label} has {phase} runs with the seeds {', '.join(map(str, others))}, which the lock does not contain"
    if phase == JUDGING:
        planned = {f"updates-{updates}" for updates in options.horizons}
        if horizons := sorted({run.folder.parent.name for run in runs} - planned):
            yield f"{label} has judged runs with other horizons: {', '.join(horizons)}"
        used = [number for number, seed in enumerate(allowed) if seed in {run.seed for run in runs}]
        if missing := [str(allowed[number]) for number in range(max(used, default=-1)) if number not in used]:
            yield f"{label} has no judged run with the seeds {', '.join(missing)}, but with later ones"


def _other_limits(plan: Plan, phase: str, label: str, runs: list[RunRecord]) -> Iterator[str]:
    """Yield a sentence about runs with another number of updates than the plan gives them."""
    others = []
    for run in runs:
        horizon = run.folder.parent.name.removeprefix("updates-")
        if phase == JUDGING and not horizon.isdigit():
            continue
        values = flatten(run.config)
        expected = plan.limits(label, int(horizon) if phase == JUDGING else plan.options.tuning_horizon)
        if {key: values.get(key) for key in expected} != expected:
            others.append(run)
    if others:
        yield f"{label}: {_count(others)} with another limit of updates, for example {_name(others[0], plan.folder)}"


def _other_contents(lock: StudyLock, label: str, runs: list[RunRecord]) -> Iterator[str]:
    """Yield sentences about runs of an arm whose data or config differ from the lock."""
    for field in FINGERPRINTS:
        locked = lock.data.get(label, {}).get(field)
        others = [run for run in runs if run.provenance.get("data", {}).get(field) not in (None, locked)]
        if others:
            yield f"{label}: {field.replace('_', ' ')} differs from the lock in {_count(others)}"
    expected = lock.configs.get(label, {})
    searched = lock.options.space_of(label)
    changed: dict[str, int] = {}
    for run in runs:
        values = fixed_values(run.config, searched)
        for key in values.keys() | expected.keys():
            if values.get(key) != expected.get(key):
                changed[key] = changed.get(key, 0) + 1
    for key, count in sorted(changed.items()):
        yield f"{label}: {key} differs from the lock in {count} of {len(runs)} runs"


def _other_code(lock: StudyLock, runs: list[RunRecord]) -> Iterator[str]:
    """Yield sentences about runs that used another revision of the code or other versions of packages."""
    for name in ("git_revision", "untracked"):
        others = [
            run for run in runs if "git_revision" in run.provenance and run.provenance.get(name) != lock.code.get(name)
        ]
        if others:
            shown = others[0].provenance.get(name) if name == "git_revision" else "other untracked files"
            yield f"{_count(others)} used other code than the lock: {name.replace('_', ' ')} {shown}"
    locked = lock.code.get("versions", {})
    packages = {
        f"{package} {version}"
        for run in runs
        for package, version in run.provenance.get("versions", {}).items()
        if version != locked.get(package)
    }
    if packages:
        yield f"runs used other versions of packages than the lock: {', '.join(sorted(packages))}"


def _other_settings(
    folder: Path, by_arm: Mapping[tuple[str, str], list[RunRecord]], searches: list[ArmSearch]
) -> Iterator[str]:
    """Yield a sentence for each arm whose judged runs do not have the settings of its best trial."""
    for search in searches:
        if search.chosen is None:
            continue
        judged = by_arm.get((JUDGING, search.label), [])
        chosen = search.chosen.settings
        others = [run for run in judged if read_settings(run, chosen) != chosen]
        if others:
            name = _name(others[0], folder)
            yield f"{search.label}: {_count(others)} with other settings than its best trial, for example {name}"


def read_settings(run: RunRecord, keys: Iterable[str]) -> dict[str, str]:
    """Return the values of config keys of a run as text."""
    values = flatten(run.config)
    return {key: format_value(values.get(key)) for key in keys}


def _is_earlier(run: RunRecord, lock: StudyLock) -> bool:
    started = run.status.get("started")
    return started is not None and datetime.fromisoformat(started) < datetime.fromisoformat(lock.written)


def _name(run: RunRecord, folder: Path) -> str:
    return str(run.folder.relative_to(folder))


def _count(runs: list[RunRecord]) -> str:
    return f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
