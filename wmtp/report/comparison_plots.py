"""Drawings of a comparison: what each seed gave, differences with their intervals, and curves of every group."""

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
    STEPS,
    Drawing,
    Series,
    finish,
    legend,
    logarithmic_across,
    look,
    panels,
    thinned,
)  # fmt: skip
from wmtp.report.results import MetricComparison, Reach
from wmtp.report.run_record import RunRecord

NAMES, LETTERS, MOST_LINES = 1.75, 21, 4
"""Inches that the groups' names take, how many letters fit into them, and lines that a name may have."""
COLOURS = {"better": GOOD, "worse": BAD}
MARKS = 10
"""Markers on a curve, so that it is known without its colour and is not hidden by them."""
MOST_WITH_RUNS = 4
"""Of more groups the runs' own curves would hide the means."""


def seeds_drawing(metric: MetricComparison, name: str) -> Drawing | None:
    """Each run's value, a row for each group; lines join the runs of one seed."""
    groups = [group for group in metric.groups if group.values_by_seed]
    if not groups:
        return None
    figure, axes, places = _rows([group.label for group in groups], metric.metric)
    for seed in sorted({seed for group in groups for seed in group.values_by_seed}):
        line = [(group.values_by_seed.get(seed), place) for group, place in zip(groups, places, strict=True)]
        for (start, above), (end, below) in pairwise(line):
            if start is not None and end is not None:
                axes.plot([start, end], [above, below], color=QUIET, alpha=0.55, linewidth=0.8)
    for number, (group, place) in enumerate(zip(groups, places, strict=True)):
        values = list(group.values_by_seed.values())
        own = look(number)
        axes.plot([group.mean, group.mean], [place - 0.3, place + 0.3], color=own.colour, linewidth=2.5, alpha=0.5)
        axes.plot(values, [place] * len(values), own.marker, color=own.colour, markersize=6, markeredgecolor=PAPER)
    label = "; ".join(f"{group.label}: mean {group.mean:.4g} of {len(group.values_by_seed)}" for group in groups)
    better = "lower" if metric.lower_is_better else "higher"
    caption = f"{metric.metric} of each run, {metric.at}; {better} is better. Bars: means; lines join runs of one seed."
    return Drawing(figure, name, f"{metric.metric} of each run. {label}", caption)


def forest_drawing(metric: MetricComparison, baseline: str, name: str) -> Drawing | None:
    """The mean difference of each group from the baseline with its interval, over the differences of the seeds."""
    differences = [difference for difference in metric.differences if difference.pairs]
    if not differences:
        return None
    figure, axes, places = _rows([each.label for each in differences], f"difference in {metric.metric}")
    axes.axvline(0, color=INK, linewidth=1.0)
    for each, place in zip(differences, places, strict=True):
        colour = COLOURS.get(each.verdict, QUIET)
        pairs = list(each.pairs.values())
        axes.plot(pairs, [place + 0.27] * len(pairs), "o", color=QUIET, markersize=3, alpha=0.65, markeredgewidth=0)
        if each.low is not None and each.high is not None:
            axes.plot([each.low, each.high], [place, place], "|-", color=colour, linewidth=2, markersize=7)
        axes.plot([each.mean], [place], "D", color=colour, markersize=6, markeredgecolor=PAPER)
    low, high = axes.get_xlim()
    reach = max(abs(low), abs(high))
    axes.set_xlim(min(low, -0.15 * reach), max(high, 0.15 * reach))
    side = "left" if metric.lower_is_better else "right"
    caption = (
        f"Less {baseline}, seed by seed: {side} of the line is better. Diamonds: means; lines: 95 % intervals, each "
        "group’s alone, grey where no difference is shown after the correction for all groups; dots: seeds."
    )
    label = "; ".join(f"{each.label} {each.mean:+.4g}, {each.verdict}" for each in differences)
    return Drawing(figure, name, f"Differences in {metric.metric} from {baseline}. {label}", caption)


def curves_drawings(groups: Mapping[str, Sequence[RunRecord]], metric: str) -> list[Drawing]:
    """A validation metric of every group: means over seeds, bands of one deviation; the last half larger.

    Of `MOST_WITH_RUNS` groups or fewer each run, too. By tokens, if all runs recorded them, else by updates.
    """
    runs = [run for members in groups.values() for run in members]
    by_tokens = all("tokens" in line for run in runs for line in run.metrics if metric in line)
    curves = {label: [validation_curve(run, metric, by_tokens) for run in members] for label, members in groups.items()}
    curves = {label: kept for label, members in curves.items() if (kept := [each for each in members if each])}
    if not curves:
        return []
    end = max(place for members in curves.values() for member in members for place, _ in member)
    late = {
        label: [[pair for pair in member if pair[0] >= end / 2] for member in members]
        for label, members in curves.items()
    }
    late = {label: kept for label, members in late.items() if (kept := [each for each in members if len(each) > 1])}
    caption = "Lines: means over seeds, where all of a group were measured; bands: one deviation"
    caption += "; thin: runs." if len(curves) <= MOST_WITH_RUNS else "."
    shown = [_curves(curves, by_tokens, "curves", metric, caption)]
    if late:
        shown.append(_curves(late, by_tokens, "late-curves", f"{metric}, the last half", "The same, larger."))
    return shown


