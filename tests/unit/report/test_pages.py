"""Tests of the pages of runs and comparisons: content, and layout and contrast in a browser."""

import json
import math
import random
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.support.browser import LEAST_CONTRAST, SIZES, faults
from tests.support.fake_runs import fake_run, write_json, write_lines
from tests.support.pages import HOSTILE, TOKENS, example_comparison, rich_run, tokens
from wmtp.report.comparison_plots import plot_curves
from wmtp.report.comparison_report import describe_difference, write_comparison_report
from wmtp.report.plots import MAX_POINTS, downsample_indices, line_style, plot_style
from wmtp.report.results import Comparison, FailedRuns
from wmtp.report.run_plots import plot_loss, plot_updates
from wmtp.report.run_record import RunRecord
from wmtp.report.run_report import write_run_report
from wmtp.report.token_heatmap import TEXT, TOKEN_METRICS
from wmtp.training.summary import median_speed

if TYPE_CHECKING:
    from playwright.sync_api import Browser

SWITCHES = tuple(f"#by-{measure.name}" for measure in TOKEN_METRICS)
in_browser = pytest.mark.xdist_group("browser")


class Tags(HTMLParser):
    """The tags, ids, links and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.names: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def run_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_report(rich_run(tmp_path_factory.mktemp("run") / "run"))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return example_comparison(tmp_path_factory.mktemp("compared"))


@pytest.fixture(scope="module")
def comparison_page(comparison: Comparison) -> Path:
    path = comparison.groups["critic"][0].folder.parents[1] / "compare.html"
    write_comparison_report(path, comparison)
    return path


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_the_page_of_a_run_has_no_fault(browser: "Browser", run_page: Path, width: int, scheme: str) -> None:
    assert faults(browser, run_page, width, scheme, switches=SWITCHES if width > 1_000 else ()) == []


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_the_page_of_a_comparison_has_no_fault(
    browser: "Browser", comparison_page: Path, width: int, scheme: str
) -> None:  # fmt: skip
    assert faults(browser, comparison_page, width, scheme) == []


@in_browser
@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ("<script>console.warn('oh')</script>", "console: warning: oh"),
        ("<script>throw Error('oh')</script>", "error: oh"),
        ("<script>alert('oh')</script>", "dialog: oh"),
        ("<img src='http://localhost:9/x.png' alt=''>", "request: http://localhost:9/x.png"),
        ("<p style='width: 2000px'>wide</p>", "overflow: the page scrolls sideways"),
        ("<p style='position: absolute; left: 1270px; width: 20px; overflow: hidden'>x</p>", "overflow: p"),
        ("<section>one</section><section style='margin-top: -2rem'>two</section>", 'overlap: section "one"'),
        ("<p style='color: #999'>faint</p>", "contrast: 2.85"),
        ("<figure><svg viewBox='0 0 100 100'><text x=0 y=50>one</text><text x=4 y=50>two</text></svg></figure>",
         'overlap: text "one"'),
        ("<figure><svg viewBox='0 0 100 100'><text x=95 y=50>one</text></svg></figure>", 'cut off: text "one"'),
        ("<figure><svg viewBox='0 0 9000 99'><text x=0 y=50>one</text></svg></figure>", 'small text: text "one"'),
    ],
)  # fmt: skip
def test_control_a_broken_page_has_faults(browser: "Browser", tmp_path: Path, broken: str, found: str) -> None:
    (tmp_path / "page.html").write_text(f"<!doctype html><body>{broken}</body>")
    assert any(problem.startswith(found) for problem in faults(browser, tmp_path / "page.html", 1280, "light"))


@in_browser
@pytest.mark.slow
def test_a_correct_page_has_no_fault(browser: "Browser", tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<!doctype html><body><p>whole</p></body>")
    assert faults(browser, tmp_path / "page.html", 1280, "light") == []


@in_browser
@pytest.mark.slow
def test_a_switch_colors_the_tokens_without_scripts(browser: "Browser", run_page: Path) -> None:
    page = browser.new_page(java_script_enabled=False)
    page.goto(run_page.as_uri())
    token = page.locator(".solution .decisive").first
    colors = {}
    for switch in SWITCHES:
        page.check(switch)
        colors[switch] = token.evaluate("each => getComputedStyle(each).backgroundColor")
    assert len(set(colors.values())) == len(SWITCHES)
    borders = [page.locator(f".solution .{name}").first.evaluate("each => getComputedStyle(each).borderBottomStyle")
               for name in ("decisive", "noise")]  # fmt: skip
    assert borders == ["solid", "dotted"]
    solution = page.locator(".solution").first.evaluate("each => each.textContent")
    assert solution == "".join(TOKENS[:-1]) + HOSTILE
    page.close()


@in_browser
@pytest.mark.slow
def test_a_printed_page_is_light_and_expanded(browser: "Browser", run_page: Path) -> None:
    page = browser.new_page(color_scheme="dark")
    page.goto(run_page.as_uri())
    look = """() => [
        getComputedStyle(document.body).backgroundColor, document.querySelector('.printed pre').checkVisibility()
    ]"""
    on_screen = page.evaluate(look)
    page.emulate_media(media="print", color_scheme="dark")
    on_paper = page.evaluate(look)
    assert on_screen == ["rgb(20, 23, 26)", False]
    assert on_paper == ["rgb(255, 255, 255)", True]
    page.close()


def test_text_from_a_run_is_escaped(run_page: Path, comparison_page: Path) -> None:
    for page in (run_page, comparison_page):
        tags = Tags(page)
        assert "script" not in tags.names and "img" not in tags.names
        assert HOSTILE in tags.text
    run_page.with_name("unescaped.html").write_text(run_page.read_text() + HOSTILE)
    assert "img" in Tags(run_page.with_name("unescaped.html")).names


def test_a_page_is_self_contained(run_page: Path, comparison_page: Path) -> None:
    for page in (run_page, comparison_page):
        tags = Tags(page)
        inside = [link for link in tags.links if link.startswith("#")]
        assert {link.removeprefix("#") for link in inside} <= set(tags.ids)
        others = {link for link in tags.links if link not in inside} - {"data:,"}
        assert all((page.parent / link).exists() for link in others)
        assert not re.search(r"url\((?!#)|@import|<\?xml|<!DOCTYPE svg|<metadata", page.read_text())
        assert page.stat().st_size < 1_500_000


def test_ids_are_unique(run_page: Path, comparison_page: Path) -> None:
    for page in (run_page, comparison_page):
        ids = Tags(page).ids
        assert len(ids) == len(set(ids))
        clips = re.findall(r'id="([\w-]+)-(?:p\w+)"', page.read_text())
        assert len(set(clips)) > 3, "clip paths of different figures do not have different ids"


def test_headings_are_in_order(run_page: Path, comparison_page: Path) -> None:
    for page in (run_page, comparison_page):
        levels = [int(name[1]) for name in Tags(page).names if re.fullmatch(r"h\d", name)]
        assert levels.count(1) == 1 and levels[0] == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))


def test_the_page_of_a_run_shows_all_parts(run_page: Path) -> None:
    text = Tags(run_page).text
    for text_part in (
        "Stopped early at update 400", "30 of the last 40 gradient norms", "stopped early at 400",
        "the last 40 updates", "too large: above 3", "0.710", "algo.beta", "python -m wmtp.train algo=critic",
        "best: 0.5498 at 400", "Crosses: not finite (1)", "8 of 16 pass", "8 more", "head 4",
        "pass@4, difficulty 2", "0.260", "1 / number of tokens", "0.053", "pass@1 at temperature 1",
        "Samples at temperature 1 for the same problems: 16 of 48 pass", "test/0 · difficulty 2 · sample 3",
        "probability of correct solutions",
    ):  # fmt: skip
        assert text_part in text, text_part
    assert "train_head" not in text


@pytest.mark.parametrize("state", ["RUNNING", "FAILED", "KILLED", "FINISHED"])
def test_a_run_with_few_files_has_a_page(tmp_path: Path, state: str) -> None:
    run = fake_run(tmp_path / "run", state=state, tokens=False)
    (run / "metrics.jsonl").unlink()
    text = Tags(write_run_report(run)).text
    assert state in text and "No metrics are recorded yet." in text
    assert ("There is no summary.json" in text) == (state != "FINISHED")


def test_a_run_with_only_a_status_has_a_page(tmp_path: Path) -> None:
    write_json(tmp_path / "status.json", {"state": "FAILED", "error": "no <config>", "exit_code": 2})
    text = Tags(write_run_report(tmp_path)).text
    assert "no <config> (exit code 2)" in text


def test_uniform_weights_are_noted(tmp_path: Path, run_page: Path) -> None:
    run = fake_run(tmp_path / "run", metrics={f"train/weight_{name}": [1.0, 1.0] for name in ("mean", "min", "max")})
    write_json(run / "tokens.json", tokens(random.Random(0), weighted=False))
    page = Tags(write_run_report(run))
    assert "Every target has the weight 1." in page.text and "by-weight" not in page.ids and "by-value" not in page.ids
    weighted = Tags(run_page)
    assert "Every target has the weight 1." not in weighted.text and "by-weight" in weighted.ids


@pytest.mark.slow
def test_a_truncated_last_sample_is_left_out(tmp_path: Path) -> None:
    run = rich_run(tmp_path / "run")
    complete_text = Tags(write_run_report(run)).text
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": 999, "task_id": "te')
    assert Tags(write_run_report(run)).text == complete_text
    (run / "samples.jsonl").write_text("torn\n" + (run / "samples.jsonl").read_text())
    with pytest.raises(json.JSONDecodeError):
        write_run_report(run)


@pytest.mark.parametrize(("norm", "scale"), [(0.0, "linear"), (2.0, "log")])
@pytest.mark.filterwarnings("error")
def test_gradient_norms_of_zero_are_plotted_on_a_linear_axis(tmp_path: Path, norm: float, scale: str) -> None:
    run = fake_run(tmp_path / "run", metrics={"train/grad_norm": [0.0, norm], "train/lr": [0.1, 0.1]})
    write_run_report(run)
    plot = plot_updates(RunRecord(run))
    assert plot is not None and plot.figure.axes[0].get_yscale() == scale


def test_the_page_lists_changed_config_keys(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    assert "changed key" not in Tags(write_run_report(run)).text
    provenance = json.loads((run / "provenance.json").read_text())
    write_json(run / "provenance.json", provenance | {"changed": {}})
    assert "Every value is its default." in Tags(write_run_report(run)).text
    write_json(run / "provenance.json", provenance | {"changed": {"seed": [None, 3]}})
    assert "changed key" in Tags(write_run_report(run)).text


def test_pages_of_long_runs_stay_small(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    lines = [{"step": step, "train/loss": 1 / step, "train/grad_norm": 1 + step % 7} for step in range(1, 20_001)]
    write_lines(run / "metrics.jsonl", lines)
    assert write_run_report(run).stat().st_size < 300_000


def test_a_downsampled_curve_keeps_its_peaks() -> None:
    values = np.sin(np.arange(50_000) / 700)
    values[[11_111, 33_333]] = 9, -9
    kept = downsample_indices(values)
    assert len(kept) <= MAX_POINTS + 2 and {0, 11_111, 33_333, 49_999} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert not {11_111, 33_333} & set(range(0, 50_000, 50)), "keeping every n-th point would keep the peaks too"


def test_the_scale_of_weights_is_symmetric_around_one() -> None:
    weights = TOKEN_METRICS[0]
    last = len(weights.colors) - 1
    assert len(weights.edges) == last
    for weight in (1.0, 1.05, 1.2, 1.5, 3.0, 5.0, 100.0):
        assert weights.step(weight) + weights.step(1 / weight) == last
    assert weights.step(1.0) == last / 2 and weights.step(0.0) == 0
    assert weights.step(1.9) + weights.step(0.1) != last, "the scale is linear"


@pytest.mark.parametrize("measure", TOKEN_METRICS, ids=lambda measure: measure.name)
@pytest.mark.parametrize("paper", [0, 1], ids=["light", "dark"])
def test_tokens_are_readable_on_every_color(measure: Any, paper: int) -> None:
    contrasts = [contrast(TEXT[paper], colors[paper]) for colors in measure.colors]
    assert min(contrasts) >= LEAST_CONTRAST
    assert contrast((0x99, 0x99, 0x99), (255, 255, 255)) < LEAST_CONTRAST
    one_sided = contrasts[len(contrasts) // 2 :] if measure.name == "weight" else contrasts
    assert one_sided == sorted(one_sided, reverse=True), "contrast does not decrease with the value"


@pytest.mark.parametrize("paper", [0, 1], ids=["light", "dark"])
def test_high_and_low_weights_differ_in_brightness(paper: int) -> None:
    colors = [both[paper] for both in TOKEN_METRICS[0].colors]
    neutral = colors[len(colors) // 2]
    less, more = (contrast(color, neutral) for color in (colors[0], colors[-1]))
    assert more > 1.3 * less > 1.3


def contrast(first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """Return the contrast ratio of two colors, as defined by WCAG 2."""

    def luminance(color: tuple[int, ...]) -> float:
        parts = [part / 255 for part in color]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_the_page_of_a_comparison_has_the_result_in_words(comparison: Comparison, comparison_page: Path) -> None:
    tags = Tags(comparison_page)
    for metric in comparison.metrics:
        for difference in metric.differences:
            assert difference.label in tags.text and difference.verdict in tags.text
    for difference in comparison.metrics[0].differences:
        assert describe_difference(difference) in tags.text
    for note in comparison.notes:
        assert note in tags.text
    for text in ("canonical logprob", "-12.5", "decisive wrong top1", "0.478", "1 / number of tokens is chance"):
        assert text in tags.text
    assert "about 23 seeds" in tags.text and "9 : 3" in tags.text and "cannot give a p below 0.0625" in tags.text
    runs = [run for members in comparison.groups.values() for run in members]
    pages = {(comparison_page.parent / link).resolve() for link in tags.links if link.endswith("report.html")}
    assert pages == {(run.folder / "report.html").resolve() for run in runs}


def test_an_interval_that_excludes_zero_does_not_contradict_the_verdict(comparison: Comparison) -> None:
    shown, second = comparison.metrics[0].differences
    beside = replace(second, low=0.001, high=0.01, mean=0.005)
    assert "corrected, it would include zero" in describe_difference(beside)
    assert "corrected, it would include zero" not in describe_difference(second) + describe_difference(shown)


def test_too_few_seeds_give_no_verdict(comparison: Comparison) -> None:
    alone = replace(comparison.metrics[0].differences[0], pairs={0: -0.1}, low=None, high=None, verdict="too few seeds")
    assert "The difference may be chance" in describe_difference(alone)
    assert describe_difference(replace(alone, pairs={})) == "No seed has a run in both groups."
    equal = replace(alone, pairs=dict.fromkeys(range(5), -0.1), verdict="undecided")
    assert "over 5 seeds. The difference is the same for every seed" in describe_difference(equal)


def test_failed_runs_and_their_effect_on_the_verdict_are_shown(tmp_path: Path, comparison: Comparison) -> None:
    requested, *rest = comparison.metrics
    text_part = " 2 of 5 runs failed. The remaining runs may be better than average"
    lost = replace(requested.differences[0], verdict="runs failed", lost=FailedRuns(2, 5))
    groups = [requested.groups[0], replace(requested.groups[1], lost=FailedRuns(2, 5)), *requested.groups[2:]]
    failed = replace(requested, groups=groups, differences=[lost, *requested.differences[1:]])
    write_comparison_report(tmp_path / "failed.html", replace(comparison, metrics=[failed, *rest]))
    write_comparison_report(tmp_path / "whole.html", comparison)
    for name, expected in (("failed.html", True), ("whole.html", False)):
        text = Tags(tmp_path / name).text
        assert (text_part in text) == ("without a value" in text) == expected
    baseline = describe_difference(replace(lost, lost=FailedRuns(0, 5), baseline_lost=FailedRuns(1, 5)))
    assert " 1 of 5 baseline runs failed." in baseline


@pytest.mark.parametrize("parts", ["color dash marker", "color dash", "color marker"])
def test_twelve_groups_have_different_styles(parts: str) -> None:
    styles = [tuple(str(getattr(line_style(number), part)) for part in parts.split()) for number in range(12)]
    assert len(set(styles)) == 12
    assert len({line_style(number).color for number in range(12)}) < 12, "colors alone are sufficient"


@pytest.mark.parametrize(("num_groups", "with_runs"), [(4, True), (5, False)])
def test_single_runs_are_plotted_for_few_groups(tmp_path: Path, num_groups: int, with_runs: bool) -> None:
    groups = {
        f"g{group}": [RunRecord(fake_run(tmp_path / f"{group}-{seed}", seed=seed)) for seed in range(2)]
        for group in range(num_groups)
    }
    plot = plot_curves(groups, "val/loss")[0]
    assert len(plot.figure.axes[0].lines) == num_groups * (3 if with_runs else 1)
    assert ("thin lines: runs" in plot.caption) == with_runs


def test_config_differences_start_with_the_keys_in_the_labels(tmp_path: Path, comparison: Comparison) -> None:
    more = {"algo._target_": "wmtp.algorithms", "pretrain.algo.name_of_it": "critic", "pretrain.algo@x": "critic"}
    options: dict[str, dict[str, Any]] = {"baseline": {}, "critic, optimizer.lr=0.1": more | {"optimizer.lr": 0.1}}
    groups = {
        label: [RunRecord(fake_run(tmp_path / label, algo=label.split(",")[0], **options[label]))] for label in options
    }
    metrics = [replace(comparison.metrics[0], groups=comparison.metrics[0].groups[:2], differences=[])]
    write_comparison_report(
        tmp_path / "page.html", replace(comparison, groups=groups, metrics=metrics, tokens_to_target=[])
    )
    page = (tmp_path / "page.html").read_text()
    part = page[page.index('id="differs"') : page.index('id="runs"')]
    shown, folded = part.split("<details", 1)
    assert "open" not in folded.split(">")[0]
    assert "optimizer.<wbr>lr" in shown and "pretrain" not in shown
    assert "pretrain.<wbr>algo.<wbr>name_<wbr>of_<wbr>it" in folded
    assert "_target_" not in part.replace("<wbr>", "") and "@" not in part


def test_the_second_half_of_a_curve_does_not_count_the_tokens_of_stage_1(tmp_path: Path) -> None:
    """The control cuts at half of all tokens: after a stage 1 of more tokens, it leaves out nothing."""
    run = RunRecord(fake_run(tmp_path / "run", val_losses=[4.0, 3.0, 2.0, 1.0], stage_tokens=100_000))
    whole, half = (plot.figure.axes[0].lines[0].get_xdata() for plot in plot_curves({"critic": [run]}, "val/loss"))
    assert list(whole) == [110_000, 120_000, 130_000, 140_000] and list(half) == [130_000, 140_000]
    assert [x for x in whole if x >= max(whole) / 2] == list(whole)


@pytest.mark.parametrize(("end", "scale"), [(0.0186, "log"), (0.9, "linear"), (0.0, "linear"), (math.nan, "linear")])
def test_small_losses_can_be_told_apart(tmp_path: Path, end: float, scale: str) -> None:
    """The controls are losses of one magnitude, and losses for which there is no logarithmic axis."""
    with plot_style():
        folder = fake_run(tmp_path / "run", val_losses=[6.0, end], metrics={"train/loss": [6.0, 3.0]})
        plots = [plot_loss(RunRecord(folder)), *plot_curves({"critic": [RunRecord(folder)]}, "val/loss")]
    assert {plot.figure.axes[0].get_yscale() for plot in plots if plot} == {scale}


def test_the_verdicts_on_all_metrics_have_a_row_for_each_group(comparison_page: Path, comparison: Comparison) -> None:
    """A column for each group would be cut off with eight groups."""
    page = comparison_page.read_text()
    start = page.index("Verdicts for all metrics")
    head = page[start : page.index("</thead>", start)]
    assert [metric.metric in head for metric in comparison.metrics] == [True, True] and "critic" not in head


def test_the_page_shows_one_median_of_the_speed(tmp_path: Path) -> None:
    """With an even number of speeds, the larger of the two middle ones is not the median."""
    speeds = [100.0, 200.0, 400.0, 800.0]
    run = fake_run(tmp_path / "run", val_losses=speeds, metrics={"train/tokens_per_second": speeds})
    summary = json.loads((run / "summary.json").read_text()) | {"tokens_per_second": median_speed(run)}
    write_json(run / "summary.json", summary)
    page = write_run_report(run).read_text()
    assert median_speed(run) == 300.0 and ">300</dd>" in page and "median 300<" in page


def test_the_page_of_a_job_is_titled_by_its_settings(tmp_path: Path) -> None:
    """The control is a run outside of a sweep, which is titled by its folder."""
    overrides = [["algo=critic", f"seed={seed}"] for seed in range(2)]
    write_json(
        tmp_path / "sweep.json", {"jobs": [{"number": n, "overrides": each} for n, each in enumerate(overrides)]}
    )
    names = [RunRecord(fake_run(tmp_path / folder)).name for folder in ("1", "other", "inside/1")]
    assert names == ["seed=1", "other", "1"]


def test_a_metric_without_curves_is_noted(tmp_path: Path, comparison: Comparison) -> None:
    for metrics, expected in ((comparison.metrics, False), (comparison.metrics[::-1], True)):
        write_comparison_report(tmp_path / "page.html", replace(comparison, metrics=metrics))
        assert ("pass@1 is not a loss that all validations have" in Tags(tmp_path / "page.html").text) == expected


def test_a_comparison_of_one_group_has_a_page(tmp_path: Path, comparison: Comparison) -> None:
    alone = replace(comparison.metrics[0], groups=comparison.metrics[0].groups[:1], differences=[])
    groups = {"baseline": comparison.groups["baseline"]}
    write_comparison_report(tmp_path / "page.html", Comparison("baseline", [alone], groups, "val/loss", []))
    assert "nothing can be compared" in Tags(tmp_path / "page.html").text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("wmtp.report.run_record", ["matplotlib", "scipy", "torch"]),
        (
            "wmtp.report.run_report, wmtp.report.comparison_report",
            ["hydra", "omegaconf", "torch", "mlflow", "matplotlib.pyplot"],
        ),
    ],
)
def test_report_modules_do_not_import_unneeded_packages(modules: str, absent: list[str]) -> None:
    script = f"import {modules}, sys; print([name for name in {[*absent, 'json']} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['json']"
