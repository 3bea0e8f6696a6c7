"""Plots of a study: the search, end values over tokens, factors of tokens, differences, and power."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from scipy import stats
from scipy.interpolate import PchipInterpolator

from wmtp.report.comparison_plots import create_rows, format_tokens, plot_forest, validation_curve
from wmtp.report.plots import (
    INK,
    LINES,
    MAX_LINEAR_RANGE,
    PAPER,
    QUIET,
    TICK_STEPS,
    Plot,
    Series,
    add_legend,
    create_panels,
    line_style,
    set_integer_x_axis,
    set_log_x_axis,
    set_log_y_axis,
)
from wmtp.report.results import Difference, MetricComparison
from wmtp.report.run_record import RunRecord
from wmtp.statistics.best_of_n import BestOfN
from wmtp.statistics.power import planned_power
from wmtp.statistics.token_factor import HorizonPoint, TokenFactor, fitted_curve, mean_point
from wmtp.studies.panel_grid import add_grid_legend, create_grid, shorten_name
from wmtp.studies.results import ArmHorizons, ArmSearch, HorizonResult, StudyResult
from wmtp.studies.tables import finite

NUM_EFFECTS = 20
"""Number of effects for which power is computed. The curve between them is interpolated."""
POWER_LEVEL = 0.8
Curve = Callable[[float], float]


def plot_best_of_n(searches: Sequence[ArmSearch], baseline: str, metric: str) -> Plot | None:
    """Plot the expected best mean of n trials, with one panel for each arm that also shows the baseline."""
    known = {each.label: each.best_of_n for each in searches if each.best_of_n}
    base = known.pop(baseline, [])
    if not base and not known:
        return None
    others = known or {baseline: base}
    figure, panels = create_grid(list(others), x_label="number of trials")
    for axes, points in zip(panels, others.values(), strict=True):
        if known and base:
            _add_best_of_n(axes, base, QUIET, baseline, "--")
        _add_best_of_n(axes, points, LINES[0], "arm of the panel", "-")
    bounds = [bound for points in (base, *known.values()) for each in points for bound in (each.low, each.high)]
    if min(bounds) > 0 and max(bounds) > MAX_LINEAR_RANGE * min(bounds):  # such as one trial that diverged
        set_log_y_axis(panels[0])
    set_integer_x_axis(panels[0])
    panels[0].xaxis.set_major_locator(MaxNLocator(4, integer=True))
    add_grid_legend(figure, panels[0])
    ends = "; ".join(f"{label} {points[-1].expected:.4g} of {points[-1].n}" for label, points in others.items())
    caption = (
        f"Mean of {metric} on the tuning seeds that the best of n trials is expected to reach. Shaded band, and thin "
        "lines for the baseline: 95 % intervals. If a curve still changes at its end, more trials may help this arm."
    )
    return Plot(figure, "best-of-n", f"Expected best {metric} of n trials. {ends}", caption)


def _add_best_of_n(axes: Axes, points: Sequence[BestOfN], color: str, label: str, dash: str) -> None:
    """Plot a curve with its interval: as a band if the curve is solid, otherwise as thin lines, which cover nothing."""
    numbers, expected, low, high = np.array([(each.n, each.expected, each.low, each.high) for each in points]).T
    if dash == "-":
        axes.fill_between(numbers, low, high, color=color, alpha=0.2, linewidth=0)
    else:
        axes.plot(numbers, np.array([low, high]).T, color=color, linestyle=":", linewidth=0.9)
    axes.plot(numbers, expected, color=color, linestyle=dash, label=label, marker="o" if len(points) == 1 else "")


def plot_ends(horizons: Sequence[ArmHorizons], baseline: str, metric: str) -> Plot | None:
    """Plot end values over tokens with their fit, with one panel for each arm that also shows the baseline."""
    known = {each.label: each for each in horizons if each.horizons}
    base = known.pop(baseline, None)
    if base is None:
        return None
    others, with_fit = known or {baseline: base}, any(arm.factor is not None for arm in horizons)
    figure, panels = create_grid(list(others), x_label="tokens, including stage 1")
    for axes, arm in zip(panels, others.values(), strict=True):
        _add_ends(axes, base, QUIET, "s", baseline, _last_tokens(base) if with_fit else None)
        if arm is not base:
            needed = _needed_tokens(arm, base) if with_fit else None
            _add_ends(axes, arm, LINES[0], "o", "arm of the panel", needed)
            _add_factor(axes, arm, base)
    ends = [value for arm in [base, *known.values()] for each in arm.horizons for value in each.values.values()]
    if min(ends) > 0 and max(ends) > MAX_LINEAR_RANGE * min(ends):
        set_log_y_axis(panels[0])
    _set_token_axis(panels[0])
    add_grid_legend(figure, panels[0])
    text = "; ".join(f"{label} {mean(arm.horizons[-1].values.values()):.4g}" for label, arm in others.items())
    caption = (
        f"{metric} at the end of the judged runs. Each horizon has its own runs. Large marks: means over seeds; small "
        "marks: seeds; lines: fit, dashed where it is extrapolated. The line with end marks is the factor of tokens: "
        f"from the tokens of {baseline} to the tokens with which the arm is expected to reach the same value."
    )
    return Plot(figure, "ends", f"{metric} at the end over tokens. At the longest horizon: {text}", caption)


def _add_ends(axes: Axes, arm: ArmHorizons, color: str, marker: str, label: str, needed: float | None) -> None:
    """Plot the end values of an arm, and their fit up to the tokens `needed` unless it is None."""
    for each in arm.horizons:
        values = list(each.values.values())
        axes.plot([each.tokens] * len(values), values, marker, color=color, markersize=2.2, alpha=0.45,
                  markeredgewidth=0)  # fmt: skip
    means = [(each.tokens, mean(each.values.values())) for each in arm.horizons]
    axes.plot(*zip(*means, strict=True), marker, color=color, markersize=5, markeredgecolor=PAPER)
    axes.plot([], [], color=color, marker=marker, label=label)
    curve = None if needed is None else _fitted(arm.horizons)
    if curve is None or needed is None:
        return
    first, last = means[0][0], means[-1][0]
    _add_fit(axes, curve, (first, last), color, "-")
    if needed > last:
        _add_fit(axes, curve, (last, needed), color, "--")
    if needed < first:
        _add_fit(axes, curve, (needed, first), color, "--")


def _add_fit(axes: Axes, curve: Curve, ends: tuple[float, float], color: str, dash: str) -> None:
    tokens = np.geomspace(*ends, 40)
    axes.plot(tokens, [curve(each) for each in tokens], color=color, linestyle=dash, linewidth=1.2)


def _add_factor(axes: Axes, arm: ArmHorizons, base: ArmHorizons) -> None:
    """Add a horizontal line from the tokens of the baseline to the tokens with which the arm reaches its end value."""
    if arm.factor is not None and finite(arm.factor.factor) is not None:
        value = mean_end(base.horizons[-1]).loss
        axes.plot([_last_tokens(base), _needed_tokens(arm, base)], [value, value], "|-", color=INK, linewidth=1.0,
                  markersize=6)  # fmt: skip


def _fitted(horizons: Sequence[HorizonResult]) -> Curve | None:
    """Return the fit of the mean end values over tokens, or None if there is only one horizon."""
    points = [mean_end(each) for each in horizons]
    return fitted_curve(points) if len({point.tokens for point in points}) > 1 else None


def mean_end(horizon: HorizonResult) -> HorizonPoint:
    """Return the tokens and the mean end value at a horizon, with the kind of mean that the factor of tokens uses."""
    return mean_point([HorizonPoint(horizon.tokens, value) for value in horizon.values.values()])


def _last_tokens(arm: ArmHorizons) -> float:
    return arm.horizons[-1].tokens


def _needed_tokens(arm: ArmHorizons, base: ArmHorizons) -> float:
    """Return the tokens with which an arm reaches the baseline's end value, or its own last tokens if unknown."""
    factor = None if arm.factor is None else finite(arm.factor.factor)
    return _last_tokens(arm) if factor is None else factor * _last_tokens(base)


