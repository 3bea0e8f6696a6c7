"""Compare groups of runs with a baseline: `python -m wmtp.compare DIR… metric=val/loss`; `--help` lists the rest."""

from pathlib import Path

if __name__ == "__main__":
    from wmtp import doors

    doors.compare()

from omegaconf import DictConfig, OmegaConf

from wmtp.command import Command
from wmtp.config import Fault
from wmtp.overrides import quoted
from wmtp.runtime.files import encode_json, replace_atomically
from wmtp.runtime.folder import OUTPUTS, create_run_folder, typed
from wmtp.task import Task


def compare(task: Task) -> None:
    """Print what the runs show, and write it down."""
    from rich.console import Console

    from wmtp.report.comparing import compare as compared
    from wmtp.report.comparison import as_plain
    from wmtp.report.comparison_page import write_comparison_page
    from wmtp.report.redrawing import draw, without_page
    from wmtp.report.runs import find_runs
    from wmtp.report.tables import print_comparison

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
    from wmtp.config import node_faults

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
