"""Creation of study.html, the page of a study: verdicts first, then the evidence, then the lock and the runs."""

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from wmtp.report.comparison_plots import plot_curves, plot_values_by_seed
from wmtp.report.comparison_report import CSS_CLASSES, format_signed, run_link
from wmtp.report.html import (
    ABSENT,
    Section,
    breakable,
    bullet_list,
    details,
    figures,
    join,
    muted_paragraph,
    paragraph,
    table,
    write_html,
)  # fmt: skip
from wmtp.report.measure_tables import tokens_to_target_tables
from wmtp.report.metrics import is_lower_better
from wmtp.report.plots import plot_style
from wmtp.report.results import Comparison, Difference, MetricComparison
from wmtp.statistics.token_factor import TokenFactor
from wmtp.studies.evidence_sections import ends_section, power_section, search_section
from wmtp.studies.lock_section import lock_section
from wmtp.studies.plots import plot_differences, plot_late_curves, plot_neutral_differences
from wmtp.studies.results import StudyResult
from wmtp.studies.tables import (
    ArmRow,
    arm_rows,
    describe_state,
    finite,
    format_limits,
    primary_metric,
)

STYLE = """
.lines { white-space: nowrap; }
.warning { border: 1px solid var(--bad); border-left-width: 5px; border-radius: 0.5rem; background: var(--panel);
  margin-top: 0.8rem; padding: 0.2rem 1rem 0.6rem; max-width: 44rem; break-inside: avoid; }
"""
MAX_GROUPS = 6
"""Maximum number of arms for which plots show the runs of all arms in one panel. More could not be distinguished."""
MEANINGS = {
    "better": "better: the repeated interval excludes 0, and the arm’s values are better than the baseline’s.",
    "worse": "worse: the repeated interval excludes 0, and the arm’s values are worse than the baseline’s.",
    "the same": "the same: the difference is shown to be smaller than δ in both directions.",
    "undecided": "undecided: neither a difference nor “the same” is shown. This is not evidence that there is no "
    "difference.",
    "too few seeds": "too few seeds: there are fewer pairs of runs than the first look needs.",
    "runs failed": "runs failed: the side that the test favors has failed runs. The other runs may be better than "
    "average, so there is no verdict.",
    "no runs yet": "no runs yet: no seed has finished runs of both the arm and the baseline.",
    "no result": "no result: the arm has no run that can be compared, and no seed is left.",
}


def write_study_page(path: Path, result: StudyResult) -> None:
    """Write the HTML page of a study atomically. The page has relative links to the report.html of each judged run."""
    with plot_style():
        sections = [section for section in _sections(path, result) if section.body]
        write_html(path, f"{result.lock.name} – wmtp", _header(result), sections, STYLE)


def _sections(path: Path, result: StudyResult) -> list[Section]:
    comparison, baseline = result.comparison, result.lock.options.baseline
    metric = primary_metric(result)
    sections = [
        Section("verdicts", "Verdicts", _verdicts(result)),
        Section("departures", "Departures from the lock", _departures(result.departures)),
        Section("search", "Search for settings", search_section(result)),
        Section("ends", "End values over tokens", ends_section(result)),
        Section("differences", "Differences seed by seed", _differences(metric, baseline, arm_rows(result))),
        Section("power", "Power and variance", power_section(result)),
    ]
    if comparison is not None:
        sections += [
            Section("others", "Other metrics, without claim", _other_metrics(comparison)),
            Section("reading", "Mid-run reading", _mid_run_reading(comparison)),
            Section("notes", "Notes", bullet_list(comparison.notes)),
        ]
    sections.append(Section("lock", "The lock", lock_section(result.lock)))
    if comparison is not None:
        sections.append(Section("runs", "Runs", _runs(path, comparison, max(result.lock.options.horizons))))
    return sections


