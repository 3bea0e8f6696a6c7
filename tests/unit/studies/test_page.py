"""Tests of the page and of the terminal tables of a study: content, and layout and contrast in a browser."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from tests.support.browser import SIZES, faults
from tests.support.studies import DEPARTURES, example_study
from tests.unit.report.test_pages import Tags
from wmtp.report.plots import plot_style
from wmtp.statistics.best_of_n import BestOfN
from wmtp.statistics.power import seeds_needed, seeds_needed_for_equivalence
from wmtp.statistics.token_factor import TokenFactor
from wmtp.studies.evidence_sections import ends_section
from wmtp.studies.lock_section import lock_section
from wmtp.studies.page import write_study_page
from wmtp.studies.plots import plot_best_of_n, plot_ends, plot_factors, plot_power
from wmtp.studies.results import ArmSearch, StudyResult
from wmtp.studies.tables import arm_rows, print_study

if TYPE_CHECKING:
    from playwright.sync_api import Browser

in_browser = pytest.mark.xdist_group("browser")
Printed = Callable[[StudyResult], str]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    return example_study(tmp_path_factory.mktemp("small"), 3, is_open=False)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> StudyResult:
    return example_study(tmp_path_factory.mktemp("large"), 13, departures=DEPARTURES)


@pytest.fixture(scope="module")
def small_page(small: StudyResult) -> Path:
    return _write(small)


@pytest.fixture(scope="module")
def large_page(large: StudyResult) -> Path:
    return _write(large)


def _write(result: StudyResult) -> Path:
    assert result.comparison is not None
    path = result.comparison.groups["baseline"][0].folder.parents[3] / "study.html"
    write_study_page(path, result)
    return path


def _printed(result: StudyResult) -> str:
    console = Console(width=80, record=True, quiet=False, file=Path("/dev/null").open("w"))  # noqa: SIM115
    print_study(console, result)
    return console.export_text()


def _section(page: Path, name: str) -> str:
    content = page.read_text()
    start = content.index(f'<section id="{name}"')
    return content[start : content.index("</section>", start)]


def _rows(markup: str) -> list[list[str]]:
    """Return the text of the cells of all tables in markup, without their heads."""
    text = markup.replace("<wbr>", "")
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]
    return [[re.sub(r"<[^>]+>", "", cell) for cell in row] for row in rows if row]


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_the_page_of_a_study_has_no_fault(
    browser: "Browser", small_page: Path, large_page: Path, width: int, scheme: str
) -> None:  # fmt: skip
    assert faults(browser, small_page, width, scheme) == []
    assert faults(browser, large_page, width, scheme) == []


def test_the_page_is_self_contained_and_links_the_runs(large: StudyResult, large_page: Path) -> None:
    tags = Tags(large_page)
    inside = [link for link in tags.links if link.startswith("#")]
    assert {link.removeprefix("#") for link in inside} <= set(tags.ids)
    pages = {(large_page.parent / link).resolve() for link in {*tags.links} - {*inside, "data:,"}}
    assert large.comparison is not None
    runs = [run for group in large.comparison.groups.values() for run in group]
    assert pages == {(run.folder / "report.html").resolve() for run in runs}
    assert len(tags.ids) == len(set(tags.ids)) and "script" not in tags.names
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org)", large_page.read_text())
    assert large_page.stat().st_size < 1_500_000


def test_verdicts_are_first_and_complete(large: StudyResult, large_page: Path) -> None:
    sections = re.findall(r'<section id="([\w-]+)"', large_page.read_text())
    assert sections == [
        "verdicts", "departures", "search", "ends", "differences", "power", "others", "reading", "notes", "lock",
        "runs",
    ]  # fmt: skip
    rows = {row[0]: row for row in _rows(_section(large_page, "verdicts"))}
    for row in arm_rows(large):
        assert row.difference is not None
        assert rows[row.label][1] == row.difference.verdict
        assert rows[row.label][4] == str(len(row.difference.pairs))
        assert rows[row.label][5] == ("yes" if row.difference.is_within_delta else "not shown")
    assert rows["critic"][6] == "0.70 (0.59 to 0.84)" and rows["oracle"][6] == "1.04 (0.88 to 1.25), extrapolated"
    oracle = next(row.difference for row in arm_rows(large) if row.label == "oracle")
    assert oracle is not None
    values, delta, num_arms = list(oracle.pairs.values()), large.lock.options.delta, len(large.lock.options.others)
    assert delta is not None
    different = seeds_needed(mean(values), stdev(values), num_arms, len(values))
    same = seeds_needed_for_equivalence(mean(values), stdev(values), delta, num_arms)
    needed = min(each for each in (different, same) if each is not None)
    assert rows["oracle"][7] == str(needed - len(values)) and rows["critic"][7] == "–"
    assert rows.keys() == {*large.lock.options.others}


def test_arms_are_sorted_by_the_difference(large: StudyResult, large_page: Path) -> None:
    """The control is a metric of which higher values are better, for which the order is the opposite."""
    assert large.comparison is not None
    means = {each.label: each.mean for each in large.comparison.metrics[0].differences}
    labels = [row[0] for row in _rows(_section(large_page, "verdicts"))]
    assert labels == sorted(means, key=lambda label: means[label]) != large.lock.options.others
    metric = replace(large.comparison.metrics[0], lower_is_better=False)
    opposite = replace(large, comparison=replace(large.comparison, metrics=[metric]))
    assert [row.label for row in arm_rows(opposite)] == labels[::-1]


def test_trials_are_sorted_by_their_mean(small: StudyResult, small_page: Path) -> None:
    section = _section(small_page, "search")
    rows = [row for row in _rows(section[section.index("All trials") :]) if row[0] == "critic"]
    assert len(rows) == 16 and rows[-1][2] == "–", "a trial without a mean is last"
    means = [float(row[2]) for row in rows[:-1]]
    assert means == sorted(means)
    assert "Fewer trials have a value: critic 15 of 16." in Tags(small_page).text


def test_departures_are_visible(small_page: Path, large_page: Path) -> None:
    assert all(departure in _section(large_page, "departures") for departure in DEPARTURES)
    assert 'class="warning"' in _section(large_page, "departures") and "2 departures" in Tags(large_page).text
    assert "No departures" in _section(small_page, "departures")
    assert 'class="warning"' not in small_page.read_text() and "1 departure" not in Tags(small_page).text


def test_the_state_says_which_arms_are_open(large: StudyResult, small_page: Path, large_page: Path) -> None:
    assert f"Open: {', '.join(large.open_arms)}." in Tags(large_page).text and "3 of 8" in Tags(large_page).text
    assert "The study has ended" in Tags(small_page).text and "not finished" not in Tags(small_page).text


def test_extrapolation_is_said(large: StudyResult, large_page: Path, small: StudyResult) -> None:
    """The control is a study in which no factor was extrapolated."""
    labels = [arm.label for arm in large.horizons if arm.factor and arm.factor.is_extrapolated]
    assert f"Extrapolated, at least for one seed: {', '.join(labels)}." in Tags(large_page).text
    with plot_style():
        inside = ends_section(_with_factor(small, TokenFactor(0.7, 0.6, 0.8, 8, 0, 0)))
    assert "Nothing was extrapolated." in inside and "least for one seed" not in inside


def _with_factor(result: StudyResult, factor: TokenFactor) -> StudyResult:
    return replace(result, horizons=[replace(arm, factor=arm.factor and factor) for arm in result.horizons])


def test_the_fit_is_dashed_where_it_is_extrapolated(small: StudyResult) -> None:
    """The control is a factor that lies within the horizons."""
    dashes = []
    for factor in (1.5, 0.8):
        study = _with_factor(small, TokenFactor(factor, None, None, 8, 0, 0))
        with plot_style():
            plot = plot_ends(study.horizons, "baseline", "val/loss")
        assert plot is not None
        dashes.append([line.get_linestyle() for line in plot.figure.axes[1].lines].count("--"))
    assert dashes == [1, 0]


def test_every_arm_has_a_panel(large: StudyResult) -> None:
    with plot_style():
        plots = [
            plot_best_of_n(large.searches, "baseline", "val/loss"),
            plot_ends(large.horizons, "baseline", "val/loss"),
        ]
    for plot in plots:
        assert plot is not None
        titles = [axes.get_title(loc="left") for axes in plot.figure.axes]
        assert len(titles) == len(set(titles)) == 12


def test_a_diverged_trial_does_not_hide_the_others() -> None:
    """The control has no such trial, so the axis shows all values."""
    limits = []
    for first in (50.0, 1.3):
        points = [BestOfN(n, value, value - 0.1, value + 0.1) for n, value in enumerate([first, 1.2, 1.1, 1.0], 1)]
        with plot_style():
            plot = plot_best_of_n([ArmSearch(label, [], None, points) for label in ("a", "b")], "a", "val/loss")
        assert plot is not None
        limits.append((plot.figure.axes[0].get_ylim()[1] > first, plot.figure.axes[0].get_yscale()))
    assert limits == [(True, "log"), (True, "linear")]


def test_factors_are_sorted(large: StudyResult) -> None:
    with plot_style():
        plot = plot_factors(large.horizons, "baseline")
    assert plot is not None
    values = [float(value) for value in re.findall(r" ([\d.]+)(?:;|$)", plot.label)]
    assert len(values) == 12 and values == sorted(values)


def test_power_rises_from_the_level_with_the_size_of_the_difference(small: StudyResult) -> None:
    with plot_style():
        axes = plot_power(small).figure.axes[0]
    curve = next(line for line in axes.lines if str(line.get_label()).startswith("planned"))
    powers = [float(value) for value in curve.get_ydata()]  # type: ignore[arg-type,union-attr]
    assert powers[0] <= 0.05 and powers == sorted(powers) and powers[-1] > 0.9
    labels = [str(line.get_label()) for line in axes.lines]
    assert {"declared effect: 0.05", "δ: 0.01"} <= {*labels}
    assert any(label.startswith("largest observed") for label in labels)


def test_the_lock_is_shown(small: StudyResult, small_page: Path) -> None:
    text = _section(small_page, "lock").replace("<wbr>", "")
    for part in (
        small.lock.sha256, "the content matches it", "algo.beta=interval(0.5, 0.9)", "0, 1, 2, 3, 4, 5, 6, 7",
        "The first look at the results is after 3 seeds", "at most 5 %", "200, 800, 3,200 updates", "experiment=tasks",
    ):  # fmt: skip
        assert part in text, part
    edited = replace(small.lock, written="2020-01-01T00:00:00+00:00")
    assert "the content does not match it" in lock_section(edited)


def test_other_readings_are_without_claim(large_page: Path, large: StudyResult) -> None:
    others = _section(large_page, "others")
    assert "pass@1" in others and "makes no claim" in others
    assert not re.search(r'class="(good|bad)"', others), "a verdict on another metric"
    assert "no verdict uses it" in _section(large_page, "reading") and "median ratio" in _section(large_page, "reading")


def test_a_study_without_judged_runs_has_a_page(tmp_path: Path, small: StudyResult) -> None:
    empty = replace(
        small, comparison=None, searches=[], horizons=[], pairing={}, variance={}, open_arms=["critic", "oracle"],
        planned=replace(small.planned, observed_deviations={}),
    )  # fmt: skip
    write_study_page(tmp_path / "study.html", empty)
    text = Tags(tmp_path / "study.html").text
    assert "no runs yet" in text and "No trial has finished yet." in text and "No judged run has finished yet." in text
    assert "no runs yet" in _printed(empty)


def test_the_terminal_shows_the_result_in_80_columns(large: StudyResult, small: StudyResult) -> None:
    printed = _printed(large)
    assert max(map(len, printed.splitlines())) <= 80 and "…" not in printed
    for verdict in ("better", "worse", "the same", "undecided", "too few seeds", "runs failed"):
        assert re.search(rf" {verdict} ", printed), verdict
    assert all(departure in printed for departure in DEPARTURES) and "Departures from the lock: 2" in printed
    assert "Departures from the lock: none" in _printed(small) and "optimizer.lr=0.0" in printed
    assert re.search(r"critic +0.70 +0.59 to 0.84 +8 +0 +0", printed), "the factor of critic"
