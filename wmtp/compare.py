"""Compare groups of runs with a baseline: `python -m wmtp.compare DIR… metric=val/loss`; `--help` lists all keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wmtp.cli.command import Command, run_command
from wmtp.runtime.run_dir import OUTPUTS, create_run_folder, display_path
from wmtp.runtime.writable import require_writable

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import JobContext
    from wmtp.config.schema import CheckedConfig
    from wmtp.runtime.console import Console

LOCKED_KEYS = {"baseline", "metric", "at", "delta"}
"""Config keys that the lock of a study fixes."""


def compare(context: JobContext) -> None:
    """Compare groups of runs, print the result, and write compare.json and compare.html."""
    from wmtp.errors import refuse_odd_content
    from wmtp.report.compare import compare_runs
    from wmtp.report.comparison_report import write_comparison_report
    from wmtp.report.results import comparison_to_dict
    from wmtp.report.run_record import find_runs
    from wmtp.report.run_report import folders_without_report, write_report_or_warn
    from wmtp.report.tables import print_comparison
    from wmtp.runtime.atomic_files import encode_json, replace_atomically
    from wmtp.runtime.console import Console
    from wmtp.studies.collect import is_study

    config, console = context.config, Console()
    if [is_study(Path(folder)) for folder in config.runs] == [True]:
        compare_arms_of_study(context, console)
        return
    runs = find_runs(Path(folder) for folder in config.runs)
    with refuse_odd_content(", ".join(config.runs)):
        comparison = compare_runs(
            runs, baseline=config.baseline, metric=config.metric, at=config.at, delta=config.delta
        )
        print_comparison(console, comparison)
    folder = _output_folder(config)
    replace_atomically(folder / "compare.json", encode_json(comparison_to_dict(comparison)))
    folders = folders_without_report([run for group in comparison.groups.values() for run in group])
    if config.reports and folders:
        count = f"{len(folders)} run{'s' if len(folders) > 1 else ''}"
        message = f"Writing the missing report.html of {count}; skip this with reports=false"
        console.print(message, soft_wrap=True, highlight=False)
        for run_folder in folders:
            write_report_or_warn(run_folder)
    with refuse_odd_content(", ".join(config.runs)):
        write_comparison_report(folder / "compare.html", comparison)
    console.print(f"The comparison is in {display_path(folder)}", soft_wrap=True, highlight=False)


def compare_arms_of_study(context: JobContext, console: Console) -> None:
    """Print the results of a study so far, and write compare.json and compare.html.

    Raises:
        InputError: an argument sets what the lock of the study fixes.
    """
    from wmtp.config.overrides import override_key
    from wmtp.errors import InputError, refuse_odd_content
    from wmtp.studies.collect import collect_study
    from wmtp.studies.output import write_result

    study = Path(context.config.runs[0])
    if fixed := sorted({override_key(each) for each in context.overrides} & LOCKED_KEYS):
        remedy = f"leave it out; to compare with other options, give {study / 'judging'}"
        raise InputError(f"{', '.join(fixed)}: is fixed by the lock of the study in {study}; {remedy}")
    with refuse_odd_content(study):
        result = collect_study(study)
    write_result(_output_folder(context.config), result, console, "compare")


def _output_folder(config: DictConfig) -> Path:
    """Return the folder of the results, which is created if it does not exist."""
    folder = create_run_folder(OUTPUTS / "comparisons") if config.folder is None else Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check(config: DictConfig, overrides: list[str]) -> CheckedConfig:
    """Check a config."""
    from omegaconf import OmegaConf

    from wmtp.config.overrides import typed_values
    from wmtp.config.schema import CheckedConfig, ConfigIssue, node_issues

    issues = list(node_issues(config, "", typed=typed_values(overrides)))
    if OmegaConf.is_missing(config, "runs"):
        issues = [issue for issue in issues if issue.key != "runs"]
        issues.append(ConfigIssue("runs", "", "missing; give folders of runs: python -m wmtp.compare DIR…"))
    elif OmegaConf.is_list(config.runs):
        problem = "only local runs can be compared; copy the run to this machine and give its folder"
        issues += [ConfigIssue("runs", str(run), problem) for run in config.runs if str(run).startswith("s3:")]
    if config.get("folder") is not None:
        folder = Path(config.folder)
        if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
            issues.append(ConfigIssue("folder", str(folder), "exists and is not empty; choose a new folder"))
    if not issues:
        require_writable(Path(config.folder or OUTPUTS), "folder")
    return CheckedConfig(config, issues)


def positional_args(arguments: list[str]) -> list[str]:
    """Return the arguments, in which one argument `runs=[…]` with a list replaces all positional arguments."""
    from wmtp.config.overrides import is_override, quote

    runs, result = list[str](), list[str]()
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_run = not (is_override(argument) or argument.startswith("-") or before.startswith("-"))
        (runs if is_run else result).append(argument)
    return [*result, f"runs=[{','.join(quote(run) for run in runs)}]"] if runs else result


COMMAND = Command(
    "compare", compare, check, positional_args=positional_args,
    raw_keys=frozenset({"baseline", "metric", "folder"}),
)  # fmt: skip


def main() -> NoReturn:
    """Run `python -m wmtp.compare` with the command-line arguments of this process."""
    run_command(COMMAND)


if __name__ == "__main__":
    main()