def _header(result: StudyResult) -> Markup:
    options, lower = result.lock.options, is_lower_better(result.lock.options.metric)
    count = len(result.departures)
    badges = [("quiet", "not finished") if result.open_arms else ("good", "finished")]
    badges += [("bad", f"{count} departure{'' if count == 1 else 's'} from the lock")] if count else []
    states = join(Markup(' <span class="state {}">{}</span>').format(*badge) for badge in badges)
    model = "the end of the training" if options.at == "last" else "the best checkpoint"
    text = (
        f"Study {result.lock.name}: {len(options.others)} arm{'s' if len(options.others) > 1 else ''} compared with "
        f"{options.baseline} in {options.metric} at {model}; {'lower' if lower else 'higher'} is better. "
        f"{result.num_runs:,} finished runs with {result.total_tokens:,} tokens; they took {result.seconds / 3600:.1f} "
        "hours together."
    )
    title = Markup("<h1>{}{}</h1>\n").format(options.question, states)
    return title + paragraph(text, "quiet") + paragraph(describe_state(result))


def _verdicts(result: StudyResult) -> Markup:
    options, rows = result.lock.options, arm_rows(result)
    head = [
        "arm", "verdict", "difference", "repeated interval", "seeds", "within\u00a0±\u00a0δ", "factor of tokens",
        "seeds still needed",
    ]  # fmt: skip
    with_factors = len(options.horizons) > 1
    cells = [_verdict_row(row) for row in rows]
    if not with_factors:
        head.pop(6)
        cells = [[*row[:6], *row[7:]] for row in cells]
    text = (
        f"Difference in {options.metric} from {options.baseline} with {max(options.horizons):,} updates, the longest "
        "horizon. Arms are sorted by the difference; the best is first."
    )
    body = paragraph(text) + table(head, cells, numbers=[2, 3, 4, 5, len(head) - 1], names=[0])
    return body + bullet_list(_explanations(result, rows, with_factors))


def _verdict_row(row: ArmRow) -> list[Markup | str | int]:
    label, found = breakable(row.label), row.difference
    verdict = Markup('<span class="{}">{}</span>').format(CSS_CLASSES.get(row.verdict, "quiet"), row.verdict)
    factor = _format_factor(row.factor)
    if found is None:
        return [label, verdict, ABSENT, ABSENT, 0, ABSENT, factor, ABSENT]
    return [
        label, verdict, format_signed(found.mean), _interval(found), len(found.pairs),
        _within_delta(found), factor, row.more_seeds or ABSENT,
    ]  # fmt: skip


def _within_delta(difference: Difference) -> str:
    if difference.is_within_delta is None:
        return ABSENT
    return "yes" if difference.is_within_delta else "not shown"


def _format_factor(factor: TokenFactor | None) -> str:
    """Return a factor of tokens with its interval as text, and whether it is extrapolated."""
    if factor is None:
        return ABSENT
    value, limits = finite(factor.factor), format_limits(finite(factor.low), finite(factor.high), "")
    if value is None:
        return limits or ABSENT
    return f"{value:.2f}{f' ({limits})' if limits else ''}{', extrapolated' if factor.is_extrapolated else ''}"


def _explanations(result: StudyResult, rows: Sequence[ArmRow], with_factors: bool) -> list[str]:
    options = result.lock.options
    texts = [MEANINGS[verdict] for verdict in MEANINGS if any(row.verdict == verdict for row in rows)]
    texts += [
        "Difference: mean over seeds of the arm’s value minus the baseline’s value with the same seed.",
        "Repeated interval: it holds at every look, for this arm, at the level of Holm’s step.",
    ]
    if options.delta is not None:
        texts.append(
            f"Within ± δ: whether the difference is shown to be smaller than δ = {options.delta:g}. “not shown” does "
            "not mean that it is larger."
        )
    if with_factors:
        texts.append(
            f"Factor of tokens: tokens with which the arm reaches the end value of {options.baseline}, divided by the "
            f"tokens of {options.baseline}. 0.70 means 30 % fewer tokens. It has no verdict, and its 95 % interval is "
            "for each arm alone."
        )
    texts.append(
        "Seeds still needed: estimate for any verdict with about 80 % power at a single look, if the true difference "
        "is the observed one."
    )
    return texts


def _departures(departures: Sequence[str]) -> Markup:
    if not departures:
        return paragraph("No departures: nothing that was checked differs from the lock.")
    text = "The study does not follow its lock in these points. Read the verdicts with this in mind."
    return Markup('<div class="warning">{}{}</div>\n').format(paragraph(text), bullet_list(departures))


