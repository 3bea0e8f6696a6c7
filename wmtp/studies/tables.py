"""Tables that show the results of a study in a terminal with 80 columns, and the rows that its page shows too."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from rich import box
from rich.console import Console
from rich.table import Table

from wmtp.report.results import Difference, MetricComparison
from wmtp.report.tables import ABSENT, format_count, format_interval, format_seeds_needed
from wmtp.statistics.power import SEEDS_CAP, seeds_needed, seeds_needed_for_equivalence
from wmtp.statistics.token_factor import TokenFactor
from wmtp.studies.options import StudyOptions
from wmtp.studies.plan import describe_settings
from wmtp.studies.results import FINAL_VERDICTS, ArmSearch, StudyResult, Trial

INTERVAL_TEXT = (
    "The repeated interval holds at every look, for this arm, at the level of Holm's step. < δ: whether the difference "
    "is shown to be within ± δ. More: seeds that a verdict still needs if the true difference is the observed one."
)
FACTOR_TEXT = (
    "Below 1, the arm needs fewer tokens than the baseline. Extrapolated: seeds for which this number lies outside of "
    "the arm's horizons."
)
MAX_HORIZONS = 3
"""Maximum number of horizons for which a terminal with 80 columns shows a column."""


@dataclass(frozen=True)
class ArmRow:
    """The results for one arm, as far as the table of verdicts shows them."""

    label: str
    verdict: str
    difference: Difference | None
    """Difference from the baseline at the longest horizon, or None if no seed has a run of both."""
    factor: TokenFactor | None
    is_open: bool
    """Whether the arm has no final verdict and judging seeds are left."""
    more_seeds: str
    """Number of seeds that are still needed for a verdict; empty if none is needed or no seed was used."""


def primary_metric(result: StudyResult) -> MetricComparison | None:
    """Return the comparison in the metric that the verdicts are about, or None if nothing is compared yet."""
    return result.comparison.metrics[0] if result.comparison else None


def arm_rows(result: StudyResult) -> list[ArmRow]:
    """Return a row for each arm except the baseline. The best difference is first; arms without one are last."""
    metric = primary_metric(result)
    differences = {each.label: each for each in metric.differences} if metric else {}
    factors = {each.label: each.factor for each in result.horizons}
    sign = 1 if metric is None or metric.lower_is_better else -1
    rows = []
    for label in result.lock.options.others:
        found = differences.get(label)
        is_open = label in result.open_arms
        verdict = found.verdict if found else "no runs yet" if is_open else "no result"
        more = "" if found is None or verdict in FINAL_VERDICTS else describe_more_seeds(found, result.lock.options)
        rows.append(ArmRow(label, verdict, found, factors.get(label), is_open, more))
    return sorted(rows, key=lambda row: math.inf if row.difference is None else sign * row.difference.mean)


def describe_more_seeds(difference: Difference, options: StudyOptions) -> str:
    """Return how many more seeds an arm needs for any verdict, if its observed difference is the true one."""
    values, number = list(difference.pairs.values()), len(options.others)
    if len(values) < 2:
        return "unknown"
    center, deviation = mean(values), stdev(values)
    candidates = [seeds_needed(center, deviation, number, len(values))]
    if options.delta is not None:
        candidates.append(seeds_needed_for_equivalence(center, deviation, options.delta, number))
    known = [each for each in candidates if each is not None]
    if not known:
        return "unknown"
    return format_seeds_needed(min(known)) if min(known) > SEEDS_CAP else str(max(1, min(known) - len(values)))


def describe_state(result: StudyResult) -> str:
    """Return a sentence that says whether the study has ended, or which arms are open."""
    if not result.open_arms:
        return "The study has ended: every arm has a final verdict or has used all seeds."
    used = max((len(row.difference.pairs) for row in arm_rows(result) if row.difference and row.is_open), default=0)
    left = len(result.lock.options.judging_seeds) - used
    return (
        f"The study is not finished. Open: {', '.join(result.open_arms)}. "
        "An open arm has no final verdict, and seeds are left for it "
        f"(at most {left} of {len(result.lock.options.judging_seeds)})."
    )


def describe_search(result: StudyResult) -> str:
    """Return sentences that say how many settings were tried for each arm, and where the numbers differ."""
    options = result.lock.options
    seeds = f"{format_count(len(options.tuning_seeds), 'tuning seed')} ({', '.join(map(str, options.tuning_seeds))})"
    text = (
        f"The same search for every arm: {format_count(options.trials, 'trial')} by the sampler {options.sampler}, "
        f"each with {seeds} and {options.tuning_horizon:,} updates. These seeds are not used for the verdicts."
    )
    counts = {each.label: len(each.best_of_n) for each in result.searches}
    if missing := [
        f"{label} {counts.get(label, 0)}" for label in options.arms if counts.get(label, 0) < options.trials
    ]:
        text += f" Fewer trials have a value: {', '.join(missing)} of {options.trials}."
    return text


def finite(value: float | None) -> float | None:
    """Return a number, or None instead of a value that is not finite."""
    return value if value is not None and math.isfinite(value) else None


def print_study(console: Console, result: StudyResult) -> None:
    """Print the results of a study."""
    options = result.lock.options
    console.print(f"{result.lock.name}: {options.question}", highlight=False, markup=False)
    console.print(describe_state(result), highlight=False, markup=False)
    console.print(verdicts_table(result))
    if any(row.difference for row in arm_rows(result)):
        console.print(INTERVAL_TEXT, highlight=False)
    if result.searches:
        console.print(settings_table(result.searches, options.metric))
        console.print(describe_search(result), highlight=False, markup=False)
        console.print("Best of half: expected with half as many trials.", highlight=False)
    if any(each.horizons for each in result.horizons):
        console.print(ends_table(result))
    if any(each.factor for each in result.horizons):
        console.print(factors_table(result))
        console.print(FACTOR_TEXT, highlight=False)
    console.print(f"Departures from the lock: {len(result.departures) or 'none'}", highlight=False)
    for departure in result.departures:
        console.print(f"- {departure}", highlight=False, markup=False)
    if result.comparison and result.comparison.notes:
        console.print("Notes:", highlight=False)
    for note in result.comparison.notes if result.comparison else ():
        console.print(f"- {note}", highlight=False, markup=False)


def verdicts_table(result: StudyResult) -> Table:
    """Return a table of the verdict on each arm, with the difference from the baseline and its repeated interval."""
    options = result.lock.options
    title = f"{options.metric} at {max(options.horizons):,} updates: difference from {options.baseline}"
    table = _new_table(title)
    table.add_column("verdict", no_wrap=True)
    for column in ("mean", "repeated interval", "seeds", "< δ", "more"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in arm_rows(result):
        found = row.difference
        if found is None:
            table.add_row(row.label, row.verdict, *[ABSENT] * 3, ABSENT, ABSENT)
            continue
        interval, seeds = format_interval(found.low, found.high, "+.2g"), str(len(found.pairs))
        cells = interval, seeds, _within_delta(found.is_within_delta), row.more_seeds.replace("unknown", "?") or ABSENT
        table.add_row(row.label, row.verdict, f"{found.mean:+.3g}", *cells)
    return table


def _within_delta(shown: bool | None) -> str:
    return ABSENT if shown is None else "yes" if shown else "no"


def settings_table(searches: Sequence[ArmSearch], metric: str) -> Table:
    """Return a table of the settings that were chosen for each arm."""
    table = _new_table(f"Chosen settings, by the mean of {metric} on the tuning seeds")
    table.add_column("trials", justify="right")
    table.add_column("best", justify="right")
    table.add_column("best of half", justify="right")
    table.add_column("settings", overflow="fold")
    for each in searches:
        best = ABSENT if each.chosen is None or each.chosen.mean is None else format_digits(each.chosen.mean, 4)
        half = each.best_of_n[(len(each.best_of_n) - 1) // 2].expected if each.best_of_n else None
        settings = "no trial has a value" if each.chosen is None else format_settings(each.chosen)
        table.add_row(
            each.label, str(len(each.trials)), best, ABSENT if half is None else format_digits(half, 4), settings
        )
    return table


def format_settings(trial: Trial) -> str:
    """Return the settings of a trial as text, with three significant digits.

    >>> format_settings(Trial(0, {"optimizer.lr": "0.0031234", "algo.beta": "1"}, {}))
    'optimizer.lr=0.00312 algo.beta=1'
    """
    return describe_settings({key: _as_number(value) for key, value in trial.settings.items()})


def _as_number(text: str) -> object:
    try:
        return text if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        return text


def ends_table(result: StudyResult) -> Table:
    """Return a table of the mean end value of each arm at the longest horizons."""
    horizons = sorted(result.lock.options.horizons)
    title = f"{result.lock.options.metric} at the end: mean over seeds ± standard deviation"
    if len(horizons) > MAX_HORIZONS:
        title += f", longest {MAX_HORIZONS} of {len(horizons)} horizons"
    table = _new_table(title)
    for updates in horizons[-MAX_HORIZONS:]:
        table.add_column(f"{updates:,} updates", justify="right")
    for arm in result.horizons:
        found = {each.updates: list(each.values.values()) for each in arm.horizons}
        table.add_row(arm.label, *(format_mean(found.get(updates, []), ABSENT) for updates in horizons[-MAX_HORIZONS:]))
    return table


def format_mean(values: Sequence[float], absent: str) -> str:
    """Return the mean and the sample standard deviation of values as text; `absent` if there are no values.

    >>> format_mean([1.0, 2.0, 3.0], "-"), format_mean([0.5], "-"), format_mean([], "-")
    ('2.000 ± 1.0', '0.5000', '-')
    """
    if not values:
        return absent
    if len(values) == 1:
        return format_digits(values[0], 4)
    center = mean(values)
    deviation = math.sqrt(sum((value - center) ** 2 for value in values) / (len(values) - 1))
    return f"{format_digits(center, 4)} ± {format_digits(deviation, 2)}"


def format_digits(value: float, digits: int) -> str:
    """Return a number with the given number of significant digits, of which zeros at the end are kept.

    >>> format_digits(1.0, 4), format_digits(12345.6, 4)
    ('1.000', '1.235e+04')
    """
    return f"{value:#.{digits}g}".rstrip(".")


def factors_table(result: StudyResult) -> Table:
    """Return a table of the factor of tokens of each arm."""
    baseline = result.lock.options.baseline
    table = _new_table(f"Tokens to reach the end value of {baseline}, relative to {baseline}")
    for column in ("factor", "95 % interval", "seeds", "extrapolated", "no factor"):
        table.add_column(column, justify="right", no_wrap=column == "95 % interval")
    for arm in result.horizons:
        found = arm.factor
        if found is not None:
            factor = finite(found.factor)
            counts = (found.num_seeds, found.num_extrapolated, found.num_without)
            limits = format_limits(finite(found.low), finite(found.high), ABSENT)
            table.add_row(arm.label, ABSENT if factor is None else f"{factor:.2f}", limits, *map(str, counts))
    return table


def format_limits(low: float | None, high: float | None, absent: str) -> str:
    """Return an interval as text that has no limit on a side where its end is None; `absent` if both ends are None.

    >>> format_limits(0.5, 1.25, "-"), format_limits(None, 0.9, "-"), format_limits(1.1, None, "-")
    ('0.50 to 1.25', 'at most 0.90', 'at least 1.10')
    """
    if low is None:
        return absent if high is None else f"at most {high:.2f}"
    return f"at least {low:.2f}" if high is None else f"{low:.2f} to {high:.2f}"


def _new_table(title: str) -> Table:
    """Return a table without rows, with a column for the names of arms."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("arm", overflow="fold", min_width=8)
    return table
