"""Tables that show a comparison in a terminal with 80 columns."""

from collections.abc import Sequence
from statistics import mean

from rich import box
from rich.console import Console
from rich.table import Table

from wmtp.report.measures import GroupMeans
from wmtp.report.results import Comparison, MetricComparison, TokensToTarget
from wmtp.statistics.power import SEEDS_CAP

ABSENT = "-"


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Print all tables and notes of a comparison."""
    for metric in comparison.metrics:
        console.print(values_table(metric))
        console.print(differences_table(metric, comparison.baseline))
        console.print(pairs_table(metric))
        if any(each.mcnemar is not None for each in metric.differences):
            console.print(problems_table(metric))
    if comparison.tokens_to_target:
        console.print(tokens_to_target_table(comparison.tokens_to_target))
        if sentence := pretrain_sentence(comparison.baseline, comparison.tokens_to_target):
            console.print(sentence, highlight=False)
    for means in comparison.means:
        console.print(means_table(means))
    for note in comparison.notes:
        console.print(f"- {note}", highlight=False)


def values_table(metric: MetricComparison) -> Table:
    """Return a table with the number of runs, the mean and the standard deviation of a metric in each group."""
    direction = "lower" if metric.lower_is_better else "higher"
    title, columns = f"{metric.metric} of the {metric.at}; {direction} is better", ["runs", "mean", "deviation"]
    with_failed = any(group.lost.failed for group in metric.groups)
    table = new_table(title, *columns, *(["without a value"] if with_failed else []))
    for group in metric.groups:
        deviation = ABSENT if group.deviation is None else f"± {group.deviation:.3g}"
        row = [group.label, str(len(group.values_by_seed)), f"{group.mean:.5g}", deviation]
        table.add_row(*row, *([str(group.lost) if group.lost.failed else ABSENT] if with_failed else []))
    return table


def differences_table(metric: MetricComparison, baseline: str) -> Table:
    """Return a table of each group's mean difference from the baseline, with its interval, p-value and verdict."""
    corrected = f"p corrected for {format_count(len(metric.differences), 'comparison')}, intervals not"
    table = new_table(f"Difference from {baseline}, paired by seed; {corrected}", "difference", "95 % interval", "p")
    table.add_column("verdict", min_width=13, max_width=13)
    for each in metric.differences:
        table.add_row(each.label, f"{each.mean:+.3g}", format_interval(each.low, each.high, "+.3g"),
                      format_p(each.p_holm), each.verdict)  # fmt: skip
    return table


def pairs_table(metric: MetricComparison) -> Table:
    """Return a table with the number of pairs, the number of pairs needed, and the p-values of other tests."""
    title = "Pairs of runs, pairs needed for 80 % power, and other tests, not corrected"
    table = new_table(title, "pairs", "needed", "signed-rank p", "permutation p")
    for each in metric.differences:
        table.add_row(each.label, str(len(each.pairs)), format_seeds_needed(each.seeds_needed), format_p(each.wilcoxon),
                      format_p(each.permutation))  # fmt: skip
    return table


def problems_table(metric: MetricComparison) -> Table:
    """Return a table of the numbers of test problems that each model won and lost, with the p-value of McNemar's test.

    A model wins a test problem if it has a higher pass rate on the problem than the baseline's model.
    """
    table = new_table("Problems that one of the two models solved", "won", "lost", "tied", "McNemar's p")
    for each in metric.differences:
        if (test := each.mcnemar) is not None:
            counts = [str(count) for count in (test.won, test.lost, test.tied)]
            table.add_row(each.label, *counts, format_p(test.p))
    return table


def tokens_to_target_table(results: list[TokensToTarget]) -> Table:
    """Return a table of the tokens that each group needed to reach the baseline's best loss.

    The numbers of tokens are divided by the number of tokens that the baseline needed.
    """
    title = f"Mid-run reading: tokens to the baseline's best {results[0].metric}, relative to the baseline"
    table = new_table(title, "median", "95 % interval", "never reached")
    for each in results:
        between = "∞" if each.low is None else f"{each.low:.3g} to {format_ratio(each.high)}"
        never = f"{each.never} of {len(each.pairs)}"
        table.add_row(each.label, format_ratio(each.ratio), between if each.has_interval else ABSENT, never)
    return table


def means_table(means: GroupMeans) -> Table:
    """Return a table of the mean of each measure in each group."""
    table = new_table(f"{means.title}: mean of each group", *(column_title(name) for name in means.measures))
    for label, values in means.means.items():
        table.add_row(label, *(ABSENT if value is None else f"{value:.3g}" for value in values))
    return table


def column_title(measure: str) -> str:
    """Return the name of a measure as a title that can be broken between words.

    >>> column_title("val/sampled_pass_rate")
    'sampled pass rate'
    """
    return measure.removeprefix("val/").replace("_", " ")


def pretrain_sentence(baseline: str, results: Sequence[TokensToTarget]) -> str | None:
    """Return a sentence on the mean number of stage 1 tokens of each group, or None if no group has a stage 1."""
    baseline_tokens = mean(pair.baseline_stage_tokens for pair in results[0].pairs)
    tokens_by_label = {result.label: mean(pair.stage_tokens for pair in result.pairs) for result in results} | {
        baseline: baseline_tokens
    }
    if not any(tokens_by_label.values()):
        return None
    by_count: dict[int, list[str]] = {}
    for label, count in tokens_by_label.items():
        by_count.setdefault(round(count), []).append(label)
    parts = [f"{count:,} in {'; '.join(labels)}" for count, labels in sorted(by_count.items())]
    return f"These include the tokens of stage 1: {' – '.join(parts)}."


def new_table(title: str, *columns: str) -> Table:
    """Return a table without rows, with a column for group labels and right-aligned columns for numbers."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("group", overflow="fold", min_width=8)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=column == "95 % interval", overflow="fold")
    return table


def format_count(number: int, name: str) -> str:
    """Return a number with a noun in the singular or plural.

    >>> format_count(1, "pair"), format_count(2, "pair")
    ('1 pair', '2 pairs')
    """
    return f"{number} {name}{'' if number == 1 else 's'}"


def format_interval(low: float | None, high: float | None, form: str) -> str:
    """Return an interval as text, or a dash if an end of the interval is None."""
    return ABSENT if low is None or high is None else f"{low:{form}} to {high:{form}}"


def format_p(p: float | None) -> str:
    """Return a p-value as text, or a dash for None."""
    if p is None:
        return ABSENT
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def format_seeds_needed(needed: int | None) -> str:
    """Return the number of seeds that a test needs as text, or a dash for None."""
    if needed is None:
        return ABSENT
    return f">{SEEDS_CAP:,}" if needed > SEEDS_CAP else str(needed)


def format_ratio(value: float | None) -> str:
    """Return a ratio as text. None stands for an infinite ratio and gives the infinity sign."""
    return "∞" if value is None else f"{value:.3g}"