def _differences(metric: MetricComparison | None, baseline: str, rows: Sequence[ArmRow]) -> Markup:
    if metric is None:
        return Markup()
    ordered = [row.difference for row in rows if row.difference is not None]
    values_plot = plot_values_by_seed(metric, "values") if len(metric.groups) <= MAX_GROUPS else None
    plots = figures([plot_differences(metric, baseline, ordered), values_plot])
    seeds = list(dict.fromkeys(seed for each in ordered for seed in each.pairs))
    values = [
        [breakable(each.label), *(format_signed(each.pairs[seed]) if seed in each.pairs else ABSENT for seed in seeds)]
        for each in ordered
    ]
    tests = [
        [breakable(each.label), format_signed(each.mean), _interval(each), f"{100 * (1 - each.level):.3g} %",
         *(ABSENT if p is None else f"{p:.2g}" for p in (each.p, each.permutation, each.wilcoxon))]
        for each in ordered
    ]  # fmt: skip
    head = ["arm", "difference", "interval", "level of the interval", "p of the t test", "p of the permutation test",
            "p of the signed-rank test"]  # fmt: skip
    text = (
        "Each p-value is of a single test with all seeds. It is not corrected for looks and arms, and the verdicts do "
        "not use it."
    )
    return (
        plots
        + paragraph("Difference by seed: value of the arm minus value of the baseline.")
        + table(["arm", *(f"seed {seed}" for seed in seeds)], values, numbers=range(1, len(seeds) + 1), names=[0])
        + details(
            "Tests", table(head, tests, numbers=range(1, len(head)), names=[0]) + muted_paragraph(text), printed=True
        )
    )


def _interval(each: Difference) -> str:
    if each.low is None or each.high is None:
        return ABSENT
    return f"{format_signed(each.low)} to {format_signed(each.high)}"


def _other_metrics(comparison: Comparison) -> Markup:
    body = Markup()
    for number, metric in enumerate(comparison.metrics[1:], 2):
        means = {group.label: f"{group.mean:.4g}" for group in metric.groups if group.values_by_seed}
        better = "lower" if metric.lower_is_better else "higher"
        rows = [
            [breakable(each.label), means.get(each.label, ABSENT), format_signed(each.mean), _interval(each),
             len(each.pairs)] for each in metric.differences
        ]  # fmt: skip
        text = (
            f"{metric.metric}, {metric.at}; {better} is better. {comparison.baseline}: "
            f"{means.get(comparison.baseline, ABSENT)}. The search and the verdicts do not use this metric. The table "
            "makes no claim: its intervals are not corrected for several metrics."
        )
        head = ["arm", "mean", "difference", "interval", "seeds"]
        body += paragraph(text) + table(head, rows, numbers=range(1, 5), names=[0])
        body += figures([plot_neutral_differences(metric, comparison.baseline, f"other-{number}")])
    return body


def _mid_run_reading(comparison: Comparison) -> Markup:
    is_small = len(comparison.groups) <= MAX_GROUPS
    late = plot_late_curves(comparison.groups, comparison.baseline, comparison.loss)
    curves = figures(plot_curves(comparison.groups, comparison.loss) if is_small else [late])
    if not comparison.tokens_to_target and not curves:
        return Markup()
    text = (
        "This is a reading of values during the runs, before the learning rate has reached its end. It says how fast "
        "an arm learns within one schedule. It is not the factor of tokens, and no verdict uses it."
    )
    return paragraph(text) + tokens_to_target_tables(comparison.tokens_to_target, comparison.baseline) + curves


def _runs(path: Path, comparison: Comparison, updates: int) -> Markup:
    rows = [
        (breakable(label), run.seed, run_link(path, run), run.status.get("state", ABSENT),
         f"{run.status.get('step', 0):,}")
        for label, runs in comparison.groups.items() for run in runs
    ]  # fmt: skip
    text = f"Judged runs with the horizon of {updates:,} updates. Names are links if the run has a report."
    return paragraph(text) + table(["arm", "seed", "run", "state", "updates"], rows, numbers=[1, 4], names=[0])
