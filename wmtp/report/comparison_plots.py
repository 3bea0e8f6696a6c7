"""Plots of a comparison. They show the value of each run, the differences from the baseline, and the loss curves."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from wmtp.report.plots import (
    BAD,
    GOOD,
    INK,
    LINES,
    PAPER,
    QUIET,
    TICK_STEPS,
    Plot,
    Series,
    add_legend,
    create_panels,
    downsample_indices,
    finish_axes,
    line_style,
    set_log_x_axis,
    set_loss_axis,
)  # fmt: skip
from wmtp.report.results import MetricComparison, TokensToTarget
from wmtp.report.run_record import RunRecord

NAME_WIDTH, MAX_NAME_LETTERS, MAX_NAME_LINES = 1.75, 21, 4
"""Space for a group name: width in inches, maximum number of letters per line, and maximum number of lines."""
VERDICT_COLORS = {"better": GOOD, "worse": BAD}
NUM_MARKERS = 10
"""Maximum number of markers on a curve. Markers identify a curve without its color, but many would hide it."""
MAX_GROUPS_WITH_RUNS = 4
"""Maximum number of groups for which the curves of single runs are shown. More curves would hide the mean curves."""


def plot_values_by_seed(metric: MetricComparison, name: str) -> Plot | None:
    """Plot the value of each run. Each group has its own row, and lines join the runs with the same seed."""
    groups = [group for group in metric.groups if group.values_by_seed]
    if not groups:
        return None
    figure, axes, row_positions = create_rows([group.label for group in groups], metric.metric)
    for seed in sorted({seed for group in groups for seed in group.values_by_seed}):
        line = [(group.values_by_seed.get(seed), y) for group, y in zip(groups, row_positions, strict=True)]
        for (start, above), (end, below) in pairwise(line):
            if start is not None and end is not None:
                axes.plot([start, end], [above, below], color=QUIET, alpha=0.55, linewidth=0.8)
    for number, (group, y) in enumerate(zip(groups, row_positions, strict=True)):
        values = list(group.values_by_seed.values())
        style = line_style(number)
        axes.plot([group.mean, group.mean], [y - 0.3, y + 0.3], color=style.color, linewidth=2.5, alpha=0.5)
        axes.plot(values, [y] * len(values), style.marker, color=style.color, markersize=6, markeredgecolor=PAPER)
    label = "; ".join(f"{group.label}: mean {group.mean:.4g} of {len(group.values_by_seed)}" for group in groups)
    better = "lower" if metric.lower_is_better else "higher"
    caption = f"{metric.metric} of each run, {metric.at}; {better} is better. Bars: means; lines join runs of one seed."
    return Plot(figure, name, f"{metric.metric} of each run. {label}", caption)


def plot_forest(metric: MetricComparison, baseline: str, name: str) -> Plot | None:
    """Plot each group's mean difference from the baseline, its 95 % interval, and the difference of each seed."""
    differences = [difference for difference in metric.differences if difference.pairs]
    if not differences:
        return None
    figure, axes, row_positions = create_rows([each.label for each in differences], f"difference in {metric.metric}")
    axes.axvline(0, color=INK, linewidth=1.0)
    for each, y in zip(differences, row_positions, strict=True):
        color = VERDICT_COLORS.get(each.verdict, QUIET)
        pairs = list(each.pairs.values())
        axes.plot(pairs, [y + 0.27] * len(pairs), "o", color=QUIET, markersize=3, alpha=0.65, markeredgewidth=0)
        if each.low is not None and each.high is not None:
            axes.plot([each.low, each.high], [y, y], "|-", color=color, linewidth=2, markersize=7)
        axes.plot([each.mean], [y], "D", color=color, markersize=6, markeredgecolor=PAPER)
    low, high = axes.get_xlim()
    limit = max(abs(low), abs(high))
    axes.set_xlim(min(low, -0.15 * limit), max(high, 0.15 * limit))
    side = "left" if metric.lower_is_better else "right"
    caption = (
        f"Difference from {baseline}, paired by seed; {side} of the line is better. Diamonds: means; lines: 95 % "
        "intervals, not corrected, gray if no difference is shown after the correction for all groups; dots: seeds."
    )
    label = "; ".join(f"{each.label} {each.mean:+.4g}, {each.verdict}" for each in differences)
    return Plot(figure, name, f"Differences in {metric.metric} from {baseline}. {label}", caption)


