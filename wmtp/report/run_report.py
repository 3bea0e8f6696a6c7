"""Creation of report.html, the page that shows the results, plots, samples and config of a run."""

import logging
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from wmtp.config.flatten import merge_absent_parts
from wmtp.report import run_plots
from wmtp.report.html import (
    Section,
    breakable,
    code,
    code_block,
    details,
    facts,
    figures,
    join,
    key_numbers,
    muted_paragraph,
    paragraph,
    table,
    write_html,
)  # fmt: skip
from wmtp.report.measure_tables import weights_table
from wmtp.report.measures import SAMPLED_PASS
from wmtp.report.plots import plot_style
from wmtp.report.run_record import RunRecord, evaluated_on
from wmtp.report.sample_cards import latest_samples
from wmtp.report.token_heatmap import style_sheet, token_heatmaps

FILE_NAME = "report.html"
log = logging.getLogger(__name__)
STATES = {"FINISHED": "good", "RUNNING": "quiet", "FAILED": "bad", "KILLED": "bad"}


def write_run_report(folder: Path, final_status: Mapping[str, Any] | None = None) -> Path:
    """Write the HTML page of a run atomically and return the path of the page.

    Args:
        folder: folder of the run.
        final_status: fields that replace those of status.json if the final status of the run is not saved yet.
    """
    run, path = RunRecord(folder, final_status or {}), folder / FILE_NAME
    with plot_style():
        sections = [section for section in _sections(run) if section.body]
        write_html(path, f"{run.name} – wmtp", _header(run), sections, style_sheet() if run.tokens else "")
    return path


def _sections(run: RunRecord) -> list[Section]:
    return [
        Section("result", "Result", _result(run)),
        Section("curves", "Training", _training(run)),
        Section("weights", "Weights", _weights(run)),
        Section("tokens", "Tokens", _tokens(run)),
        Section("values", "Value head", _values(run)),
        Section("stage", "Stage 1", _pretrain(run)),
        Section("answers", "Samples", _sampling(run)),
        Section("config", "Config", _config(run)),
        Section("origin", "Provenance", _provenance(run)),
    ]


def _header(run: RunRecord) -> Markup:
    status, summary = run.status, run.summary
    state = str(status.get("state", "unknown"))
    title = Markup('<h1>{} <span class="state {}">{}</span></h1>\n').format(run.name, STATES.get(state, "quiet"), state)
    reason = status.get("stop_reason") or summary.get("stop_reason")
    lines = [paragraph(_description(run), "quiet")]
    if reason:
        lines.append(paragraph(f"Stopped early at update {status.get('step', 0):,}. {reason[:1].upper()}{reason[1:]}."))
    if error := status.get("error"):
        exit_code = status.get("exit_code")
        lines.append(paragraph(f"{error}{'' if exit_code is None else f' (exit code {exit_code})'}", "bad"))
    return title + join(lines)


def _description(run: RunRecord) -> str:
    """Return one line that names the run's algorithm, model, data, seed, start time and duration."""
    chosen = [f"{group} {run.choices[group]}" for group in ("algo", "model", "data") if group in run.choices]
    started, ended = _parse_time(run.status.get("started")), _parse_time(run.status.get("ended"))
    when = [f"{started:%d %B %Y, %H:%M}".lstrip("0")] if started else []
    duration = [f"{_format_duration(ended - started)}"] if started and ended else []
    return " · ".join([*chosen, f"seed {run.config.get('seed', '–')}", *when, *duration])


