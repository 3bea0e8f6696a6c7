"""Curves over the updates, and what stands around them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from wmtp.report.drawing import BAD, legend, look, thinned, whole_numbers

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
