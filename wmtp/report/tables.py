"""A comparison as tables that fit a terminal of 80 columns."""

from collections.abc import Sequence
from statistics import mean

from rich import box
from rich.console import Console
from rich.table import Table

from wmtp.report.results import Comparison, MetricComparison, Reach
from wmtp.report.statistics import SEEDS_CAP

NOTHING = "-"


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print everything that a comparison says."""
    for metric in comparison.metrics:
        console.print(values_table(metric))
        console.print(differences_table(metric, comparison.baseline))
        console.print(pairs_table(metric))
        if any(each.mcnemar is not None for each in metric.differences):
            console.print(problems_table(metric))
    if comparison.reach:
        console.print(reach_table(comparison.reach))
        if sentence := stages(comparison.baseline, comparison.reach):
            console.print(sentence, highlight=False)
    for note in comparison.notes:
        console.print(f"- {note}", highlight=False)


def values_table(metric: MetricComparison) -> Table:
    """Each group's mean over seeds."""
    direction = "lower" if metric.lower_is_better else "higher"
    title, columns = f"{metric.metric} of the {metric.at}; {direction} is better", ["runs", "mean", "deviation"]
    with_lost = any(group.lost.failed for group in metric.groups)
    table = table_of(title, *columns, *(["without a value"] if with_lost else []))
    for group in metric.groups:
        deviation = NOTHING if group.deviation is None else f"± {group.deviation:.3g}"
        row = [group.label, str(len(group.values_by_seed)), f"{group.mean:.5g}", deviation]
        table.add_row(*row, *([str(group.lost) if group.lost.failed else NOTHING] if with_lost else []))
    return table


def differences_table(metric: MetricComparison, baseline: str) -> Table:
    """Each group less the baseline, seed by seed, and what that shows."""
    corrected = f"p corrected for {counted(len(metric.differences), 'comparison')}, intervals not"
    table = table_of(f"Less {baseline}, by seed; {corrected}", "difference", "95 % interval", "p")
    table.add_column("verdict", min_width=13, max_width=13)
    for each in metric.differences:
        table.add_row(each.label, f"{each.mean:+.3g}", interval(each.low, each.high, "+.3g"), p_value(each.p_holm),
                      each.verdict)  # fmt: skip
    return table


def pairs_table(metric: MetricComparison) -> Table:
    """How many pairs there are and would have to be, and the signed-rank test."""
    title = "Pairs, those needed to show this difference with 80 % power, and another test"
    table = table_of(title, "pairs", "needed", "signed-rank p", "by Holm")
    for each in metric.differences:
        table.add_row(each.label, str(len(each.pairs)), seeds(each.seeds_needed), p_value(each.wilcoxon),
                      p_value(each.wilcoxon_holm))  # fmt: skip
    return table


def problems_table(metric: MetricComparison) -> Table:
    """The test problems that more seeds of one side solved, by McNemar's test."""
    table = table_of("Problems that more seeds solved", "won", "lost", "as many", "McNemar's p", "by Holm")
    for each in metric.differences:
        if (test := each.mcnemar) is not None:
            counts = [str(count) for count in (test.won, test.lost, test.tied)]
            table.add_row(each.label, *counts, p_value(test.p), p_value(each.mcnemar_holm))
    return table


def reach_table(reaches: list[Reach]) -> Table:
    """Tokens to the baseline's best, as ratios."""
    title = f"Tokens to the baseline's best {reaches[0].metric}, over those of the baseline"
    table = table_of(title, "median", "95 % interval", "never reached")
    for each in reaches:
        between = "∞" if each.low is None else f"{each.low:.3g} to {ratio(each.high)}"
        never = f"{each.never} of {len(each.pairs)}"
        table.add_row(each.label, ratio(each.ratio), between if each.has_interval else NOTHING, never)
    return table


def stages(baseline: str, reaches: Sequence[Reach]) -> str | None:
    """How many of the tokens stages before the training took, a mean for each group; None: there were none."""
    of_baseline = mean(pair.baseline_stage_tokens for pair in reaches[0].pairs)
    taken = {reach.label: mean(pair.stage_tokens for pair in reach.pairs) for reach in reaches} | {
        baseline: of_baseline
    }
    if not any(taken.values()):
        return None
    by_count: dict[int, list[str]] = {}
    for label, count in taken.items():
        by_count.setdefault(round(count), []).append(label)
    parts = [f"{count:,} in {'; '.join(labels)}" for count, labels in sorted(by_count.items())]
    return f"These count the tokens of the stage before the training: {' – '.join(parts)}."


def table_of(title: str, *columns: str) -> Table:
    """A table whose first column are groups, and all others numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("group", overflow="fold", min_width=8)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=column == "95 % interval", overflow="fold")
    return table


def counted(number: int, name: str) -> str:
    """A number of things.

    >>> counted(1, "pair"), counted(2, "pair")
    ('1 pair', '2 pairs')
    """
    return f"{number} {name}{'' if number == 1 else 's'}"


def interval(low: float | None, high: float | None, form: str) -> str:
    """The ends of an interval, if there is one."""
    return NOTHING if low is None or high is None else f"{low:{form}} to {high:{form}}"


def p_value(p: float | None) -> str:
    """A p-value as it is printed."""
    if p is None:
        return NOTHING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def seeds(needed: int | None) -> str:
    """How many seeds show a difference."""
    if needed is None:
        return NOTHING
    return f">{SEEDS_CAP:,}" if needed > SEEDS_CAP else str(needed)


def ratio(value: float | None) -> str:
    """A ratio; None is infinite."""
    return "∞" if value is None else f"{value:.3g}"
