"""Functions for plots that are embedded in an HTML page as SVG. A plot uses the colors and fonts of the page."""

import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

WIDTH = 4.3
"""Width of a plot in inches. If a screen has 400 pixels, a plot has 368, so text of 9 points is 10.7 pixels high."""
RIGHT_MARGIN, TITLE_HEIGHT, PANEL_GAP, LEGEND_ROW_HEIGHT = 0.15, 0.3, 0.38, 0.18
TICK_STEPS = [1, 2, 2.5, 5, 10]
"""Allowed steps between the ticks of an axis."""
MAX_LINEAR_RANGE = 10
"""Largest ratio of the losses of a plot that are shown on a linear axis."""
MAX_POINTS = 1_000
"""Approximate maximum number of points of a plotted curve. A reader could not distinguish more points."""

INK, QUIET, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
LINES = ("#010201", "#010202", "#010203", "#010204", "#010205", "#010206", "#010207", "#010208")
GOOD, BAD = "#020301", "#020302"
CSS_VARIABLES = {
    INK: "--ink", QUIET: "--quiet", GRID: "--rule", PAPER: "--paper", GOOD: "--good", BAD: "--bad",
    **{color: f"--line-{number}" for number, color in enumerate(LINES, 1)},
}  # fmt: skip
"""Dictionary from each placeholder color of a figure to the CSS variable that replaces it in the HTML page."""
Dash = str | tuple[int, tuple[float, ...]]
DASHES: tuple[Dash, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "svg.hashsalt": "wmtp", "text.parse_math": False, "axes.unicode_minus": True,
    "font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 9,
    "ytick.labelsize": 9, "legend.fontsize": 9, "axes.titlelocation": "left", "axes.titlecolor": INK,
    "text.color": INK, "axes.labelcolor": QUIET, "xtick.color": QUIET, "ytick.color": QUIET,
    "axes.edgecolor": QUIET, "axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "axes.facecolor": "none", "figure.facecolor": "none", "axes.grid": True, "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": GRID, "grid.linewidth": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 0, "xtick.major.width": 0.6,
    "legend.frameon": False, "legend.handlelength": 2.4, "legend.handletextpad": 0.5, "legend.columnspacing": 1.2,
    "legend.borderpad": 0, "legend.labelspacing": 0.25, "lines.linewidth": 1.5, "lines.markersize": 3.5,
    "lines.markeredgewidth": 0.8,
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """A figure with its name in the HTML page, a text alternative for screen readers, and a caption."""

    figure: Figure
    name: str
    label: str
    caption: str


@dataclass(frozen=True)
class LineStyle:
    """The color, dash pattern and marker of a curve."""

    color: str
    dash: Dash
    marker: str


def line_style(number: int) -> LineStyle:
    """Return the line style of a curve, given the number of the curve in its plot.

    Any two of the first thirty curves differ in at least two of the three attributes color, dash pattern and marker.
    """
    return LineStyle(LINES[number % len(LINES)], DASHES[number % len(DASHES)], MARKERS[number % len(MARKERS)])


@contextmanager
def plot_style() -> Iterator[None]:
    """Apply the style of the HTML pages to all figures that are created and saved in this context.

    Dollar signs are shown as they are, because matplotlib's math notation is turned off.
    """
    with mpl.rc_context(_STYLE):
        yield


def create_panels(
    titles: Sequence[str], *, height: float = 1.75, legend_rows: int = 0, left: float = 0.55, x_label: str = "update"
) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, which have equal heights and share one horizontal axis.

    The panels are placed one below the other. The margins do not depend on the tick labels, so that plots line up in
    the page.

    Args:
        titles: title of each panel.
        height: height of a panel in inches.
        legend_rows: number of legend rows for which space is reserved above the first panel.
        left: left margin in inches.
        x_label: label of the horizontal axis.
    """
    top_margin = (TITLE_HEIGHT if titles[0] else 0.08) + LEGEND_ROW_HEIGHT * legend_rows
    bottom_margin, width = 0.4 if x_label else 0.22, WIDTH - left - RIGHT_MARGIN
    total = top_margin + len(titles) * height + (len(titles) - 1) * PANEL_GAP + bottom_margin
    figure = Figure(figsize=(WIDTH, total))
    axes: list[Axes] = []
    for number, title in enumerate(titles):
        bottom = total - top_margin - (number + 1) * height - number * PANEL_GAP
        rectangle = (left / WIDTH, bottom / total, width / WIDTH, height / total)
        axes.append(figure.add_axes(rectangle, sharex=axes[0] if axes else None))
        legend_points = LEGEND_ROW_HEIGHT * 72 * legend_rows if number == 0 else 0
        axes[-1].set_title(title, pad=8 + legend_points, x=-left / width)
        axes[-1].tick_params(labelbottom=number == len(titles) - 1)
        axes[-1].grid(axis="x", visible=False)
        axes[-1].yaxis.set_major_locator(MaxNLocator(6, steps=TICK_STEPS, min_n_ticks=3))
    axes[-1].set_xlabel(x_label)
    return figure, axes


def set_integer_x_axis(axes: Axes) -> None:
    """Place the ticks of the horizontal axis at integers only."""
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=TICK_STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def set_log_y_axis(axes: Axes) -> None:
    """Make the vertical axis logarithmic if at least one plotted value is positive.

    Tick labels are plain numbers instead of powers of ten. If the axis covers only a few powers of ten, then each power
    of ten has more ticks.
    """
    if not np.isfinite(axes.dataLim.minposy):
        return
    axes.set_yscale("log", nonpositive="mask")
    _set_log_ticks(axes.yaxis, *axes.get_ylim())


def set_loss_axis(axes: Axes) -> None:
    """Make the vertical axis of losses logarithmic if they are positive and differ by a factor over `MAX_LINEAR_RANGE`.

    On a linear axis, the small losses of such curves could not be distinguished.
    """
    low, high = axes.dataLim.intervaly
    if low > 0 and high > MAX_LINEAR_RANGE * low:
        set_log_y_axis(axes)


def set_log_x_axis(axes: Axes) -> None:
    """Make the horizontal axis logarithmic. Its ticks follow the same rules as those of `set_log_y_axis`."""
    axes.set_xscale("log", nonpositive="mask")
    _set_log_ticks(axes.xaxis, *axes.get_xlim())


def _set_log_ticks(axis: Axis, low: float, high: float) -> None:
    subs = (1.0,) if high > 300 * low else (1.0, 3.0) if high > 12 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    if high < 2.5 * low:
        axis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS, min_n_ticks=3))
    else:
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def add_legend(axes: Axes, columns: int) -> None:
    """Add the legend above a panel, in the space reserved by `create_panels`."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3, ncols=columns)


def downsample_indices(values: np.ndarray) -> np.ndarray:
    """Return the indices of the points of a curve that are plotted.

    A curve with more than `MAX_POINTS` points is divided into stretches. Only the minimum and maximum of each stretch,
    and the first and last point of the curve, are plotted.
    """
    if len(values) <= MAX_POINTS:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), MAX_POINTS // 2)
    kept = [(part[np.argmin(values[part])], part[np.argmax(values[part])]) for part in stretches]
    return np.unique(np.concatenate([[0], np.ravel(kept), [len(values) - 1]]))


