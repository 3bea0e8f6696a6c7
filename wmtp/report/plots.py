"""Drawings that stand in a page: SVG whose colours and fonts are the page's, in light and in dark."""

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

WIDTH = 5.0
"""Inches. A narrow screen shows an inch as 72 of its pixels, so that text of 9 points stays legible."""
RIGHT, HEAD, GAP, LEGEND_ROW = 0.15, 0.3, 0.38, 0.18
STEPS = [1, 2, 2.5, 5, 10]
"""Between the marks of an axis."""
MOST_POINTS = 1_000
"""A curve is not wider than so many pixels."""

INK, QUIET, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
LINES = ("#010201", "#010202", "#010203", "#010204", "#010205", "#010206")
GOOD, BAD = "#020301", "#020302"
COLOURS = {
    INK: "--ink", QUIET: "--quiet", GRID: "--rule", PAPER: "--paper", GOOD: "--good", BAD: "--bad",
    **{colour: f"--line-{number}" for number, colour in enumerate(LINES, 1)},
}  # fmt: skip
"""Colours that stand for the page's own, by the names these have there."""
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
class Drawing:
    """A figure with its name in the page, what it shows in words for who cannot see it, and its caption."""

    figure: Figure
    name: str
    label: str
    caption: str


@dataclass(frozen=True)
class Look:
    """How a curve is told from others."""

    colour: str
    dash: Dash
    marker: str


def look(number: int) -> Look:
    """The look of the curve of that number; any two parts of it tell thirty curves apart."""
    return Look(LINES[number % len(LINES)], DASHES[number % len(DASHES)], MARKERS[number % len(MARKERS)])


@contextmanager
def page_style() -> Iterator[None]:
    """Within, figures are drawn in the page's style; text is taken as it stands, whatever signs it holds."""
    with mpl.rc_context(_STYLE):
        yield


def panels(
    titles: Sequence[str], *, height: float = 1.75, legend_rows: int = 0, left: float = 0.55, x_label: str = "update"
) -> tuple[Figure, list[Axes]]:
    """A figure of panels one below the other, each as high and under its title, with one horizontal axis.

    Margins are fixed, so that drawings line up in the page; `legend_rows` leaves room above the first panel.
    """
    head = (HEAD if titles[0] else 0.08) + LEGEND_ROW * legend_rows
    foot, width = 0.4 if x_label else 0.22, WIDTH - left - RIGHT
    total = head + len(titles) * height + (len(titles) - 1) * GAP + foot
    figure = Figure(figsize=(WIDTH, total))
    axes: list[Axes] = []
    for number, title in enumerate(titles):
        bottom = total - head - (number + 1) * height - number * GAP
        place = (left / WIDTH, bottom / total, width / WIDTH, height / total)
        axes.append(figure.add_axes(place, sharex=axes[0] if axes else None))
        room = LEGEND_ROW * 72 * legend_rows if number == 0 else 0
        axes[-1].set_title(title, pad=8 + room, x=-left / width)
        axes[-1].tick_params(labelbottom=number == len(titles) - 1)
        axes[-1].grid(axis="x", visible=False)
        axes[-1].yaxis.set_major_locator(MaxNLocator(6, steps=STEPS, min_n_ticks=3))
    axes[-1].set_xlabel(x_label)
    return figure, axes


def whole_numbers(axes: Axes) -> None:
    """Mark a horizontal axis that counts."""
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=STEPS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def logarithmic(axes: Axes) -> None:
    """A logarithmic vertical axis with plain numbers, and enough of them where it spans less than a power of ten.

    It stays as it is where nothing is above 0.
    """
    if not np.isfinite(axes.dataLim.minposy):
        return
    axes.set_yscale("log", nonpositive="mask")
    _mark_logarithmic(axes.yaxis, *axes.get_ylim())


def logarithmic_across(axes: Axes) -> None:
    """A logarithmic horizontal axis, alike."""
    axes.set_xscale("log", nonpositive="mask")
    _mark_logarithmic(axes.xaxis, *axes.get_xlim())


