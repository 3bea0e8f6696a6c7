"""The page of a comparison: the question, the answer in words, and what it rests on."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from wmtp.report import comparison_plots
from wmtp.report.grouping import differing
from wmtp.report.html import (
    Section,
    breakable,
    card,
    cards,
    code,
    details,
    figures,
    listed,
    paragraph,
    quiet,
    table,
    write_page,
)  # fmt: skip
from wmtp.report.plots import page_style
from wmtp.report.results import Comparison, Difference, MetricComparison, Reach
from wmtp.report.run_record import RunRecord
from wmtp.report.run_report import FILE_NAME
from wmtp.report.statistics import SEEDS_CAP

KINDS = {"better": "good", "worse": "bad"}
ABSENT = "–"


def write_comparison_page(path: Path, comparison: Comparison) -> None:
    """Write the page in one piece. The runs' own pages are linked from it, where they are, by relative paths."""
    asked = comparison.metrics[0]
    title = f"{asked.metric} against {comparison.baseline}"
    with page_style():
        sections = [section for section in _sections(path, comparison) if section.body]
        write_page(path, f"{title} – wmtp", _header(comparison, title), sections)


def _sections(path: Path, comparison: Comparison) -> list[Section]:
    baseline = comparison.baseline
    shown = [
        Section(f"metric-{number}", metric.metric, _metric(metric, baseline, f"metric-{number}"))
        for number, metric in enumerate(comparison.metrics, 1)
    ]
    return [
        Section("answer", "The answer", _answer(comparison)),
        *shown,
        Section("curves", f"{comparison.loss} at every validation", _curves(comparison)),
        Section("reach", f"Tokens to {baseline}’s best {comparison.loss}", _reach(comparison.reach, baseline)),
        Section("notes", "Notes", listed(comparison.notes)),
        Section("differs", "What differs", _what_differs(comparison)),
        Section("runs", "Runs", _runs(path, comparison)),
    ]


def _curves(comparison: Comparison) -> Markup:
    shown, asked = (
        figures(comparison_plots.curves_drawings(comparison.groups, comparison.loss)),
        comparison.metrics[0].metric,
    )
    if not shown or asked == comparison.loss:
        return shown
    return quiet(f"{asked} is no loss that every validation measured; the curves are of {comparison.loss}.") + shown


def _header(comparison: Comparison, title: str) -> Markup:
    count = sum(map(len, comparison.groups.values()))
    asked = comparison.metrics[0]
    better = "lower" if asked.lower_is_better else "higher"
    question = (
        f"Is {asked.metric} better than {comparison.baseline}’s? Of the {asked.at}; {better} is better. {count} runs "
        f"in {len(comparison.groups)} groups; each run is held against the run of {comparison.baseline} with its seed."
    )
    return Markup("<h1>{}</h1>\n").format(title) + paragraph(question, "quiet")


def _answer(comparison: Comparison) -> Markup:
    asked = comparison.metrics[0]
    if not asked.differences:
        return quiet("There is one group, and nothing to hold it against.")
    body = cards(
        card(each.label, KINDS.get(each.verdict, "quiet"), each.verdict, paragraph(in_words(each)))
        for each in asked.differences
    )
    if len(comparison.metrics) > 1:
        rows = [
            [metric.metric, *(_verdict(_of(metric, each.label)) for each in asked.differences)]
            for metric in comparison.metrics
        ]
        head = ["metric", *(breakable(each.label) for each in asked.differences)]
        body += paragraph("The same question of every metric; each is corrected on its own.")
        body += table(head, rows, names=range(1, len(head)))
    return body


def in_words(difference: Difference) -> str:
    """The answer for one group in a sentence or two."""
    seeds = f"{len(difference.pairs)} {'seed' if len(difference.pairs) == 1 else 'seeds'}"
    if not difference.pairs:
        return "No seed has a run in both groups."
    return f"{_in_words_of_pairs(difference, seeds)}{_lost(difference)}"


