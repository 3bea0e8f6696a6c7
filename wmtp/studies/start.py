"""The start of a study: the check of its arms, and its lock."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from wmtp.config.moved_targets import update_config
from wmtp.config.schema import CheckedConfig, ConfigIssue
from wmtp.errors import InputError
from wmtp.runtime.console import Console
from wmtp.runtime.versions import git_revision
from wmtp.studies.departures import fixed_values
from wmtp.studies.lock import (
    FILE_NAME,
    StudyLock,
    changed_options,
    complete_lock,
    model_hashes,
    new_lock,
    read_lock,
    write_lock,
)
from wmtp.studies.options import StudyOptions
from wmtp.studies.plan import PREPARATIONS, Plan
from wmtp.studies.space import first_value, last_value

Compose = Callable[[list[str]], CheckedConfig]
"""Callback that composes and checks the config of a run from its overrides."""


def arm_issues(plan: Plan, compose: Compose) -> Iterator[ConfigIssue]:
    """Yield the issues of the configs of all arms and preparations.

    Files of preparations that do not exist yet are no issue.
    """
    runs = [(f"preparations.{job.folder.name}", job.overrides) for job in plan.preparations() if job.command == "train"]
    runs += [
        (f"arms.{label}", example_overrides(plan, label, choose))
        for label in plan.options.arms
        for choose in (first_value, last_value)
    ]
    found: dict[tuple[str, str, str], list[str]] = {}
    for name, overrides in runs:
        for issue in compose(overrides).issues:
            if not is_about_preparation(issue, plan):
                names = found.setdefault((issue.key, issue.value, issue.problem), [])
                names += [name] if name not in names else []
    for (key, value, problem), names in found.items():
        where = f" (study.{names[0]}{f' and {len(names) - 1} others' if len(names) > 1 else ''})"
        yield ConfigIssue(key, value, problem + where)


def is_about_preparation(issue: ConfigIssue, plan: Plan) -> bool:
    """Return whether an issue is about the files of a preparation, which may not have run yet."""
    made = str((plan.folder / PREPARATIONS).absolute())
    return made in issue.value or made in issue.problem


def example_overrides(plan: Plan, label: str, choose: Callable[[str, str], object] = first_value) -> list[str]:
    """Return the overrides of a run of an arm. `choose` returns a value from the range of each searched setting."""
    settings = {key: choose(key, text) for key, text in plan.options.space_of(label).items()}
    return plan.judged(label, settings, plan.options.judging_seeds[0])[0].overrides


def open_lock(folder: Path, name: str, options: StudyOptions, console: Console) -> StudyLock:
    """Return the lock of the study in a folder. If there is none, write it.

    Raises:
        InputError: the folder contains a study with other options, or its lock was edited.
    """
    lock = read_lock(folder)
    if lock is None:
        folder.mkdir(parents=True, exist_ok=True)
        lock = new_lock(name, options)
        write_lock(folder, lock)
        return lock
    if not lock.is_intact:
        raise InputError(
            f"{folder / FILE_NAME}: was edited after it was written; restore it, or start a new study with folder=DIR"
        )
    if changed := changed_options(lock.options, options):
        raise InputError(
            f"{folder}: the study was locked with other options ({', '.join(changed)}); restore them, or start a new "
            "study with folder=DIR"
        )
    if (revision := git_revision()) != lock.revision:
        console.print(
            f"The code is {revision}, and the study was locked with {lock.revision}. Runs from now on are listed as a "
            "departure from the lock.", highlight=False, soft_wrap=True,
        )  # fmt: skip
    return lock


def finish_lock(folder: Path, lock: StudyLock, plan: Plan, compose: Compose) -> StudyLock:
    """Add the data and the config of all arms and the models of the preparations to a lock. Write it, and return it.

    Raises:
        InputError: the data of an arm cannot be read.
    """
    if lock.is_complete:
        return lock
    configs = {label: compose(example_overrides(plan, label)) for label in plan.options.arms}
    data, known = dict[str, dict[str, str]](), dict[str, dict[str, str]]()
    for label, checked in configs.items():
        key = json.dumps([to_plain(checked.config.data), to_plain(checked.config.model)], sort_keys=True)
        if key not in known:
            known[key] = read_fingerprints(checked)
        data[label] = known[key]
    values = {
        label: fixed_values(to_plain(checked.config), plan.options.space_of(label))
        for label, checked in configs.items()
    }
    lock = complete_lock(lock, data, values, model_hashes(plan))
    write_lock(folder, lock)
    return lock


def to_plain(config: DictConfig) -> dict[str, Any]:
    """Return a config in the form in which it is read from the folder of a run."""
    content: dict[str, Any] = update_config(yaml.safe_load(OmegaConf.to_yaml(config, resolve=True)))
    return content


def read_fingerprints(checked: CheckedConfig) -> dict[str, str]:
    """Read the data of a config, and return the hashes of its splits and of the tokenizer."""
    from wmtp.training.builders import build_components  # these import torch
    from wmtp.training.provenance import split_fingerprints

    if checked.issues:
        raise InputError("\n".join(map(str, checked.issues)))
    return split_fingerprints(build_components(checked.config, checked.inputs).data)
