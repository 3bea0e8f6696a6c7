"""The table of results that a sweep prints at its end."""

import math
from statistics import mean, stdev

from rich.table import Column, Table

from wmtp.report.grouping import group_runs
from wmtp.report.measures import MODEL_LABELS, group_means, measured_values
from wmtp.report.metrics import is_lower_better
from wmtp.report.run_record import RunRecord
from wmtp.report.tables import means_table
from wmtp.runtime.console import Console
from wmtp.runtime.run_dir import SWEEP
from wmtp.runtime.sweep_jobs import job_labels
from wmtp.sweep.grid import SweepOptions
from wmtp.sweep.state import SweepState


def print_results(console: Console, state: SweepState, options: SweepOptions) -> None:
    """Print the table of results, and the error of each job that did not finish."""
    runs = state.finished_runs()
    console.print(f"\n{len(runs)} of {len(state.jobs)} jobs finished", highlight=False)
    if runs:
        console.print(results_table(runs, options))
        if all(metric_value(run, options) is None for run in runs):
            known = ", ".join(sorted(measured_values(runs[0], options.at)))
            console.print(f"no run has sweep.metric={options.metric}; the runs have {known}", highlight=False)
        for means in group_means(group_runs(runs), options.at):
            console.print(means_table(means))
    labels = job_labels([job.overrides for job in state.jobs])
    for job, label in zip(state.jobs, labels, strict=True):
        if job.state != "FINISHED":
            problem = (job.error or "was not started").splitlines()[0]
            line = f"job {job.number} ({label}) {job.state}: {problem}"
            console.print(line, highlight=False, soft_wrap=True)
            if job.traceback is not None:
                log = state.job_folder(job) / "train.log"
                log = log if log.exists() else state.folder / SWEEP
                console.print(f"  its traceback: {log}", highlight=False, soft_wrap=True)


def metric_value(run: RunRecord, options: SweepOptions) -> float | None:
    """Return the value of the metric `options.metric` for a run, or None if the run has no such value.

    The option `at` has no effect on metrics of the end of a run, such as `pass@1`, which are always of the last model.
    """
    found = measured_values(run, options.at).get(options.metric)
    return found if found is not None and math.isfinite(found) else None


def results_table(runs: list[RunRecord], options: SweepOptions) -> Table:
    """Return a table with one row for each group of runs that differ only in the seed.

    The rows are sorted by the mean of the metric `options.metric`, from best to worst. Groups without a value are last.
    """
    metric = options.metric
    rows: list[tuple[float | None, list[str]]] = []
    for label, members in group_runs(runs).items():
        known = [value for run in members if (value := metric_value(run, options)) is not None]
        seeds = ", ".join(str(run.seed) for run in sorted(members, key=lambda run: run.seed))
        average = mean(known) if known else None
        mean_text = "-" if average is None else f"{average:.4f}"
        spread = f"± {stdev(known):.4f}" if len(known) > 1 else ""
        best = "-" if not known else f"{(min if is_lower_better(metric) else max)(known):.4f}"
        rows.append((average, [label, seeds, mean_text, spread, best]))
    sign = 1 if is_lower_better(metric) else -1
    rows.sort(key=lambda row: (row[0] is None, sign * (row[0] or 0.0)))
    right = [Column(name, justify="right") for name in (f"mean {metric}", "deviation", "best")]
    table = Table("group", "seeds", *right, title=f"{MODEL_LABELS[options.at]} of each run", title_justify="left")
    for _, row in rows:
        table.add_row(*row)
    return table
