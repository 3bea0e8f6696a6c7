"""Run a study to its verdict: `python -m wmtp.study study=NAME`; `--help` lists all keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wmtp.cli.command import START_AGAIN, Command, run_command
from wmtp.runtime.run_dir import OUTPUTS, display_path, module_command
from wmtp.runtime.writable import require_writable

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import JobContext
    from wmtp.config.schema import CheckedConfig

STUDIES = OUTPUTS / "studies"
"""Folder of the studies for which the user names no folder."""


def study(context: JobContext) -> None:
    """Run a study, print its result, and write study.json and study.html. In a dry run, print only what it takes."""
    from wmtp.config.schema import build
    from wmtp.runtime.console import Console
    from wmtp.studies.cost import print_cost
    from wmtp.studies.output import write_result
    from wmtp.studies.run import StudyRun
    from wmtp.studies.start import open_lock

    config, console = context.config, Console()
    options = build(config.study)
    if config.dry_run:
        print_cost(options, context.folder, config.jobs, _compose, console)
        return
    lock = open_lock(context.folder, study_name(context.overrides), options, console)
    result = StudyRun(context.folder, lock, config.jobs, console).run(_compose)
    write_result(context.folder, result, console)


def check(config: DictConfig, overrides: list[str]) -> CheckedConfig:
    """Check a config, and the configs of all arms of the study."""
    from wmtp.config.groups import group_options
    from wmtp.config.overrides import typed_values
    from wmtp.config.schema import CheckedConfig, ConfigIssue, build, node_issues
    from wmtp.runtime.standard_streams import announce
    from wmtp.studies.lock import read_lock
    from wmtp.studies.options import option_issues
    from wmtp.studies.plan import Plan
    from wmtp.studies.start import arm_issues

    typed = typed_values(overrides)
    issues = list(node_issues(config, "", typed=typed))
    if config.study is None:
        names = ", ".join(f"study={name}" for name in group_options("study"))
        issues.append(ConfigIssue("study", "", f"missing; choose a study: {names}"))
    else:
        issues += node_issues(config.study, "study", typed=typed)
    if not issues:
        options = build(config.study)
        issues = list(option_issues(options))
    if not issues:
        folder = _folder(config, overrides)
        require_writable(folder, "folder")
        lock = read_lock(folder)
        if lock is None or lock.options != options:  # otherwise they were checked before the lock was written
            announce("checking the config of every arm …")
            issues = list(arm_issues(Plan(options, folder), _compose))
    return CheckedConfig(config, issues)


def study_name(overrides: list[str]) -> str:
    """Return the name of the study that the overrides choose."""
    from wmtp.config.overrides import last_value

    return last_value(overrides, "study") or "study"


def _folder(config: DictConfig, overrides: list[str]) -> Path:
    return (STUDIES / study_name(overrides) if config.folder is None else Path(config.folder)).absolute()


def _compose(overrides: list[str]) -> CheckedConfig:
    """Compose and check the config of a run of training."""
    from wmtp.cli.resolve import compose
    from wmtp.config.overrides import expand_argument
    from wmtp.train import COMMAND as TRAIN

    arguments = [expand_argument(override, TRAIN.raw_keys, TRAIN.aliases) for override in overrides]
    return compose(TRAIN, arguments).checked


def _run_folder(checked: CheckedConfig, overrides: list[str]) -> Path | None:
    return None if checked.config.dry_run else _folder(checked.config, overrides)


def _resume_hint(folder: Path) -> str:
    import yaml

    from wmtp.config.overrides import shell_argument
    from wmtp.studies.lock import read_lock

    lock = read_lock(folder)
    if lock is None:
        return START_AGAIN
    named = [] if folder == (STUDIES / lock.name).absolute() else [shell_argument("folder", display_path(folder))]
    jobs = yaml.safe_load((folder / ".hydra" / "config.yaml").read_text())["jobs"]
    named += [] if jobs == 1 else [f"jobs={jobs}"]
    return f"Continue with: {' '.join([module_command('wmtp.study'), f'study={lock.name}', *named])}"


COMMAND = Command("study", study, check, _run_folder, resume_hint=_resume_hint, raw_keys=frozenset({"folder"}))


def main() -> NoReturn:
    """Run `python -m wmtp.study` with the command-line arguments of this process."""
    run_command(COMMAND)


if __name__ == "__main__":
    main()
