"""HTML tables of the measures of a run's weights, and of the means of measures in groups of runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from wmtp.report.html import ABSENT, breakable, bullet_list, paragraph, table
from wmtp.report.measures import WEIGHT_MEASURES, GroupMeans, weights_and_values
from wmtp.report.tables import column_title


def weights_table(summary: Mapping[str, Any]) -> Markup:
    """Return a table of the measures of weights in the content of summary.json; empty markup if there are none."""
    measured = weights_and_values(summary)
    if not measured:
        return Markup()
    rows = [
        (WEIGHT_MEASURES[name].description, f"{value:.3f}", WEIGHT_MEASURES[name].chance)
        for name, value in measured.items()
    ]
    introduction = (
        "Do low weights of the last model identify harmful tokens? A token is compared with tokens of its own "
        "solution. The first decisive token is the one at which a solution becomes wrong; decisive tokens after it are "
        "left out. 1 is perfect."
    )
    return paragraph(introduction) + table(["measure", "value", "chance"], rows, numbers=[1], names=[0, 2])


def means_tables(means: Sequence[GroupMeans]) -> Markup:
    """Return a table for each kind of measures, with the meanings of the measures of weights."""
    body = Markup()
    for each in means:
        rows = [
            [breakable(label), *(ABSENT if value is None else f"{value:.3g}" for value in values)]
            for label, values in each.means.items()
        ]
        head = ["group", *(column_title(name) for name in each.measures)]
        body += paragraph(f"{each.title}: means over the runs of each group, not tested.")
        body += table(head, rows, numbers=range(1, len(head)), names=[0])
        body += bullet_list(
            f"{column_title(name)}: {WEIGHT_MEASURES[name].description}; {WEIGHT_MEASURES[name].chance} is chance"
            for name in each.measures
            if name in WEIGHT_MEASURES
        )
    return body
