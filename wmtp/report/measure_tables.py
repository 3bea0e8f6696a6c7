"""HTML tables of measures: of a run's weights, means in groups of runs, and the tokens to the baseline's best loss."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from wmtp.report import comparison_plots
from wmtp.report.html import ABSENT, breakable, bullet_list, details, figures, paragraph, table
from wmtp.report.measures import WEIGHT_MEASURES, GroupMeans, weights_and_values
from wmtp.report.results import TokensToTarget
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


def tokens_to_target_tables(results: list[TokensToTarget], baseline: str) -> Markup:
    """Return tables and a plot of the tokens that each group needed to reach the baseline's best loss."""
    if not results:
        return Markup()
    rows = [
        (breakable(each.label), len(each.pairs), _format_ratio(each.ratio), _ratio_interval(each), each.never)
        for each in results
    ]
    pairs = [
        (breakable(each.label), pair.seed, f"{pair.target:.4g}", f"{pair.baseline_tokens:,.0f}",
         "never" if pair.tokens is None else f"{pair.tokens:,.0f}", f"{pair.baseline_stage_tokens:,}",
         f"{pair.stage_tokens:,}")
        for each in results for pair in each.pairs
    ]  # fmt: skip
    each_seed = table(
        [
            "group", "seed", f"best loss of {baseline}", "tokens of the baseline", "tokens of the group",
            "stage 1 tokens of the baseline", "stage 1 tokens of the group",
        ],
        pairs, numbers=range(1, 7), names=[0],
    )  # fmt: skip
    introduction = (
        f"Tokens until {results[0].metric} reached the best value of {baseline}’s run with the same seed, divided by "
        "the tokens of that run; below 1 is faster. Tokens of stage 1 are included. This reading is made in the middle "
        "of a run, at a learning rate that has not decayed, so it can differ from the ends of shorter runs."
    )
    head = ["group", "pairs", "median ratio", "95 % interval", "never reached"]
    return (
        paragraph(introduction)
        + table(head, rows, numbers=range(1, 5), names=[0])
        + figures([comparison_plots.plot_tokens_to_target(results, baseline)])
        + details("Seed by seed", each_seed, printed=True)
    )


def _ratio_interval(each: TokensToTarget) -> str:
    if not each.has_interval:
        return ABSENT
    return _format_ratio(None) if each.low is None else f"{_format_ratio(each.low)} to {_format_ratio(each.high)}"


def _format_ratio(value: float | None) -> str:
    return "∞" if value is None else f"{value:.3g}"