def _in_words_of_pairs(difference: Difference, seeds: str) -> str:
    mean = f"Mean difference {_signed(difference.mean)}"
    if difference.low is None or difference.high is None:
        return f"{mean} of {seeds}. One seed or two show nothing: what differs may be chance."
    interval = f"{mean}, 95 % interval {_signed(difference.low)} to {_signed(difference.high)}, of {seeds}"
    holm = "" if difference.p_holm is None else f"; p {_p(difference.p_holm)}, corrected for the groups compared"
    said = f"{interval}{holm}."
    if difference.verdict != "no difference shown":
        return said
    if not difference.low <= 0 <= difference.high:
        said += " The interval leaves out zero, but is this group’s alone: corrected, it would not."
    return f"{said} That is not to say that there is no difference: {_needed(difference)}."


def _lost(difference: Difference) -> str:
    """Which runs failed, and what that does to the verdict."""
    sides = (("", difference.lost), (" of the baseline", difference.baseline_lost))
    said = "".join(f" {lost}{side}." for side, lost in sides if lost.failed)
    if difference.verdict == "runs failed":
        said += " Those that are left may be the lucky ones, so nothing is said in favour of that side."
    return said


def _needed(difference: Difference) -> str:
    needed = difference.seeds_needed
    if needed is None:
        return "how many seeds would show one of this size cannot be said"
    many = f"more than {SEEDS_CAP:,}" if needed > SEEDS_CAP else f"about {needed:,}"
    return f"a true one of this size would be shown by {many} seeds, four times in five"


def _metric(metric: MetricComparison, baseline: str, name: str) -> Markup:
    better = "Lower is better" if metric.lower_is_better else "Higher is better"
    with_lost = any(group.lost.failed for group in metric.groups)
    rows = [
        [breakable(group.label), len(group.values_by_seed), f"{group.mean:.4g}" if group.values_by_seed else ABSENT,
         ABSENT if group.deviation is None else f"{group.deviation:.2g}",
         *([str(group.lost) if group.lost.failed else ABSENT] if with_lost else [])]
        for group in metric.groups
    ]  # fmt: skip
    drawn = figures(
        [
            comparison_plots.seeds_drawing(metric, f"{name}-seeds"),
            comparison_plots.forest_drawing(metric, baseline, f"{name}-forest"),
        ]
    )
    head = ["group", "seeds", "mean", "deviation", *(["without a value"] if with_lost else [])]
    means = table(head, rows, numbers=range(1, len(head)), names=[0])
    return paragraph(f"{better}. Measured: {metric.at}.") + means + drawn + _tests(metric)


def _tests(metric: MetricComparison) -> Markup:
    if not metric.differences:
        return Markup()
    with_problems = any(each.mcnemar for each in metric.differences)
    head = ["group", "verdict", "pairs", "difference", "95 % interval", "p → Holm", "Wilcoxon → Holm", "seeds needed"]
    head += ["won : lost", "McNemar → Holm"] * with_problems
    rows = [_test_row(each, with_problems) for each in metric.differences]
    body = table(head, rows, numbers=range(2, len(head)), names=[0])
    said = "Arrows: p-values before and after Holm’s correction for the groups compared."
    if with_problems:
        said += " Won and lost: test problems that more seeds of the group, or of the baseline, solved."
    body += quiet(said)
    floors = {each.wilcoxon_floor for each in metric.differences if each.wilcoxon_floor >= 0.05}
    if floors:
        body += quiet(f"With so few pairs, Wilcoxon’s test cannot give a p below {max(floors):.4g}.")
    return body


def _test_row(each: Difference, with_problems: bool) -> list[Any]:
    interval = ABSENT if each.low is None or each.high is None else f"{_signed(each.low)} to {_signed(each.high)}"
    needed, mcnemar = each.seeds_needed, each.mcnemar
    row = [
        breakable(each.label), _verdict(each), len(each.pairs), _signed(each.mean) if each.pairs else ABSENT, interval,
        _corrected(each.p, each.p_holm), _corrected(each.wilcoxon, each.wilcoxon_holm),
        ABSENT if needed is None else f"> {SEEDS_CAP}" if needed > SEEDS_CAP else str(needed),
    ]  # fmt: skip
    if with_problems:
        row += [f"{mcnemar.won} : {mcnemar.lost}" if mcnemar else ABSENT]
        row += [_corrected(mcnemar.p if mcnemar else None, each.mcnemar_holm)]
    return row