def _result(run: RunRecord) -> Markup:
    summary, entries = run.summary, []
    losses, best = run.series("val/loss"), run_plots.best_validation(run)
    if best is not None:
        last_step, last = losses[-1]
        entries.append(
            ("best validation loss", f"{best[1]:.4g}", f"at update {best[0]:,}; last {last:.4g} at {last_step:,}")
        )
    if probabilities := run.series("val/canonical_probability"):
        remark = f"of writing exactly the solution; last, at update {probabilities[-1][0]:,}"
        entries.append(("probability of correct solutions", f"{probabilities[-1][1]:.2g}", remark))
    for name, title in (("pass@1", "pass@1, last model"), (SAMPLED_PASS, "pass@1 at temperature 1")):
        if passes := summary.get(name):
            low, high, count = passes["low"], passes["high"], passes["problems"]
            interval = "no interval: same result for all problems" if low is None else f"95 %: {low:.2f} to {high:.2f}"
            entries.append((title, f"{passes['value']:.2f}", f"{interval}; {count} test problems"))
    if "total_steps" in summary:
        skipped = summary.get("skipped_updates") or 0
        entries.append(("updates", f"{summary['total_steps']:,}", f"{skipped} skipped" if skipped else "none skipped"))
        entries.append(("tokens", _format_short(summary["total_tokens"]), f"{summary['total_tokens']:,} trained on"))
    elif run.status.get("step"):
        until = "so far" if run.status.get("state") == "RUNNING" else "until the run ended"
        entries.append(("updates", f"{run.status['step']:,}", until))
    if speed := summary.get("tokens_per_second"):
        entries.append(("tokens per second", f"{speed:,.0f}", f"median; {_device(summary)}"))
    if memory := summary.get("peak_memory_bytes"):
        entries.append(("peak memory", f"{memory / 2**20:,.0f} MiB", "of one process"))
    missing = muted_paragraph("There is no summary.json: the run has not finished.") if not summary else Markup()
    return key_numbers(entries) + missing


def _training(run: RunRecord) -> Markup:
    plots = figures(
        [
            run_plots.plot_loss(run),
            run_plots.plot_head_losses(run),
            run_plots.plot_canonical(run),
            run_plots.plot_updates(run),
            run_plots.plot_speed(run),
        ]
    )
    return plots or muted_paragraph("No metrics are recorded yet.")


def _weights(run: RunRecord) -> Markup:
    beside = Markup()
    if run_plots.has_uniform_weights(run):
        beside += muted_paragraph("Every target has the weight 1.")
    beside += weights_table(run.summary)
    return figures([run_plots.plot_weights(run)], beside)


def _tokens(run: RunRecord) -> Markup:
    samples = run.tokens.get("samples")
    if not samples:
        return (
            muted_paragraph("There is no tokens.json, so solutions cannot be shown token by token.")
            if run.summary
            else Markup()
        )
    kind = "Training" if run.tokens.get("split") == "train" else "Validation"
    introduction = f"{kind} solutions at update {run.tokens['step']:,}, token by token."
    return paragraph(introduction) + token_heatmaps(samples)


def _values(run: RunRecord) -> Markup:
    caption = (
        "Explained variance 1: values equal the rewards; 0 (dotted): no better than the mean reward; below 0: worse."
    )
    return figures([run_plots.plot_values(run.metrics, "value-training", caption), run_plots.plot_calibration(run)])


def _pretrain(run: RunRecord) -> Markup:
    if not run.pretrain_metrics:
        return Markup()
    stage = run.summary.get("pretrain") or {}
    updates, tokens = stage.get("total_steps"), stage.get("total_tokens")
    introduction = f"{updates:,} updates on {tokens:,} tokens, before stage 2." if updates and tokens else ""
    caption = "The value head during stage 1."
    plots = figures(
        [run_plots.plot_pretrain_loss(run), run_plots.plot_values(run.pretrain_metrics, "value-before", caption)]
    )
    return (paragraph(introduction) if introduction else Markup()) + plots


def _sampling(run: RunRecord) -> Markup:
    rows = _pass_rows(run)
    plots = figures([run_plots.plot_pass_rate(run), run_plots.plot_pass_at_k(rows)])
    body = plots + latest_samples(run.samples)
    return body or muted_paragraph(
        "No samples: the data has no tests, or num_samples and num_validation_samples are 0."
    )


def _pass_rows(run: RunRecord) -> list[tuple[str, dict[str, Any]]]:
    """Return pairs (label, estimate) for all estimates of pass@k that were made for the run."""
    rows = []
    for name, title in (("pass@1", "pass@1, end of run"), (SAMPLED_PASS, "pass@1, temperature 1")):
        if passes := run.summary.get(name):
            rows.append((title, passes))
    for evaluation in run.evaluations:
        estimates = (evaluation.get("pass_at_k") or {}).items()
        rows += [(f"pass@{k}, {evaluated_on(evaluation)}", entry) for k, entry in estimates]
        for difficulty, part in (evaluation.get("by_difficulty") or {}).items():
            rows += [(f"pass@{k}, difficulty {difficulty}", entry) for k, entry in part["pass_at_k"].items()]
    return rows