def plot_curves(groups: Mapping[str, Sequence[RunRecord]], metric: str) -> list[Plot]:
    """Plot how a validation metric of each group changes during the training.

    A second plot shows the second half of the training on a larger scale. Each group has a line for the mean over
    seeds, with a band of one standard deviation. The curves of single runs are shown too if there are at most
    `MAX_GROUPS_WITH_RUNS` groups. The horizontal axis shows the number of tokens if all runs recorded it, and the
    number of updates otherwise.
    """
    runs = [run for members in groups.values() for run in members]
    by_tokens = all("tokens" in line for run in runs for line in run.metrics if metric in line)
    curves = {label: [validation_curve(run, metric, by_tokens) for run in members] for label, members in groups.items()}
    curves = {label: kept for label, members in curves.items() if (kept := [each for each in members if each])}
    if not curves:
        return []
    late = {label: [_second_half(member) for member in members] for label, members in curves.items()}
    late = {label: kept for label, members in late.items() if (kept := [each for each in members if len(each) > 1])}
    caption = "Lines: means over seeds, where all runs of a group have values; bands: one standard deviation"
    caption += "; thin lines: runs." if len(curves) <= MAX_GROUPS_WITH_RUNS else "."
    plots = [_plot_group_curves(curves, by_tokens, "curves", metric, caption)]
    if late:
        plots.append(
            _plot_group_curves(
                late, by_tokens, "late-curves", f"{metric}, second half", "The second half on a larger scale."
            )
        )
    return plots


def _second_half(curve: Series) -> Series:
    """Return the second half of a curve. A curve over tokens begins at those of stage 1, not at 0."""
    middle = (curve[0][0] + curve[-1][0]) / 2
    return [pair for pair in curve if pair[0] >= middle]


def _plot_group_curves(
    curves: Mapping[str, Sequence[Series]], by_tokens: bool, name: str, title: str, caption: str
) -> Plot:
    columns = 2 if max(map(len, curves)) < MAX_NAME_LETTERS else 1
    figure, (axes,) = create_panels(
        [title], height=2.6, legend_rows=math.ceil(len(curves) / columns),
        x_label="tokens, including stage 1" if by_tokens else "update",
    )  # fmt: skip
    for number, (label, members) in enumerate(curves.items()):
        short = textwrap.shorten(label, 48, placeholder=" …")
        _add_group_curve(axes, members, number, short, with_runs=len(curves) <= MAX_GROUPS_WITH_RUNS)
    set_loss_axis(axes)
    if by_tokens:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tokens(value)))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=TICK_STEPS))
        add_legend(axes, columns)
    else:
        finish_axes(axes, columns)
    ends = "; ".join(
        f"{label} ends at {np.mean([each[-1][1] for each in members]):.4g}" for label, members in curves.items()
    )
    return Plot(figure, name, f"{title} of every group. {ends}", caption)


def validation_curve(run: RunRecord, metric: str, by_tokens: bool) -> Series:
    """Return the finite values of a validation metric as pairs (position, value), downsampled for a plot.

    The position is the number of tokens trained on, including stage 1, if `by_tokens` is true. Otherwise it is the
    number of updates.
    """
    before = int((run.summary.get("pretrain") or {}).get("total_tokens") or 0)
    curve = [
        (line["tokens"] + before if by_tokens else line["step"], float(line[metric]))
        for line in run.metrics
        if metric in line
    ]
    finite = [pair for pair in curve if math.isfinite(pair[1])]
    return [finite[index] for index in downsample_indices(np.array([value for _, value in finite]))] if finite else []


