"""Compare groups of runs with a baseline: `python -m wmtp.compare DIR… metric=val/loss`; `--help` lists the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wmtp.cli.command import Command, run_command
from wmtp.runtime.run_dir import OUTPUTS, create_run_folder, typed

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import Task
    from wmtp.config.schema import Fault


def compare(task: Task) -> None:
    """Print what the runs show, and write it down."""
    from rich.console import Console

    from wmtp.report.compare import compare as compared
    from wmtp.report.comparison_report import write_comparison_page
    from wmtp.report.results import as_plain
    from wmtp.report.run_record import find_runs
    from wmtp.report.run_report import draw, without_page
    from wmtp.report.tables import print_comparison
    from wmtp.runtime.atomic_files import encode_json, replace_atomically

    config = task.config
    runs = find_runs(Path(folder) for folder in config.runs)
    comparison = compared(runs, baseline=config.baseline, metric=config.metric, at=config.at)
    console = Console(markup=False)
    print_comparison(console, comparison)
    folder = create_run_folder(OUTPUTS / "comparisons") if config.folder is None else Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    replace_atomically(folder / "compare.json", encode_json(as_plain(comparison)))
    bare = without_page([run for group in comparison.groups.values() for run in group])
    if config.reports and bare:
        what = f"report.html of {len(bare)} run{'s' if len(bare) > 1 else ''} without one"
        console.print(f"Drawing {what}; reports=false leaves that out", soft_wrap=True, highlight=False)
        for run in bare:
            draw(run)
    write_comparison_page(folder / "compare.html", comparison)
    console.print(f"The comparison lies in {typed(folder)}", soft_wrap=True, highlight=False)


def faults(config: DictConfig) -> list[Fault]:
    """All faults of a config."""
    from omegaconf import OmegaConf

    from wmtp.config.schema import Fault, node_faults

    found = list(node_faults(config, ""))
    if OmegaConf.is_missing(config, "runs"):
        found = [fault for fault in found if fault.key != "runs"]
        found.append(Fault("runs", "", "missing; name folders of runs: python -m wmtp.compare DIR…"))
    elif OmegaConf.is_list(config.runs):
        problem = "only runs on this machine are compared; copy it here, and name its folder"
        found += [Fault("runs", str(run), problem) for run in config.runs if str(run).startswith("s3:")]
    if config.get("folder") is not None:
        folder = Path(config.folder)
        if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
            found.append(Fault("folder", str(folder), "is there, and not empty; name a new folder"))
    return found


def in_full(arguments: list[str]) -> list[str]:
    """The arguments with keys: those that are no overrides and no options are the folders of the runs."""
    from wmtp.config.overrides import quoted

    runs, result = list[str](), list[str]()
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_override = "=" in argument and not Path(argument).exists()
        is_run = not (is_override or argument.startswith("-") or before.startswith("-"))
        (runs if is_run else result).append(argument)
    return [*result, f"runs=[{','.join(quoted(run) for run in runs)}]"] if runs else result


COMMAND = Command(
    "compare", compare, faults, lambda config, overrides: None, in_full=in_full,
    texts=frozenset({"baseline", "metric", "folder"}),
)  # fmt: skip


def main() -> NoReturn:
    """Run the command with the arguments of this process."""
    run_command(COMMAND)


if __name__ == "__main__":
    main()
