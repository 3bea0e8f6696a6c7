"""Figures with many small panels that share their axes, one for each arm of a study."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from wmtp.report.plots import LEGEND_ROW_HEIGHT, QUIET, TICK_STEPS, TITLE_HEIGHT, WIDTH

LEFT, RIGHT, COLUMN_GAP, PANEL_HEIGHT, ROW_GAP, BOTTOM = 0.55, 0.12, 0.16, 1.05, 0.4, 0.42
"""Sizes of a grid of small panels, in inches."""
MAX_TITLE_LETTERS = 22


def create_grid(titles: Sequence[str], *, x_label: str) -> tuple[Figure, list[Axes]]:
    """Return a figure and its panels, which share both axes and are placed in two columns."""
    columns = min(2, len(titles))
    rows, top = math.ceil(len(titles) / columns), TITLE_HEIGHT + LEGEND_ROW_HEIGHT + 0.1
    width = (WIDTH - LEFT - RIGHT - (columns - 1) * COLUMN_GAP) / columns
    height = PANEL_HEIGHT if columns > 1 else 2 * PANEL_HEIGHT
    total = top + rows * height + (rows - 1) * ROW_GAP + BOTTOM
    figure = Figure(figsize=(WIDTH, total))
    panels: list[Axes] = []
    for number, title in enumerate(titles):
        row, column = divmod(number, columns)
        left, bottom = LEFT + column * (width + COLUMN_GAP), total - top - (row + 1) * height - row * ROW_GAP
        rectangle = (left / WIDTH, bottom / total, width / WIDTH, height / total)
        shared = panels[0] if panels else None
        panels.append(figure.add_axes(rectangle, sharex=shared, sharey=shared))
        panels[-1].set_title(shorten_name(title), pad=5)
        panels[-1].tick_params(labelbottom=number + columns >= len(titles), labelleft=column == 0)
        panels[-1].grid(axis="x", visible=False)
    panels[0].yaxis.set_major_locator(MaxNLocator(4, steps=TICK_STEPS, min_n_ticks=3))
    figure.text((LEFT + (WIDTH - LEFT - RIGHT) / 2) / WIDTH, 0.04 / total, x_label, color=QUIET,
                horizontalalignment="center", verticalalignment="bottom")  # fmt: skip
    return figure, panels


def add_grid_legend(figure: Figure, axes: Axes) -> None:
    """Add a legend above all panels, in the space that `create_grid` reserves."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(LEFT / WIDTH, 1), borderaxespad=0.5, ncols=2)


def shorten_name(name: str) -> str:
    """Return a name without its middle if it is too long for the title of a panel.

    >>> shorten_name("critic"), shorten_name("implicit_reward_of_a_large_teacher")
    ('critic', 'implicit_r…rge_teacher')
    """
    half = MAX_TITLE_LETTERS // 2
    return name if len(name) <= MAX_TITLE_LETTERS else f"{name[: half - 1]}…{name[-half:]}"