def plot_tokens_to_target(results: Sequence[TokensToTarget], baseline: str) -> Plot | None:
    """Plot how many tokens each run needed to reach the baseline's best loss, relative to the baseline."""
    plotted = [each for each in results if any(pair.tokens is not None for pair in each.pairs)]
    if not plotted:
        return None
    figure, axes, row_positions = create_rows([each.label for each in plotted], f"tokens relative to {baseline}")
    axes.axvline(1, color=INK, linewidth=1.0)
    known = [ratio for each in plotted for ratio in (each.low, each.high, *_ratios(each)) if ratio is not None]
    start, end = min(0.9, *known) / 1.05, max(1.1, *known) * 1.05
    axes.set_xlim(start, end)
    for each, y in zip(plotted, row_positions, strict=True):
        ratios = _ratios(each)
        axes.plot(ratios, [y + 0.27] * len(ratios), "o", color=QUIET, markersize=3, alpha=0.65, markeredgewidth=0)
        if each.never:
            axes.plot([end], [y + 0.27], ">", color=QUIET, markersize=4, clip_on=False)
        if each.low is not None:
            high = end if each.high is None else each.high
            axes.plot([each.low, high], [y, y], "|-", color=LINES[0], linewidth=2, markersize=7)
        if each.high is None and each.has_interval:
            axes.plot([end], [y], ">", color=LINES[0], markersize=6, clip_on=False)
        if each.ratio is not None:
            axes.plot([each.ratio], [y], "D", color=LINES[0], markersize=6, markeredgecolor=PAPER)
    set_log_x_axis(axes)
    label = "; ".join(f"{each.label} {'never' if each.ratio is None else f'{each.ratio:.3g}'}" for each in plotted)
    caption = (
        "Left of the line is faster. Diamonds: medians with 95 % intervals; dots: seeds. Arrows: a seed that never "
        "reached the loss, or an interval without an upper end."
    )
    return Plot(figure, "reach", f"Tokens to {baseline}’s best loss, relative to its own tokens: {label}", caption)


def _ratios(result: TokensToTarget) -> list[float]:
    return [pair.tokens / pair.baseline_tokens for pair in result.pairs if pair.tokens is not None]


def create_rows(labels: Sequence[str], x_label: str) -> tuple[Figure, Axes, list[float]]:
    """Return a figure with a row for each label, its axes, and the vertical position of each row.

    Long labels are broken into several lines.
    """
    names = [textwrap.fill(label, MAX_NAME_LETTERS, max_lines=MAX_NAME_LINES, placeholder=" …") for label in labels]
    heights = [max(2.2, 1.15 * (name.count("\n") + 1) + 0.6) / 2.2 for name in names]
    edges = np.concatenate([[0], np.cumsum(heights)])
    row_positions = [float(start + end) / 2 for start, end in pairwise(edges)]
    figure, (axes,) = create_panels([""], height=0.36 * edges[-1] + 0.1, left=NAME_WIDTH, x_label=x_label)
    axes.set_yticks(row_positions, names, horizontalalignment="left")
    axes.tick_params(axis="y", pad=72 * NAME_WIDTH - 2)
    axes.set_ylim(edges[-1], 0)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS, min_n_ticks=3))
    axes.margins(x=0.06)
    axes.spines["left"].set_visible(False)
    return figure, axes, row_positions


def _add_group_curve(axes: Axes, members: Sequence[Series], number: int, label: str, with_runs: bool) -> None:
    style = line_style(number)
    for member in members if with_runs else ():
        axes.plot(*zip(*member, strict=True), color=style.color, linewidth=0.5, alpha=0.4)
    grid = np.unique([x for member in members for x, _ in member])
    first, last = (pick(member[end][0] for member in members) for pick, end in ((max, 0), (min, -1)))
    grid = grid[(grid >= first) & (grid <= last)]
    values = np.array([
        np.interp(grid, [x for x, _ in member], [value for _, value in member]) for member in members
    ])  # fmt: skip
    mean = values.mean(axis=0)
    axes.plot(
        grid, mean, color=style.color, linestyle=style.dash, marker=style.marker,
        markevery=math.ceil(len(grid) / NUM_MARKERS), label=label,
    )  # fmt: skip
    if len(members) > 1:
        deviation = values.std(axis=0, ddof=1)
        axes.fill_between(grid, mean - deviation, mean + deviation, color=style.color, alpha=0.12, linewidth=0)


def format_tokens(value: float) -> str:
    """Return a number of tokens in short form, with a unit such as M for millions.

    >>> format_tokens(1_500_000), format_tokens(20_000), format_tokens(0)
    ('1.5 M', '20 k', '0')
    """
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:g}"