def plot_factors(horizons: Sequence[ArmHorizons], baseline: str) -> Plot | None:
    """Plot the factor of tokens of each arm with its interval, sorted by the factor."""
    found = [(arm.label, arm.factor) for arm in horizons if arm.factor and any(_ends_of(arm.factor))]
    if not found:
        return None
    found.sort(key=lambda pair: next(value for value in _ends_of(pair[1]) if value))
    figure, axes, row_positions = create_rows([label for label, _ in found], f"tokens relative to {baseline}")
    axes.axvline(1, color=INK, linewidth=1.0)
    ends = [value for _, factor in found for value in _ends_of(factor) if value]
    left, right = min(0.9, min(ends) / 1.08), max(1.1, max(ends) * 1.08)
    axes.set_xlim(left, right)
    for (_, factor), y in zip(found, row_positions, strict=True):
        value, low, high = _ends_of(factor)
        if low or high:
            axes.plot([low or left, high or right], [y, y], color=LINES[0], linewidth=2)
        for end, mark, border in ((low, "<", left), (high, ">", right)):
            if (low or high) and not end:
                axes.plot([border], [y], mark, color=LINES[0], markersize=6, clip_on=False)
            elif end:
                axes.plot([end], [y], "|", color=LINES[0], markersize=7, markeredgewidth=1.5)
        if value:
            face = PAPER if factor.is_extrapolated else LINES[0]
            axes.plot([value], [y], "D", color=LINES[0], markersize=6, markerfacecolor=face)
    set_log_x_axis(axes)
    label = "; ".join(f"{label} {factor.factor:.3g}" for label, factor in found if factor.factor)
    caption = (
        "Left of the line: the arm needs fewer tokens. Diamonds: factors, empty if they are extrapolated; lines: "
        "95 % intervals, for each arm alone; arrows: the interval has no limit on this side."
    )
    return Plot(figure, "factors", f"Tokens to {baseline}’s end value, relative to {baseline}: {label}", caption)


