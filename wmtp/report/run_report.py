"""report.html: what a run was, what it reached, and pictures of how."""

import logging
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from wmtp.report import run_plots
from wmtp.report.html import (
    Section,
    block,
    breakable,
    card,
    cards,
    code,
    details,
    facts,
    figures,
    joined,
    key_numbers,
    paragraph,
    quiet,
    table,
    write_page,
)  # fmt: skip
from wmtp.report.plots import page_style
from wmtp.report.run_record import RunRecord
from wmtp.report.token_heatmap import heat_maps, style_sheet

FILE_NAME = "report.html"
STATES = {"FINISHED": "good", "RUNNING": "quiet", "FAILED": "bad", "KILLED": "bad"}


def write_run_page(folder: Path, ending: Mapping[str, Any] | None = None) -> Path:
    """Write the page of the run in a folder, in one piece, and return its path. What is not there is left out.

    `ending` is what status.json is about to say, where the run is just ending.
    """
    run, path = RunRecord(folder, ending or {}), folder / FILE_NAME
    with page_style():
        sections = [section for section in _sections(run) if section.body]
        write_page(path, f"{run.name} – wmtp", _header(run), sections, style_sheet() if run.tokens else "")
    return path


def _sections(run: RunRecord) -> list[Section]:
    return [
        Section("result", "Result", _result(run)),
        Section("curves", "Training", _training(run)),
        Section("weights", "Weights", _weights(run)),
        Section("tokens", "Tokens", _tokens(run)),
        Section("values", "Value head", _values(run)),
        Section("stage", "The stage before", _stage(run)),
        Section("answers", "Answers", _answers(run)),
        Section("config", "Config", _config(run)),
        Section("origin", "Origin", _origin(run)),
    ]


def _header(run: RunRecord) -> Markup:
    status, summary = run.status, run.summary
    state = str(status.get("state", "unknown"))
    title = Markup('<h1>{} <span class="state {}">{}</span></h1>\n').format(run.name, STATES.get(state, "quiet"), state)
    reason = status.get("stop_reason") or summary.get("stop_reason")
    lines = [paragraph(_what(run), "quiet")]
    if reason:
        lines.append(paragraph(f"Stopped early at update {status.get('step', 0):,}. {reason[:1].upper()}{reason[1:]}."))
    if error := status.get("error"):
        exit_code = status.get("exit_code")
        lines.append(paragraph(f"{error}{'' if exit_code is None else f' (exit code {exit_code})'}", "bad"))
    return title + joined(lines)


def _what(run: RunRecord) -> str:
    """The run in a line: its algorithm, model and data, when and how long."""
    chosen = [f"{group} {run.choices[group]}" for group in ("algo", "model", "data") if group in run.choices]
    started, ended = _moment(run.status.get("started")), _moment(run.status.get("ended"))
    when = [f"{started:%d %B %Y, %H:%M}".lstrip("0")] if started else []
    took = [f"{_duration(ended - started)}"] if started and ended else []
    return " · ".join([*chosen, f"seed {run.config.get('seed', '–')}", *when, *took])


def _result(run: RunRecord) -> Markup:
    summary, entries = run.summary, []
    losses, best = run.series("val/loss"), run_plots.best_validation(run)
    if best is not None:
        last_step, last = losses[-1]
        entries.append(
            ("best validation loss", f"{best[1]:.4g}", f"at update {best[0]:,}; last {last:.4g} at {last_step:,}")
        )
    if passes := summary.get("pass@1"):
        low, high, count = passes["low"], passes["high"], passes["problems"]
        interval = "all alike, no interval" if low is None else f"95 %: {low:.2f} to {high:.2f}"
        entries.append(("pass@1, last model", f"{passes['value']:.2f}", f"{interval}; {count} test problems"))
    if "total_steps" in summary:
        skipped = summary.get("skipped_updates") or 0
        entries.append(("updates", f"{summary['total_steps']:,}", f"{skipped} skipped" if skipped else "none skipped"))
        entries.append(("tokens", _short(summary["total_tokens"]), f"{summary['total_tokens']:,} trained on"))
    elif run.status.get("step"):
        until = "so far" if run.status.get("state") == "RUNNING" else "until it ended"
        entries.append(("updates", f"{run.status['step']:,}", until))
    if speed := summary.get("tokens_per_second"):
        entries.append(("tokens per second", f"{speed:,.0f}", f"median; {_device(summary)}"))
    if memory := summary.get("peak_memory_bytes"):
        entries.append(("peak memory", f"{memory / 2**20:,.0f} MiB", "of one process"))
    missing = quiet("There is no summary.json: the run did not end well, or goes on.") if not summary else Markup()
    return key_numbers(entries) + missing


