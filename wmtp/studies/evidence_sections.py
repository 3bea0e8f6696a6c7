"""The sections of a study's page that show the search, the end values over tokens, and power and variance."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

from markupsafe import Markup

from wmtp.report.html import ABSENT, breakable, details, facts, figures, muted_paragraph, paragraph, table
from wmtp.report.metrics import is_lower_better
from wmtp.studies.lock_section import code_lines
from wmtp.studies.plots import plot_best_of_n, plot_ends, plot_factors, plot_power, power_curve
from wmtp.studies.results import ArmHorizons, ArmSearch, StudyResult, Trial
from wmtp.studies.tables import describe_search, finite, format_digits, format_limits, format_mean, format_settings


def search_section(result: StudyResult) -> Markup:
    """Return the search for settings as HTML."""
    options = result.lock.options
    if not result.searches:
        return muted_paragraph("No trial has finished yet.")
    rows = [
        [breakable(each.label), len(each.trials), len(each.best_of_n), *_best_of(each),
         ABSENT if each.chosen is None else _settings(each.chosen)]
        for each in result.searches
    ]  # fmt: skip
    head = ["arm", "trials", "with a value", "mean of the chosen trial", "expected best of half", "chosen settings"]
    text = (
        "The chosen trial has the best mean over the tuning seeds. Expected best of half: mean that half as many "
        "trials are expected to reach. If it is close to the mean of the chosen trial, more trials would help little."
    )
    if options.sampler == "tpe":
        text += " The sampler tpe chooses trials by earlier ones, so the expected best of n trials is only a guide."
    lower = is_lower_better(options.metric)
    return (
        paragraph(describe_search(result))
        + table(head, rows, numbers=range(1, 5), names=[0])
        + muted_paragraph(text)
        + figures([plot_best_of_n(result.searches, options.baseline, options.metric)])
        + details("All trials", _trials(result.searches, lower))
    )


def _best_of(search: ArmSearch) -> list[str]:
    if search.chosen is None or search.chosen.mean is None or not search.best_of_n:
        return [ABSENT, ABSENT]
    half = search.best_of_n[(len(search.best_of_n) - 1) // 2]
    return [format_digits(search.chosen.mean, 4), format_digits(half.expected, 4)]


def _settings(trial: Trial) -> Markup:
    return Markup('<span class="lines">{}</span>').format(code_lines(format_settings(trial).split()))


def _trials(searches: Sequence[ArmSearch], lower_is_better: bool) -> Markup:
    """Return a table of all trials. Those of an arm are sorted by their mean, the best first."""
    seeds = list(dict.fromkeys(seed for each in searches for trial in each.trials for seed in trial.values))
    rows = list[list[Any]]()
    for each in searches:
        known = [trial for trial in each.trials if trial.mean is not None]
        known.sort(key=lambda trial: trial.mean or 0.0, reverse=not lower_is_better)
        for trial in [*known, *(trial for trial in each.trials if trial.mean is None)]:
            values = (trial.values.get(seed) for seed in seeds)
            rows.append([
                breakable(each.label), trial.number, ABSENT if trial.mean is None else f"{trial.mean:.4g}",
                *(ABSENT if value is None else f"{value:.4g}" for value in values),
                _settings(trial),
            ])  # fmt: skip
    head = ["arm", "trial", "mean", *(f"seed {seed}" for seed in seeds), "settings"]
    return table(head, rows, numbers=range(1, len(head) - 1), names=[0])


def ends_section(result: StudyResult) -> Markup:
    """Return the end values at each horizon and the factors of tokens as HTML."""
    options = result.lock.options
    if not any(arm.horizons for arm in result.horizons):
        return muted_paragraph("No judged run has finished yet.")
    body = paragraph(
        f"{options.metric} at the end of the judged runs. Each horizon has its own runs, with their own schedule."
    )
    body += _ends_table(result)
    if len(options.horizons) < 2:
        return body + muted_paragraph(
            "With one horizon there is no fit over tokens, so there are no factors of tokens."
        )
    plots = [
        plot_ends(result.horizons, options.baseline, options.metric),
        plot_factors(result.horizons, options.baseline),
    ]
    return body + figures(plots) + _factors(result.horizons, options.baseline)


def _ends_table(result: StudyResult) -> Markup:
    horizons = sorted(result.lock.options.horizons)
    rows, tokens = list[list[Any]](), list[list[Any]]()
    for arm in result.horizons:
        found = {each.updates: each for each in arm.horizons}
        values = [list(found[updates].values.values()) if updates in found else [] for updates in horizons]
        rows.append([breakable(arm.label), *(format_mean(each, ABSENT) for each in values)])
        for updates in horizons:
            if updates in found:
                each = found[updates]
                tokens.append([breakable(arm.label), f"{updates:,}", f"{each.tokens:,.0f}", len(each.values)])
    head = ["arm", *(f"{updates:,} updates" for updates in horizons)]
    more = table(["arm", "horizon", "mean number of tokens", "seeds"], tokens, numbers=[1, 2, 3], names=[0])
    return (
        table(head, rows, numbers=range(1, len(head)), names=[0])
        + muted_paragraph("Mean over seeds ± standard deviation.")
        + details("Tokens and seeds of each horizon", more, printed=True)
    )


def _factors(horizons: Sequence[ArmHorizons], baseline: str) -> Markup:
    found = [(arm.label, arm.factor) for arm in horizons if arm.factor is not None]
    if not found:
        return Markup()
    rows = [
        [breakable(label), *_factor_cells(factor.factor, factor.low, factor.high), factor.num_seeds,
         factor.num_extrapolated, factor.num_without]
        for label, factor in found
    ]  # fmt: skip
    text = (
        f"Factor: tokens with which the arm reaches the end value of {baseline} at the longest horizon, divided by the "
        f"tokens of {baseline}. It is read from a fit of the arm’s end values over tokens. Extrapolated: seeds for "
        "which the number of tokens lies outside of the arm’s horizons; such a factor depends on the form of the fit. "
        "Without: seeds that give no factor alone, because the number is too far outside or the value does not improve "
        "with tokens. They are not left out: factor and interval are of the mean curves of all seeds that have ends at "
        "all horizons. The interval is for a fixed number of seeds. An arm that was decided early has a difference "
        "that looks larger than it is, and so has its factor."
    )
    head = ["arm", "factor", "95 % interval", "seeds", "extrapolated", "without"]
    extrapolated = [label for label, factor in found if factor.is_extrapolated]
    body = paragraph(text) + table(head, rows, numbers=range(1, 6), names=[0])
    if extrapolated:
        return body + paragraph(f"Extrapolated, at least for one seed: {', '.join(extrapolated)}.")
    return body + muted_paragraph("Nothing was extrapolated.")


def _factor_cells(*values: float | None) -> list[str]:
    factor, low, high = (finite(value) for value in values)
    return [ABSENT if factor is None else f"{factor:.2f}", format_limits(low, high, ABSENT)]


def power_section(result: StudyResult) -> Markup:
    """Return the planned and observed power, the gain of pairing, and the variance by source as HTML."""
    options, planned = result.lock.options, result.planned
    equivalence = ABSENT if planned.equivalence_power is None else f"{planned.equivalence_power:.2f}"
    body = facts([
        ("Effect to show", f"{planned.effect:g} in {options.metric}"),
        ("Planned deviation", f"{planned.deviation:g} (standard deviation of paired differences)"),
        ("Seeds and arms", f"at most {planned.num_seeds} seeds, {planned.num_comparisons} compared with the baseline"),
        ("Planned power", f"{planned.power:.2f}: probability to show this effect in one arm"),
        ("Planned power for “the same”", f"{equivalence}: probability of this verdict if there is no difference"
         if options.delta is not None else None),
    ])  # fmt: skip
    plots = figures([plot_power(result)])
    return body + plots + _observed(result) + _variance(result)


def _observed(result: StudyResult) -> Markup:
    """Return a table of the observed deviations, the power that follows from them, and the gain of pairing."""
    planned, looks = result.planned, result.lock.options.looks
    if not planned.observed_deviations and not result.pairing:
        return Markup()
    power_of = power_curve(looks, planned.num_comparisons)
    rows = list[list[str | Markup]]()
    for label in result.lock.options.others:
        deviation, gain = planned.observed_deviations.get(label), result.pairing.get(label)
        power = float(power_of(planned.effect / deviation)) if deviation else None
        cells = [breakable(label), ABSENT if deviation is None else f"{deviation:.3g}"]
        cells += [ABSENT if power is None else f"{power:.2f}"]
        if gain is None:
            cells += [ABSENT] * 3
        else:
            values = (gain.correlation, gain.variance_ratio, gain.seeds_saved)
            cells += [f"{value:.2f}" if isfinite(value) else ABSENT for value in values]
        rows.append(cells)
    head = ["arm", "observed deviation", "power with it", "correlation of pairs", "variance ratio", "seeds saved"]
    text = (
        "Power with it: probability to show the declared effect with all seeds, if the observed deviation is the true "
        "one. A deviation of few seeds is itself uncertain. Variance ratio: variance of paired differences divided by "
        "that of runs with different seeds; below 1, pairing helps. Seeds saved: how many times more seeds a "
        "comparison without pairs would need."
    )
    return table(head, rows, numbers=range(1, 6), names=[0]) + muted_paragraph(text)


def _variance(result: StudyResult) -> Markup:
    if not result.variance:
        return Markup()
    rows = [
        [source, f"{each.variance:.3g}", f"{100 * each.share:.0f} %" if isfinite(each.share) else ABSENT]
        for source, each in result.variance.items()
    ]
    text = (
        f"Variance of {result.lock.options.metric} of {result.lock.options.baseline} by its source: in each group of "
        "runs, only this source differs. Shares are of the sum over the sources."
    )
    return paragraph(text) + table(["source", "variance", "share"], rows, numbers=[1, 2], names=[0])
