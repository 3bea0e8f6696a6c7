"""What a sweep gave: its groups of seeds, the best one first, and the jobs that did not finish."""

from pathlib import Path
from statistics import mean, stdev

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from wmtp.report.groups import grouped
from wmtp.report.measures import is_lower_better
from wmtp.report.runs import RunRecord
from wmtp.sweep.grid import swept
from wmtp.sweep.manifest import Manifest


def print_results(console: Console, manifest: Manifest, metric: str) -> None:
    """The table at the end of a sweep, and what is wrong with the jobs that are not in it."""
    runs = [RunRecord(manifest.folder_of(job)) for job in manifest.jobs if job.state == "FINISHED"]
    console.print(f"\n{len(runs)} of {len(manifest.jobs)} jobs finished", highlight=False)
    if runs:
        console.print(results_table(runs, metric))
    names = swept([job.overrides for job in manifest.jobs])
    for job, name in zip(manifest.jobs, names, strict=True):
        if job.state != "FINISHED":
            problem = (job.error or "was not started").splitlines()[0]
            line = f"job {job.number} ({name}) {job.state}: {problem}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            if job.traceback is not None:
                log = Path(manifest.folder_of(job)) / "train.log"
                console.print(f"  its traceback: {log}", markup=False, highlight=False, soft_wrap=True)


def value_of(run: RunRecord, metric: str) -> float | None:
    """A metric of a run's best checkpoint; `pass@1` is that of its last model. None: it was not measured."""
    line = {"pass@1": (run.summary.get("pass@1") or {}).get("value"), **run.summary.get("best", {})}
    found = line.get(metric)
    return float(found) if isinstance(found, int | float) else None


def results_table(runs: list[RunRecord], metric: str) -> Table:
    """A row for each group of seeds, sorted by the mean of a metric in the best checkpoint; unknown ones last."""
    rows: list[tuple[float | None, list[str]]] = []
    for label, members in grouped(runs).items():
        known = [value for run in members if (value := value_of(run, metric)) is not None]
        seeds = ", ".join(str(run.seed) for run in sorted(members, key=lambda run: run.seed))
        middle = mean(known) if known else None
        shown = "-" if middle is None else f"{middle:.4f}"
        spread = f"± {stdev(known):.4f}" if len(known) > 1 else ""
        best = "-" if not known else f"{(min if is_lower_better(metric) else max)(known):.4f}"
        rows.append((middle, [escape(label), seeds, shown, spread, best]))
    sign = 1 if is_lower_better(metric) else -1
    rows.sort(key=lambda row: (row[0] is None, sign * (row[0] or 0.0)))
    right = [Column(name, justify="right") for name in (f"mean {metric}", "deviation", "best")]
    table = Table("group", "seeds", *right, title="best checkpoint of each run", title_justify="left")
    for _, row in rows:
        table.add_row(*row)
    return table
