"""Creation of compare.html, the page that shows a comparison with its verdicts, plots, tests and runs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from wmtp.report import comparison_plots
from wmtp.report.grouping import distinguishing_settings
from wmtp.report.html import (
    ABSENT,
    Section,
    breakable,
    bullet_list,
    card,
    cards,
    code,
    details,
    figures,
    muted_paragraph,
    paragraph,
    table,
    write_html,
)  # fmt: skip
from wmtp.report.measure_tables import means_tables, tokens_to_target_tables
from wmtp.report.plots import plot_style
from wmtp.report.results import Comparison, Difference, MetricComparison
from wmtp.report.run_record import RunRecord
from wmtp.report.run_report import FILE_NAME
from wmtp.statistics.paired import MIN_PAIRS
from wmtp.statistics.power import SEEDS_CAP

CSS_CLASSES = {"better": "good", "worse": "bad"}
"""CSS class of each verdict. Verdicts that are not listed have the class `quiet`."""


def write_comparison_report(path: Path, comparison: Comparison) -> None:
    """Write the HTML page of a comparison atomically. The page has relative links to the report.html of each run."""
    requested = comparison.metrics[0]
    title = f"{requested.metric} compared with {comparison.baseline}"
    with plot_style():
        sections = [section for section in _sections(path, comparison) if section.body]
        write_html(path, f"{title} – wmtp", _header(comparison, title), sections)


def _sections(path: Path, comparison: Comparison) -> list[Section]:
    baseline = comparison.baseline
    metric_sections = [
        Section(f"metric-{number}", metric.metric, _metric(metric, baseline, f"metric-{number}"))
        for number, metric in enumerate(comparison.metrics, 1)
    ]
    return [
        Section("answer", "Result", _result(comparison)),
        *metric_sections,
        Section("curves", f"{comparison.loss} over the training", _curves(comparison)),
        Section(
            "reach",
            f"Mid-run reading: tokens to {baseline}’s best {comparison.loss}",
            tokens_to_target_tables(comparison.tokens_to_target, baseline),
        ),
        Section("means", "Policy and weights", means_tables(comparison.means)),
        Section("notes", "Notes", bullet_list(comparison.notes)),
        Section("differs", "Config differences", _config_differences(comparison)),
        Section("runs", "Runs", _runs(path, comparison)),
    ]


def _curves(comparison: Comparison) -> Markup:
    plots, metric = (
        figures(comparison_plots.plot_curves(comparison.groups, comparison.loss)),
        comparison.metrics[0].metric,
    )
    if not plots or metric == comparison.loss:
        return plots
    return (
        muted_paragraph(f"{metric} is not a loss that all validations have; the curves show {comparison.loss}.") + plots
    )


def _header(comparison: Comparison, title: str) -> Markup:
    count = sum(map(len, comparison.groups.values()))
    requested = comparison.metrics[0]
    better = "lower" if requested.lower_is_better else "higher"
    question = (
        f"Is {requested.metric} better than {comparison.baseline}’s? Measured: {requested.at}; {better} is better. "
        f"{count} runs in {len(comparison.groups)} groups; each run is compared with the run of "
        f"{comparison.baseline} that has the same seed."
    )
    return Markup("<h1>{}</h1>\n").format(title) + paragraph(question, "quiet")


def _result(comparison: Comparison) -> Markup:
    requested = comparison.metrics[0]
    if not requested.differences:
        return muted_paragraph("There is only one group, so nothing can be compared.")
    body = cards(
        card(each.label, CSS_CLASSES.get(each.verdict, "quiet"), each.verdict, paragraph(describe_difference(each)))
        for each in requested.differences
    )
    if len(comparison.metrics) > 1:
        rows = [
            [
                breakable(each.label),
                *(verdict_text(_find_difference(metric, each.label)) for metric in comparison.metrics),
            ]
            for each in requested.differences
        ]
        head = ["group", *(metric.metric for metric in comparison.metrics)]
        body += paragraph("Verdicts for all metrics; p-values are corrected for each metric separately.")
        body += table(head, rows, names=[0])
    return body


def describe_difference(difference: Difference) -> str:
    """Return sentences that describe how one group differs from the baseline."""
    seeds = f"{len(difference.pairs)} {'seed' if len(difference.pairs) == 1 else 'seeds'}"
    if not difference.pairs:
        return "No seed has a run in both groups."
    return f"{_describe_pairs(difference, seeds)}{_describe_failed_runs(difference)}"


def _describe_pairs(difference: Difference, seeds: str) -> str:
    mean = f"Mean difference {format_signed(difference.mean)}"
    if difference.low is None or difference.high is None:
        reason = "The difference is the same for every seed, so it cannot be tested."
        if len(difference.pairs) < MIN_PAIRS:
            reason = "The difference may be chance: a test needs at least two seeds."
        return f"{mean} over {seeds}. {reason}"
    interval = (
        f"{mean}, 95 % interval {format_signed(difference.low)} to {format_signed(difference.high)}, over {seeds}"
    )
    holm = (
        "" if difference.p_holm is None else f"; p {_format_p(difference.p_holm)}, corrected for the number of groups"
    )
    text = f"{interval}{holm}."
    if difference.verdict != "undecided":
        return text
    if not difference.low <= 0 <= difference.high:
        text += " The interval excludes zero, but without correction; corrected, it would include zero."
    return f"{text} This does not prove that there is no difference: {_describe_seeds_needed(difference)}."


def _describe_failed_runs(difference: Difference) -> str:
    """Return sentences that say how many runs failed and how this affects the verdict."""
    sides = (("runs", difference.lost), ("baseline runs", difference.baseline_lost))
    text = "".join(f" {side.failed} of {side.runs} {name} failed." for name, side in sides if side.failed)
    if difference.verdict == "runs failed":
        text += " The remaining runs may be better than average, so no verdict favors that side."
    return text


def _describe_seeds_needed(difference: Difference) -> str:
    needed = difference.seeds_needed
    if needed is None:
        return "the number of seeds that would show one of this size cannot be estimated"
    many = f"more than {SEEDS_CAP:,}" if needed > SEEDS_CAP else f"about {needed:,}"
    return f"{many} seeds would show a difference of this size with about 80 % power"


def _metric(metric: MetricComparison, baseline: str, name: str) -> Markup:
    better = "Lower is better" if metric.lower_is_better else "Higher is better"
    with_failed = any(group.lost.failed for group in metric.groups)
    rows = [
        [breakable(group.label), len(group.values_by_seed), f"{group.mean:.4g}" if group.values_by_seed else ABSENT,
         ABSENT if group.deviation is None else f"{group.deviation:.2g}",
         *([str(group.lost) if group.lost.failed else ABSENT] if with_failed else [])]
        for group in metric.groups
    ]  # fmt: skip
    plots = figures(
        [
            comparison_plots.plot_values_by_seed(metric, f"{name}-seeds"),
            comparison_plots.plot_forest(metric, baseline, f"{name}-forest"),
        ]
    )
    head = ["group", "seeds", "mean", "deviation", *(["without a value"] if with_failed else [])]
    means = table(head, rows, numbers=range(1, len(head)), names=[0])
    return paragraph(f"{better}. Measured: {metric.at}.") + means + plots + _tests(metric)


def _tests(metric: MetricComparison) -> Markup:
    if not metric.differences:
        return Markup()
    with_problems = any(each.mcnemar for each in metric.differences)
    head = ["group", "verdict", "pairs", "difference", "95 % interval", "p → Holm", "permutation p", "Wilcoxon p"]
    head += ["seeds needed", *["won : lost", "McNemar p"] * with_problems]
    rows = [_test_row(each, with_problems) for each in metric.differences]
    body = table(head, rows, numbers=range(2, len(head)), names=[0])
    text = "Arrows: p-values before and after Holm’s correction for the number of groups."
    if with_problems:
        text += (
            " Won and lost: test problems on which the group’s model, or the baseline’s, has the higher pass rate. "
            "McNemar’s test is about these two models, not about the method."
        )
    body += muted_paragraph(text)
    floors = {each.wilcoxon_floor for each in metric.differences if each.wilcoxon_floor >= 0.05}
    if floors:
        body += muted_paragraph(f"With so few pairs, Wilcoxon’s test cannot give a p below {max(floors):.4g}.")
    return body


def _test_row(each: Difference, with_problems: bool) -> list[Any]:
    interval = (
        ABSENT if each.low is None or each.high is None else f"{format_signed(each.low)} to {format_signed(each.high)}"
    )
    needed, mcnemar = each.seeds_needed, each.mcnemar
    row = [
        breakable(each.label), verdict_text(each), len(each.pairs), format_signed(each.mean) if each.pairs else ABSENT,
        interval, _format_corrected(each.p, each.p_holm), _format_p(each.permutation), _format_p(each.wilcoxon),
        ABSENT if needed is None else f"> {SEEDS_CAP}" if needed > SEEDS_CAP else str(needed),
    ]  # fmt: skip
    if with_problems:
        row += [f"{mcnemar.won} : {mcnemar.lost}" if mcnemar else ABSENT]
        row += [_format_p(mcnemar.p if mcnemar else None)]
    return row


def _config_differences(comparison: Comparison) -> Markup:
    settings = {label: distinguishing_settings(runs[0]) for label, runs in comparison.groups.items() if runs}
    keys = dict.fromkeys(key for setting in settings.values() for key in setting)
    varying = [key for key in keys if len({str(setting.get(key)) for setting in settings.values()}) > 1]
    if not varying:
        return muted_paragraph("The configs are equal.")
    in_labels = [
        key for key in varying if any(_is_in_label(key, setting, label) for label, setting in settings.items())
    ]
    others = [key for key in varying if key not in in_labels and "@" not in key and "_target_" not in key.split(".")]
    body = _settings(settings, in_labels) if in_labels else Markup()
    if others:
        body += details(f"{len(others)} more key{'s' if len(others) > 1 else ''}", _settings(settings, others))
    return body


def _is_in_label(key: str, setting: Mapping[str, Any], label: str) -> bool:
    """Return whether a group label contains the value of a config key."""
    value, parts = setting.get(key), label.split(", ")
    return f"{key.removesuffix('=')}={value}" in parts or (key.endswith("=") and value in parts)


def _settings(settings: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> Markup:
    """Return a table of config values with a row for each key and a column for each group."""
    rows = [
        [code(breakable(key.removesuffix("="))),
         *(code(breakable(str(setting[key]))) if key in setting else ABSENT for setting in settings.values())]
        for key in keys
    ]  # fmt: skip
    return table(["", *map(breakable, settings)], rows, names=range(1 + len(settings)))


def _runs(path: Path, comparison: Comparison) -> Markup:
    rows = [
        (
            breakable(label),
            run.seed,
            run_link(path, run),
            run.status.get("state", ABSENT),
            f"{run.status.get('step', 0):,}",
        )
        for label, runs in comparison.groups.items()
        for run in runs
    ]
    return table(["group", "seed", "run", "state", "updates"], rows, numbers=[1, 4], names=[0])


def run_link(path: Path, run: RunRecord) -> Markup | str:
    """Return the name of a run, with a relative link from a page to the run's report if there is one."""
    page = run.folder / FILE_NAME
    if not page.exists():
        return run.name
    relative = os.path.relpath(page.resolve(), path.parent.resolve())
    return Markup('<a href="{}">{}</a>').format(quote(relative), run.name)


def _find_difference(metric: MetricComparison, label: str) -> Difference | None:
    return next((each for each in metric.differences if each.label == label), None)


def verdict_text(difference: Difference | None) -> Markup | str:
    """Return the colored verdict on a difference, or a dash if there is no difference."""
    if difference is None:
        return ABSENT
    css_class = CSS_CLASSES.get(difference.verdict, "quiet")
    return Markup('<span class="{}">{}</span>').format(css_class, difference.verdict)


def format_signed(value: float) -> str:
    """Return a difference as text with its sign and at most three significant digits.

    >>> format_signed(-0.01234), format_signed(0.5)
    ('−0.0123', '+0.5')
    """
    return f"{value:+.3g}".replace("-", "−")


def _format_corrected(p: float | None, holm: float | None) -> str:
    return ABSENT if p is None else f"{_format_p(p)} → {_format_p(holm)}"


def _format_p(value: float | None) -> str:
    """Return a p-value as text, or a dash for None.

    >>> _format_p(0.0312), _format_p(0.00001), _format_p(None)
    ('0.031', '< 0.001', '–')
    """
    if value is None:
        return ABSENT
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