def _mark_logarithmic(axis: Axis, low: float, high: float) -> None:
    subs = (1.0,) if high > 300 * low else (1.0, 3.0) if high > 12 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    if high < 2.5 * low:
        axis.set_major_locator(MaxNLocator(5, steps=STEPS, min_n_ticks=3))
    else:
        axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def legend(axes: Axes, columns: int) -> None:
    """The legend above a panel, in the room that was left for it."""
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.3, ncols=columns)


def thinned(values: np.ndarray) -> np.ndarray:
    """Which of a curve's points to draw: of a long one the lowest and highest of each stretch, so that peaks stay."""
    if len(values) <= MOST_POINTS:
        return np.arange(len(values))
    stretches = np.array_split(np.arange(len(values)), MOST_POINTS // 2)
    kept = [(part[np.argmin(values[part])], part[np.argmax(values[part])]) for part in stretches]
    return np.unique(np.concatenate([[0], np.ravel(kept), [len(values) - 1]]))


def inline(drawing: Drawing) -> Markup:
    """The figure as SVG to stand in HTML: no ids but those it uses, under the drawing's name; nothing from outside."""
    buffer = io.BytesIO()
    drawing.figure.savefig(buffer, format="svg")
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    used = set(re.findall(r'(?:url\(#|href="#)([\w-]+)', ElementTree.tostring(root, encoding="unicode")))
    for element in root.iter():
        element.tag = element.tag.partition("}")[2]
        element.attrib = {
            name.rpartition("}")[2]: _rewritten(name, value, drawing.name)
            for name, value in element.attrib.items()
            if name != "id" or value in used
        }
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": drawing.label}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _rewritten(name: str, value: str, figure: str) -> str:
    if name == "id":
        return f"{figure}-{value}"
    if name == "style":
        value = re.sub(r"#[0-9a-f]{6}", lambda found: _colour(found[0]), value)
        value = re.sub(r"font: (?:(\d+) )?([\d.]+px)[^;]*", r"font-size: \2", value)
        value = re.sub(r"font-family:[^;]*;?", "", value)
    return re.sub(r"(^|url\()#", rf"\g<1>#{figure}-", value) if name.endswith("href") or "url(#" in value else value


def _colour(colour: str) -> str:
    return f"var({COLOURS[colour]})" if colour in COLOURS else colour


Series = Sequence[tuple[float, float]]
TRAINING: dict[str, Any] = {"linestyle": "-", "marker": "", "linewidth": 1.0}
"""How training looks beside validation: each of its points is one batch."""
FEW = 40
"""Curves of no more points show each."""


def curve(axes: Axes, series: Series, style: int, **options: Any) -> None:
    """A line of the style's colour, dashes and marker; what is not finite is a cross at the upper border."""
    places, values = (np.array([pair[part] for pair in series], float) for part in (0, 1))
    finite = np.isfinite(values)
    kept = thinned(values[finite])
    own = look(style)
    marker = own.marker if len(kept) <= FEW else ""
    drawn: dict[str, Any] = {"color": own.colour, "linestyle": own.dash, "marker": marker}
    axes.plot(places[finite][kept], values[finite][kept], **(drawn | options))
    if not finite.all():
        axes.plot(
            places[~finite], np.full((~finite).sum(), 0.96), "x", color=BAD, transform=axes.get_xaxis_transform(),
            clip_on=False, markersize=5, markeredgewidth=1.4,
        )  # fmt: skip


def training_and_validation(axes: Axes, training: Series, validation: Series) -> None:
    """A quiet line of training and a strong one of validation."""
    curve(axes, training, 5, label="training", **TRAINING)
    curve(axes, validation, 0, label="validation")


def finish(axes: Axes, columns: int = 0) -> None:
    """Count along the horizontal axis, and put the legend above, if there is to be one."""
    whole_numbers(axes)
    if columns:
        legend(axes, columns)


def crosses(*every: Series) -> str:
    """What the crosses in a drawing mean, if there are any."""
    count = sum(not math.isfinite(value) for series in every for _, value in series)
    return f" Crosses: not finite ({count})." if count else ""


def series_of(lines: Iterable[Mapping[str, Any]], metric: str) -> Series:
    """A metric's values with their steps."""
    return [(int(line["step"]), float(line[metric])) for line in lines if line.get(metric) is not None]