def _reach(reach: list[Reach], baseline: str) -> Markup:
    if not reach:
        return Markup()
    rows = [
        (breakable(each.label), len(each.pairs), _ratio(each.ratio), _ratio_interval(each), each.never)
        for each in reach
    ]
    pairs = [
        (breakable(each.label), pair.seed, f"{pair.target:.4g}", f"{pair.baseline_tokens:,.0f}",
         "never" if pair.tokens is None else f"{pair.tokens:,.0f}", f"{pair.baseline_stage_tokens:,}",
         f"{pair.stage_tokens:,}")
        for each in reach for pair in each.pairs
    ]  # fmt: skip
    each_seed = table(
        ["group", "seed", "best loss of " + baseline, "its tokens", "the group’s", "its stage before", "the group’s"],
        pairs, numbers=range(1, 7), names=[0],
    )  # fmt: skip
    lead = (
        f"Tokens until {reach[0].metric} was as good as the best of {baseline}’s run with the same seed, as a multiple "
        "of that run’s; below 1 is faster. Those of the stage before count."
    )
    head = ["group", "pairs", "median ratio", "95 % interval", "never reached"]
    return (
        paragraph(lead)
        + table(head, rows, numbers=range(1, 5), names=[0])
        + figures([comparison_plots.reach_drawing(reach, baseline)])
        + details("Seed by seed", each_seed, printed=True)
    )


def _ratio_interval(each: Reach) -> str:
    if not each.has_interval:
        return ABSENT
    return _ratio(None) if each.low is None else f"{_ratio(each.low)} to {_ratio(each.high)}"


def _ratio(value: float | None) -> str:
    return "∞" if value is None else f"{value:.3g}"


def _what_differs(comparison: Comparison) -> Markup:
    settings = {label: differing(runs[0]) for label, runs in comparison.groups.items() if runs}
    keys = dict.fromkeys(key for setting in settings.values() for key in setting)
    varying = [key for key in keys if len({str(setting.get(key)) for setting in settings.values()}) > 1]
    if not varying:
        return quiet("The configs do not differ.")
    naming = [key for key in varying if any(_is_named(key, setting, label) for label, setting in settings.items())]
    others = [key for key in varying if key not in naming and "@" not in key and "_target_" not in key.split(".")]
    body = _settings(settings, naming) if naming else Markup()
    if others:
        body += details(f"{len(others)} more keys", _settings(settings, others))
    return body


def _is_named(key: str, setting: Mapping[str, Any], label: str) -> bool:
    """Whether a label says what a key is in its group."""
    value, parts = setting.get(key), label.split(", ")
    return f"{key.removesuffix('=')}={value}" in parts or (key.endswith("=") and value in parts)


def _settings(settings: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> Markup:
    """A row for each key, a column for each group."""
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
            _link(path, run),
            run.status.get("state", ABSENT),
            f"{run.status.get('step', 0):,}",
        )
        for label, runs in comparison.groups.items()
        for run in runs
    ]
    return table(["group", "seed", "run", "state", "updates"], rows, numbers=[1, 4], names=[0])


def _link(path: Path, run: RunRecord) -> Markup | str:
    page = run.folder / FILE_NAME
    if not page.exists():
        return run.name
    relative = os.path.relpath(page.resolve(), path.parent.resolve())
    return Markup('<a href="{}">{}</a>').format(quote(relative), run.name)


def _of(metric: MetricComparison, label: str) -> Difference | None:
    return next((each for each in metric.differences if each.label == label), None)


def _verdict(difference: Difference | None) -> Markup | str:
    if difference is None:
        return ABSENT
    kind = KINDS.get(difference.verdict, "quiet")
    return Markup('<span class="{}">{}</span>').format(kind, difference.verdict)


def _signed(value: float) -> str:
    """A difference with its sign.

    >>> _signed(-0.01234), _signed(0.5)
    ('−0.0123', '+0.5')
    """
    return f"{value:+.3g}".replace("-", "−")


def _corrected(p: float | None, holm: float | None) -> str:
    return ABSENT if p is None else f"{_p(p)} → {_p(holm)}"


def _p(value: float | None) -> str:
    """A p-value.

    >>> _p(0.0312), _p(0.00001), _p(None)
    ('0.031', '< 0.001', '–')
    """
    if value is None:
        return ABSENT
    return "< 0.001" if value < 0.001 else f"{value:.3f}" if value < 0.1 else f"{value:.2f}"
