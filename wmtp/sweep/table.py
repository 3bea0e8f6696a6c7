"""What a sweep gave: its groups of seeds, the best one first, and the jobs that did not finish."""

from statistics import mean, stdev

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from wmtp.report.groups import grouped
from wmtp.report.measures import WHERE, is_lower_better
from wmtp.report.runs import RunRecord
from wmtp.runtime.folder import SWEEP
from wmtp.sweep.grid import swept
from wmtp.sweep.manifest import Manifest
from wmtp.sweep.options import SweepOptions


def print_results(console: Console, manifest: Manifest, options: SweepOptions) -> None:
    """The table at the end of a sweep, and what is wrong with the jobs that are not in it."""
    runs = manifest.finished()
    console.print(f"\n{len(runs)} of {len(manifest.jobs)} jobs finished", highlight=False)
    if runs:
        console.print(results_table(runs, options))
        if all(value_of(run, options) is None for run in runs):
            known = ", ".join(sorted(name for name in runs[0].summary[options.at] if name.startswith("val/")))
            console.print(f"no run has sweep.metric={options.metric}; they have {known}", highlight=False)
    names = swept([job.overrides for job in manifest.jobs])
    for job, name in zip(manifest.jobs, names, strict=True):
        if job.state != "FINISHED":
            problem = (job.error or "was not started").splitlines()[0]
            line = f"job {job.number} ({name}) {job.state}: {problem}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
            if job.traceback is not None:
                log = manifest.folder_of(job) / "train.log"
                log = log if log.exists() else manifest.folder / SWEEP
                console.print(f"  its traceback: {log}", markup=False, highlight=False, soft_wrap=True)


def value_of(run: RunRecord, options: SweepOptions) -> float | None:
    """A run's value of the wished metric; `pass@1` is always that of its last model. None: it was not measured."""
    line = {"pass@1": (run.summary.get("pass@1") or {}).get("value"), **run.summary.get(options.at, {})}
    found = line.get(options.metric)
    return float(found) if isinstance(found, int | float) else None


def results_table(runs: list[RunRecord], options: SweepOptions) -> Table:
    """A row for each group of seeds, sorted by the mean of the wished metric; unknown ones last."""
    metric = options.metric
    rows: list[tuple[float | None, list[str]]] = []
    for label, members in grouped(runs).items():
        known = [value for run in members if (value := value_of(run, options)) is not None]
        seeds = ", ".join(str(run.seed) for run in sorted(members, key=lambda run: run.seed))
        middle = mean(known) if known else None
        shown = "-" if middle is None else f"{middle:.4f}"
        spread = f"± {stdev(known):.4f}" if len(known) > 1 else ""
        best = "-" if not known else f"{(min if is_lower_better(metric) else max)(known):.4f}"
        rows.append((middle, [escape(label), seeds, shown, spread, best]))
    sign = 1 if is_lower_better(metric) else -1
    rows.sort(key=lambda row: (row[0] is None, sign * (row[0] or 0.0)))
    right = [Column(name, justify="right") for name in (f"mean {metric}", "deviation", "best")]
    table = Table("group", "seeds", *right, title=f"{WHERE[options.at]} of each run", title_justify="left")
    for _, row in rows:
        table.add_row(*row)
    return table