def _training(run: RunRecord) -> Markup:
    shown = figures(
        [
            run_plots.loss_drawing(run),
            run_plots.heads_drawing(run),
            run_plots.update_drawing(run),
            run_plots.speed_drawing(run),
        ]
    )
    return shown or quiet("Nothing was measured yet.")


def _weights(run: RunRecord) -> Markup:
    said = {
        "decisive_wrong_auc": "Wrong solutions: tokens that make them wrong, against their other tokens",
        "noise_auc": "All solutions: noise, against their other tokens",
    }
    quality = {name: area for name, area in (run.summary.get("weights") or {}).items() if area is not None}
    beside = Markup()
    if run_plots.uniform_weights(run):
        beside += quiet("Every target has the weight 1.")
    if quality:
        rows = [(said.get(name, name), f"{area:.3f}") for name, area in quality.items()]
        beside += paragraph(
            "Do the weights find what is known to mislead? The chance that such a token has less weight than another "
            "token of its solution: 1 is perfect, 0.5 is chance."
        )
        beside += table(["what is told apart", "area under ROC"], rows, numbers=[1], wide=[0])
    return figures([run_plots.weights_drawing(run)], beside)


def _tokens(run: RunRecord) -> Markup:
    samples = run.tokens.get("samples")
    if not samples:
        return quiet("No tokens.json: no solution can be shown token by token.") if run.summary else Markup()
    lead = f"Validation solutions as the model sees them at update {run.tokens['step']:,}, token by token."
    return paragraph(lead) + heat_maps(samples)


def _values(run: RunRecord) -> Markup:
    caption = "Explained variance 1: values are the rewards; 0, dotted: no better than their mean; below 0: worse."
    return figures(
        [run_plots.values_drawing(run.metrics, "value-training", caption), run_plots.calibration_drawing(run)]
    )


def _stage(run: RunRecord) -> Markup:
    if not run.stage_metrics:
        return Markup()
    stage = run.summary.get("pretrain") or {}
    updates, tokens = stage.get("total_steps"), stage.get("total_tokens")
    lead = f"{updates:,} updates on {tokens:,} tokens, before those above." if updates and tokens else ""
    caption = "What the value head had learned before the training began."
    shown = figures(
        [run_plots.stage_drawing(run), run_plots.values_drawing(run.stage_metrics, "value-before", caption)]
    )
    return (paragraph(lead) if lead else Markup()) + shown


def _answers(run: RunRecord) -> Markup:
    rows = _pass_rows(run)
    shown = figures([run_plots.pass_rate_drawing(run), run_plots.pass_at_k_drawing(rows)])
    body = shown + samples_body(run)
    return body or quiet("No answers: the data have no tests, or num_samples and num_validation_samples were 0.")


def _pass_rows(run: RunRecord) -> list[tuple[str, dict[str, Any]]]:
    """Estimates of pass@k with what they are of."""
    rows = []
    if passes := run.summary.get("pass@1"):
        rows.append(("pass@1, end of run", passes))
    for evaluation in run.evaluations:
        rows += [(f"pass@{k}, evaluated", entry) for k, entry in (evaluation.get("pass_at_k") or {}).items()]
        for difficulty, part in (evaluation.get("by_difficulty") or {}).items():
            rows += [(f"pass@{k}, difficulty {difficulty}", entry) for k, entry in part["pass_at_k"].items()]
    return rows