def _curves(curves: Mapping[str, Sequence[Series]], by_tokens: bool, name: str, title: str, caption: str) -> Drawing:
    columns = 2 if max(map(len, curves)) < LETTERS else 1
    figure, (axes,) = panels(
        [title], height=2.6, legend_rows=math.ceil(len(curves) / columns),
        x_label="tokens, with those of the stage before" if by_tokens else "update",
    )  # fmt: skip
    for number, (label, members) in enumerate(curves.items()):
        short = textwrap.shorten(label, 48, placeholder=" …")
        _group_curve(axes, members, number, short, with_runs=len(curves) <= MOST_WITH_RUNS)
    if by_tokens:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(value)))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS))
        legend(axes, columns)
    else:
        finish(axes, columns)
    ends = "; ".join(
        f"{label} ends at {np.mean([each[-1][1] for each in members]):.4g}" for label, members in curves.items()
    )
    return Drawing(figure, name, f"{title} of every group. {ends}", caption)


def validation_curve(run: RunRecord, metric: str, by_tokens: bool) -> Series:
    """A validation metric by step, or by all tokens that were trained on until then."""
    before = int((run.summary.get("pretrain") or {}).get("total_tokens") or 0)
    curve = [
        (line["tokens"] + before if by_tokens else line["step"], float(line[metric]))
        for line in run.metrics
        if metric in line
    ]
    finite = [pair for pair in curve if math.isfinite(pair[1])]
    return [finite[place] for place in thinned(np.array([value for _, value in finite]))] if finite else []


def reach_drawing(reach: Sequence[Reach], baseline: str) -> Drawing | None:
    """Tokens to the baseline's best loss, as ratios."""
    shown = [each for each in reach if any(pair.tokens is not None for pair in each.pairs)]
    if not shown:
        return None
    figure, axes, places = _rows([each.label for each in shown], f"tokens, as a multiple of {baseline}’s")
    axes.axvline(1, color=INK, linewidth=1.0)
    known = [ratio for each in shown for ratio in (each.low, each.high, *_ratios(each)) if ratio is not None]
    start, end = min(0.9, *known) / 1.05, max(1.1, *known) * 1.05
    axes.set_xlim(start, end)
    for each, place in zip(shown, places, strict=True):
        ratios = _ratios(each)
        axes.plot(ratios, [place + 0.27] * len(ratios), "o", color=QUIET, markersize=3, alpha=0.65, markeredgewidth=0)
        if each.never:
            axes.plot([end], [place + 0.27], ">", color=QUIET, markersize=4, clip_on=False)
        if each.low is not None:
            high = end if each.high is None else each.high
            axes.plot([each.low, high], [place, place], "|-", color=LINES[0], linewidth=2, markersize=7)
        if each.high is None and each.has_interval:
            axes.plot([end], [place], ">", color=LINES[0], markersize=6, clip_on=False)
        if each.ratio is not None:
            axes.plot([each.ratio], [place], "D", color=LINES[0], markersize=6, markeredgecolor=PAPER)
    logarithmic_across(axes)
    label = "; ".join(f"{each.label} {'never' if each.ratio is None else f'{each.ratio:.3g}'}" for each in shown)
    caption = (
        "Left of the line is faster. Diamonds: medians with 95 % intervals; dots: seeds. Arrows go on: a seed that "
        "never reached it, an interval without end."
    )
    return Drawing(figure, "reach", f"Tokens to {baseline}’s best loss as a multiple of its own: {label}", caption)


def _ratios(reach: Reach) -> list[float]:
    return [pair.tokens / pair.baseline_tokens for pair in reach.pairs if pair.tokens is not None]


def _rows(labels: Sequence[str], x_label: str) -> tuple[Figure, Axes, list[float]]:
    """A row for each label, which is broken into lines; the rows' places from the top."""
    names = [textwrap.fill(label, LETTERS, max_lines=MOST_LINES, placeholder=" …") for label in labels]
    heights = [max(2.2, 1.15 * (name.count("\n") + 1) + 0.6) / 2.2 for name in names]
    edges = np.concatenate([[0], np.cumsum(heights)])
    places = [float(start + end) / 2 for start, end in pairwise(edges)]
    figure, (axes,) = panels([""], height=0.36 * edges[-1] + 0.1, left=NAMES, x_label=x_label)
    axes.set_yticks(places, names, horizontalalignment="left")
    axes.tick_params(axis="y", pad=72 * NAMES - 2)
    axes.set_ylim(edges[-1], 0)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=STEPS, min_n_ticks=3))
    axes.margins(x=0.06)
    axes.spines["left"].set_visible(False)
    return figure, axes, places


def _group_curve(axes: Axes, members: Sequence[Series], number: int, label: str, with_runs: bool) -> None:
    own = look(number)
    for member in members if with_runs else ():
        axes.plot(*zip(*member, strict=True), color=own.colour, linewidth=0.5, alpha=0.4)
    grid = np.unique([place for member in members for place, _ in member])
    first, last = (pick(member[end][0] for member in members) for pick, end in ((max, 0), (min, -1)))
    grid = grid[(grid >= first) & (grid <= last)]
    values = np.array([
        np.interp(grid, [place for place, _ in member], [value for _, value in member]) for member in members
    ])  # fmt: skip
    mean = values.mean(axis=0)
    axes.plot(
        grid, mean, color=own.colour, linestyle=own.dash, marker=own.marker, markevery=math.ceil(len(grid) / MARKS),
        label=label,
    )  # fmt: skip
    if len(members) > 1:
        deviation = values.std(axis=0, ddof=1)
        axes.fill_between(grid, mean - deviation, mean + deviation, color=own.colour, alpha=0.12, linewidth=0)


def _tokens(value: float) -> str:
    """A count of tokens, short enough for an axis.

    >>> _tokens(1_500_000), _tokens(20_000), _tokens(0)
    ('1.5 M', '20 k', '0')
    """
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