def _ends_of(factor: TokenFactor) -> tuple[float | None, float | None, float | None]:
    """Return the factor and the ends of its interval, as far as they are known."""
    return finite(factor.factor), finite(factor.low), finite(factor.high)


def plot_differences(metric: MetricComparison, baseline: str, ordered: Sequence[Difference]) -> Plot | None:
    """Plot each arm's mean difference from the baseline with its repeated interval, and the difference of each seed."""
    plot = plot_forest(replace(metric, differences=list(ordered)), baseline, "differences")
    side = "left" if metric.lower_is_better else "right"
    caption = (
        f"Difference from {baseline}, paired by seed; {side} of the line is better. Diamonds: means; lines: repeated "
        "intervals, green or orange if the verdict is better or worse; dots: seeds."
    )
    return plot and replace(plot, caption=caption)


def plot_neutral_differences(metric: MetricComparison, baseline: str, name: str) -> Plot | None:
    """Plot the differences in a metric about which the study has no verdicts."""
    neutral = [replace(each, verdict="undecided") for each in metric.differences]
    plot = plot_forest(replace(metric, differences=neutral), baseline, name)
    side = "left" if metric.lower_is_better else "right"
    caption = f"{side.capitalize()} of the line is better. Diamonds: means; lines: intervals; dots: seeds. No claim."
    return plot and replace(plot, caption=caption)


def plot_late_curves(groups: Mapping[str, Sequence[RunRecord]], baseline: str, metric: str) -> Plot | None:
    """Plot the second half of the mean curves, with one panel for each arm that also shows the baseline."""
    by_tokens = all("tokens" in line for runs in groups.values() for run in runs for line in run.metrics)
    curves = {label: [validation_curve(run, metric, by_tokens) for run in runs] for label, runs in groups.items()}
    known = {label: found for label, runs in curves.items() if (found := [run for run in runs if len(run) > 1])}
    base = known.pop(baseline, None)
    if base is None or not known:
        return None
    figure, panels = create_grid(list(known), x_label="tokens, including stage 1" if by_tokens else "update")
    for axes, runs in zip(panels, known.values(), strict=True):
        axes.plot(*_late_mean(base), color=QUIET, linestyle="--", label=baseline)
        axes.plot(*_late_mean(runs), color=LINES[0], label="arm of the panel")
    panels[0].xaxis.set_major_locator(MaxNLocator(3, steps=TICK_STEPS))
    panels[0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tokens(value)))
    add_grid_legend(figure, panels[0])
    caption = f"{metric} in the second half of the runs with the longest horizon: means over seeds."
    return Plot(figure, "late-curves", f"{metric} of every arm against {baseline}", caption)