def _config(run: RunRecord) -> Markup:
    if not run.config:
        return Markup()
    changed = run.provenance.get("changed")
    lines = code_block(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True))
    full = details("Full config", lines, printed=True, is_open=changed is None)
    if not changed:
        return (muted_paragraph("Every value is its default.") if changed is not None else Markup()) + full
    rows = [
        (code(breakable(key)), code(_format_value(before)), code(_format_value(now)))
        for key, (before, now) in merge_absent_parts(changed).items()
    ]
    return table(["changed key", "default", "this run"], rows, names=[0], wide=[1, 2]) + full


def _provenance(run: RunRecord) -> Markup:
    from wmtp.config.overrides import shell_override  # imports Hydra, which a page alone does not need

    provenance, summary = run.provenance, run.summary
    data = provenance.get("data") or {}
    versions = provenance.get("versions") or summary.get("versions") or {}
    entries: Sequence[tuple[str, Any]] = [
        ("folder", code(run.folder.resolve())),
        ("git revision", _optional_code(provenance.get("git_revision"))),
        ("files that git does not track", ", ".join((provenance.get("untracked") or {}).get("files", []))),
        ("data", _data(data)),
        ("data fingerprint", _optional_code(data.get("fingerprint"))),
        ("config hash", _optional_code(summary.get("config_hash"))),
        ("parameters", _format_count(summary.get("parameters"))),
        ("device", _device(summary)),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("ended", run.status.get("ended")),
    ]
    command = provenance.get("command")
    words = ["python -m wmtp.train", *map(shell_override, command or [])]
    command_block = code_block(" ".join(words)) if command is not None else Markup()
    return command_block + facts(entries)


def _optional_code(text: str | None) -> Markup | None:
    return code(text) if text else None


def _format_count(count: int | None) -> str | None:
    return None if count is None else f"{count:,}"


def _data(data: Mapping[str, Any]) -> str | None:
    splits = {"train": "training", "validation": "validation"}
    sizes = [f"{data[split]:,} {name}" for split, name in splits.items() if split in data]
    return f"{data.get('source') or data.get('name')}: {' and '.join(sizes)} samples" if sizes else None


def _device(summary: Mapping[str, Any]) -> str | None:
    if "device" not in summary:
        return None
    return f"{summary.get('processes', 1)} × {summary['device']}, {summary.get('strategy', 'single')}"


def _format_value(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _format_short(count: int) -> str:
    """Return a count as text with three digits and a unit such as k for thousands.

    >>> _format_short(250_689), _format_short(12), _format_short(7_000_000_000)
    ('251 k', '12', '7.00 G')
    """
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:#.3g}".rstrip(".") + f" {unit}"
    return str(count)


def _parse_time(text: Any) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def _format_duration(length: timedelta) -> str:
    """Return a duration as text in seconds, in minutes and seconds, or in hours and minutes."""
    seconds = round(length.total_seconds())
    if seconds < 60:
        return f"{seconds} s"
    minutes, hours = seconds // 60, seconds // 3600
    return f"{minutes} min {seconds % 60} s" if minutes < 60 else f"{hours} h {minutes % 60} min"


def rewrite_report(folder: Path) -> None:
    """Write the HTML page of a run again if the page already exists."""
    if (folder / FILE_NAME).exists():
        write_report_or_warn(folder)


def folders_without_report(runs: Sequence[RunRecord]) -> list[Path]:
    """Return the folders of the runs that have no HTML page."""
    return [run.folder for run in runs if not (run.folder / FILE_NAME).exists()]


def write_report_or_warn(folder: Path) -> None:
    """Write the HTML page of a run. If this fails, the error is logged as a warning and not raised."""
    try:
        write_run_report(folder)
    except OSError as error:
        log.warning("%s could not be written: %s", folder / FILE_NAME, error)
    except Exception as error:
        log.warning("%s could not be created: %s: %s", folder / FILE_NAME, type(error).__name__, error, exc_info=True)
