"""The section of a page that shows the tokens with which each group reached the baseline's best loss."""

from markupsafe import Markup

from wmtp.report import comparison_plots
from wmtp.report.html import ABSENT, breakable, details, figures, paragraph, table
from wmtp.report.results import TokensToTarget


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