def _late_mean(runs: Sequence[Series]) -> tuple[np.ndarray, np.ndarray]:
    """Return the second half of the mean of curves, where all of them have values."""
    first, last = max(run[0][0] for run in runs), min(run[-1][0] for run in runs)
    grid = np.linspace((first + last) / 2, last, 60)
    values = [np.interp(grid, [x for x, _ in run], [value for _, value in run]) for run in runs]
    return grid, np.mean(values, axis=0)


def plot_power(result: StudyResult) -> Plot:
    """Plot the probability of a verdict over the size of the true difference, for the planned number of seeds."""
    options, planned = result.lock.options, result.planned
    deviations = dict(_deviations(planned.deviation, planned.observed_deviations))
    marks = {f"declared effect: {planned.effect:g}": (planned.effect, "-")}
    if options.delta is not None:
        marks[f"δ: {options.delta:g}"] = (options.delta, ":")
    figure, (axes,) = create_panels(
        [f"probability of “better” or “worse” with {planned.num_seeds} seeds"], height=2.3,
        legend_rows=len(deviations) + len(marks), x_label=f"size of the true difference in {options.metric}",
    )  # fmt: skip
    sizes = np.linspace(0, 2 * planned.effect, 200)
    power = power_curve(options.looks, planned.num_comparisons)
    for number, (label, deviation) in enumerate(deviations.items()):
        style = line_style(number)
        axes.plot(sizes, power(sizes / deviation), color=style.color, linestyle=style.dash,
                  label=label)  # fmt: skip
    for label, (size, dash) in marks.items():
        axes.axvline(size, color=INK, linestyle=dash, linewidth=1.0, label=label)
    axes.axhline(POWER_LEVEL, color=QUIET, linewidth=0.8)
    axes.set_ylim(0, 1.02)
    axes.set_xlim(0, 2 * planned.effect)
    add_legend(axes, 1)
    caption = (
        f"For one arm at the strictest level of Holm’s procedure with {planned.num_comparisons} comparisons, and looks "
        f"at {', '.join(map(str, options.looks))} seeds. The horizontal line is {POWER_LEVEL:g}."
    )
    label = f"Probability of a verdict over the size of the difference. At {planned.effect:g}: {planned.power:.2f}"
    return Plot(figure, "power", label, caption)


def _deviations(planned: float, observed: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Yield the planned deviation, and the smallest and the largest observed deviation, each with its description."""
    yield f"planned deviation: {planned:.3g}", planned
    known = sorted((value, label) for label, value in observed.items() if value > 0)
    names = ("smallest observed", "largest observed") if len(known) > 1 else ("observed",)
    for name, (value, label) in zip(names, [known[0], known[-1]] if known else [], strict=False):
        yield f"{name}: {value:.3g} ({shorten_name(label)})", value


@lru_cache
def power_curve(looks: tuple[int, ...], num_comparisons: int) -> Callable[[float | np.ndarray], np.ndarray]:
    """Return the power as a function of the effect in standard deviations, interpolated between some effects."""
    largest = (stats.t.isf(0.025 / num_comparisons, looks[-1] - 1) + 7.0) / math.sqrt(looks[-1])
    effects = np.linspace(largest / 1_000, largest, NUM_EFFECTS)
    powers = [planned_power(float(effect), looks, num_comparisons) for effect in effects]
    interpolator = PchipInterpolator(effects, powers)
    return lambda effect: np.asarray(interpolator(np.clip(effect, effects[0], largest)))


def _set_token_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.margins(x=0.07)
    low, high = axes.get_xlim()
    if high > 8 * low:
        axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0,) if high > 100 * low else (1.0, 3.0), numticks=6))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(3, steps=TICK_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_tokens(value)))
    axes.xaxis.set_minor_locator(NullLocator())