def to_svg(plot: Plot) -> Markup:
    """Return the figure of a plot as SVG that can be embedded in an HTML page.

    Ids that are never referenced are removed. The other ids get the name of the plot as a prefix, so that the ids of
    several plots in one page differ. Placeholder colors are replaced with CSS variables of the page.
    """
    buffer = io.BytesIO()
    plot.figure.savefig(buffer, format="svg")
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', ElementTree.tostring(root, encoding="unicode")))
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]
        element.attrib = {
            name.rpartition("}")[2]: _rewrite_attribute(name, value, plot.name)
            for name, value in element.attrib.items()
            if name != "id" or value in used
        }
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": plot.label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _rewrite_attribute(name: str, value: str, figure: str) -> str:
    if name == "id":
        return f"{figure}-{value}"
    if name == "style":
        value = re.sub(r"#[0-9a-f]{6}", lambda found: _css_variable(found[0]), value)
        value = re.sub(r"font: (?:(\d+) )?([\d.]+px)[^;]*", r"font-size: \2", value)
        value = re.sub(r"font-family:[^;]*;?", "", value)
    return re.sub(r"(^|url\()#", rf"\g<1>#{figure}-", value) if name.endswith("href") or "url(#" in value else value


def _css_variable(color: str) -> str:
    return f"var({CSS_VARIABLES[color]})" if color in CSS_VARIABLES else color


Series = Sequence[tuple[float, float]]
TRAINING_STYLE: dict[str, Any] = {"linestyle": "-", "marker": "", "linewidth": 1.0}
"""Matplotlib options for training curves. A training curve is a thin line without markers."""
MAX_MARKED_POINTS = 40
"""Maximum number of points of a curve for which each point has a marker. Longer curves have no markers."""


def plot_curve(axes: Axes, series: Series, number: int, **options: Any) -> None:
    """Plot the finite values of a curve. Each other value is shown as a cross at the upper border.

    Args:
        axes: panel in which the curve is plotted.
        series: pairs (step, value).
        number: number of the curve, which determines its style by `line_style`.
        options: options for matplotlib's `Axes.plot`, which take precedence over the style.
    """
    steps, values = (np.array([pair[part] for pair in series], float) for part in (0, 1))
    finite = np.isfinite(values)
    kept = downsample_indices(values[finite])
    style = line_style(number)
    marker = style.marker if len(kept) <= MAX_MARKED_POINTS else ""
    defaults: dict[str, Any] = {"color": style.color, "linestyle": style.dash, "marker": marker}
    axes.plot(steps[finite][kept], values[finite][kept], **(defaults | options))
    if not finite.all():
        axes.plot(
            steps[~finite], np.full((~finite).sum(), 0.96), "x", color=BAD, transform=axes.get_xaxis_transform(),
            clip_on=False, markersize=5, markeredgewidth=1.4,
        )  # fmt: skip


def plot_training_and_validation(axes: Axes, training: Series, validation: Series) -> None:
    """Plot the training curve as a thin line, and the validation curve as a strong line."""
    plot_curve(axes, training, 5, label="training", **TRAINING_STYLE)
    plot_curve(axes, validation, 0, label="validation")


def finish_axes(axes: Axes, columns: int = 0) -> None:
    """Place the ticks of the horizontal axis at integers, and add a legend with `columns` columns.

    No legend is added if `columns` is 0.
    """
    set_integer_x_axis(axes)
    if columns:
        add_legend(axes, columns)


def nonfinite_caption(*curves: Series) -> str:
    """Return a caption that explains the crosses in a plot, or an empty text if all values are finite."""
    count = sum(not math.isfinite(value) for series in curves for _, value in series)
    return f" Crosses: not finite ({count})." if count else ""


def metric_series(lines: Iterable[Mapping[str, Any]], metric: str) -> Series:
    """Return the pairs (step, value) of a metric from lines of metrics.jsonl. Lines without the metric are skipped."""
    return [(int(line["step"]), float(line[metric])) for line in lines if line.get(metric) is not None]