def _config(run: RunRecord) -> Markup:
    if not run.config:
        return Markup()
    changed = run.provenance.get("changed")
    lines = block(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
    whole = details("The whole config", lines, printed=True, is_open=changed is None)
    if not changed:
        return (quiet("Every value is its default.") if changed is not None else Markup()) + whole
    rows = [(code(breakable(key)), code(_value(before)), code(_value(now))) for key, (before, now) in changed.items()]
    return table(["what differs", "default", "here"], rows, names=[0], wide=[1, 2]) + whole


def _origin(run: RunRecord) -> Markup:
    provenance, summary = run.provenance, run.summary
    data = provenance.get("data") or {}
    versions = provenance.get("versions") or summary.get("versions") or {}
    entries: Sequence[tuple[str, Any]] = [
        ("folder", code(run.folder.resolve())),
        ("git revision", _code(provenance.get("git_revision"))),
        ("data", _data(data)),
        ("data fingerprint", _code(data.get("fingerprint"))),
        ("config hash", _code(summary.get("config_hash"))),
        ("parameters", _count(summary.get("parameters"))),
        ("device", _device(summary)),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("ended", run.status.get("ended")),
    ]
    command = provenance.get("command")
    typed = [each.lstrip("+").replace("experiment@_global_=", "experiment=") for each in command or []]
    shown = block(shlex.join(["python", "-m", "wmtp.train", *typed])) if command is not None else Markup()
    return shown + facts(entries)


def _code(text: str | None) -> Markup | None:
    return code(text) if text else None


def _count(count: int | None) -> str | None:
    return None if count is None else f"{count:,}"


def _data(data: Mapping[str, Any]) -> str | None:
    splits = {"train": "training", "validation": "validation"}
    sizes = [f"{data[split]:,} {name}" for split, name in splits.items() if split in data]
    return f"{data.get('source') or data.get('name')}: {' and '.join(sizes)} samples" if sizes else None


def _device(summary: Mapping[str, Any]) -> str | None:
    if "device" not in summary:
        return None
    return f"{summary.get('processes', 1)} × {summary['device']}, {summary.get('strategy', 'single')}"


def _value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _short(count: int) -> str:
    """A count in three digits.

    >>> _short(250_689), _short(12), _short(7_000_000_000)
    ('251 k', '12', '7.00 G')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:#.3g}".rstrip(".") + f" {unit}"
    return str(count)


def _moment(text: Any) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _duration(length: timedelta) -> str:
    """A length of time in its two greatest units."""
    seconds = round(length.total_seconds())
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours = seconds // 60, seconds // 3600
    return f"{minutes} min {seconds % 60} s" if minutes < 60 else f"{hours} h {minutes % 60} min"


SHOWN, MOST = 8, 200


def samples_body(run: RunRecord) -> Markup:
    """Answers of the last step that has any, those that pass and those that do not in turn."""
    if not run.samples:
        return Markup()
    step = max(sample["step"] for sample in run.samples)
    latest = [sample for sample in run.samples if sample["step"] == step]
    chosen = [sample for sample in latest if sample.get("split") == "test"] or latest
    passed = [sample for sample in chosen if sample.get("outcome") == "pass"]
    others = [sample for sample in chosen if sample.get("outcome") != "pass"]
    mixed = [sample for pair in zip_longest(passed, others) for sample in pair if sample is not None]
    split = chosen[0].get("split", "held-out")
    judged = f": {len(passed)} of {len(chosen)} pass" if any("outcome" in sample for sample in chosen) else ""
    lead = f"Answers to {split} problems at update {step:,}{judged}."
    body = paragraph(lead) + _cards(mixed[:SHOWN])
    if rest := mixed[SHOWN:MOST]:
        left = f", of {len(mixed) - SHOWN}" if len(mixed) > MOST else ""
        body += details(f"{len(rest)} more{left}", _cards(rest))
    return body


def _cards(samples: Sequence[Mapping[str, Any]]) -> Markup:
    return cards(map(_card, samples))


def _card(sample: Mapping[str, Any]) -> Markup:
    outcome, reason = sample.get("outcome"), sample.get("reason")
    kind = "good" if outcome == "pass" else "bad" if outcome else "quiet"
    said = {"pass": "✓ passes", "fail": f"✗ {reason or 'fails'}", None: "not judged"}.get(outcome, str(outcome))
    difficulty = sample.get("difficulty")
    name = f"{sample['task_id']}{'' if difficulty is None else f' · difficulty {difficulty}'}"
    detail = Markup('<p class="quiet">{}</p>').format(sample["detail"]) if sample.get("detail") else ""
    completion = sample["completion"].rstrip("\n")
    return card(name, kind, said, Markup("<p>{}</p>\n<pre>{}</pre>{}").format(sample["prompt"], completion, detail))


log = logging.getLogger(__name__)
FILE_NAME = "report.html"


def redraw(folder: Path) -> None:
    """Draw a run's page again, if it has one."""
    if (folder / FILE_NAME).exists():
        draw(folder)


def without_page(runs: Sequence[RunRecord]) -> list[Path]:
    """The folders of runs that have no page."""
    return [run.folder for run in runs if not (run.folder / FILE_NAME).exists()]


def draw(folder: Path) -> None:
    """Draw a run's page; a warning where that fails."""
    try:
        write_run_page(folder)
    except OSError as error:
        log.warning("%s could not be written: %s", folder / FILE_NAME, error)
    except Exception as error:
        log.warning("%s could not be drawn: %s: %s", folder / FILE_NAME, type(error).__name__, error, exc_info=True)
