"""Write summary.json and print a table of results at the end of a run."""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from wmtp.config.overrides import shell_argument
from wmtp.report.measures import SAMPLED_PASS, WEIGHT_MEASURES, weights_and_values
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.json_lines import read_json_lines
from wmtp.runtime.run_dir import display_path, module_command, read_run
from wmtp.runtime.versions import versions
from wmtp.tracking.jsonl import FILE_NAME
from wmtp.tracking.mlflow import is_server, read_sync_state
from wmtp.training.trainer import Result, Trainer

LOCAL_UI = "http://127.0.0.1:5000"
"""Address at which the command `mlflow ui` listens."""


def last_and_best(folder: Path, best_step: int | None) -> dict[str, Any]:
    """Read the metrics of the last validation, and of the validation after update `best_step`, from metrics.jsonl.

    If there was no validation, both results are empty.
    """
    validations = [line for line in read_json_lines(folder / FILE_NAME) if isinstance(line.get("val/loss"), float)]
    if not validations:
        return {"last": {}, "best": {}}
    return {"last": validations[-1], "best": next((x for x in validations if x["step"] == best_step), {})}


def median_speed(folder: Path) -> float | None:
    """Return the median of the logged training speeds in tokens per second, or None if no speed was logged."""
    speeds = [line["train/tokens_per_second"] for line in read_json_lines(folder / FILE_NAME)
              if "train/tokens_per_second" in line]  # fmt: skip
    return median(speeds) if speeds else None


def write_summary(folder: Path, trainer: Trainer, result: Result, extras: dict[str, Any]) -> dict[str, Any]:
    """Write summary.json, and return its content.

    It contains values of the trainer and of `result`, the logged metrics, and the entries of `extras`.
    """
    summary = {
        **asdict(result),
        **last_and_best(folder, result.best_step),
        "tokens_per_second": median_speed(folder),
        "skipped_updates": trainer.finite_check.num_skipped,
        "device": str(trainer.hardware.device),
        "processes": trainer.processes.size,
        "strategy": trainer.hardware.strategy,
        "parameters": trainer.model.num_parameters,
        "data_hash": trainer.data.fingerprint,
        "label_shares": trainer.data.label_shares,
        **extras,
        **versions(),
    }
    replace_atomically(folder / "summary.json", encode_json(summary))
    return summary


def format_metric(value: float | None) -> str:
    """Return the value of a metric as text. Small values, such as probabilities of long texts, get two digits.

    >>> format_metric(0.01864), format_metric(-0.0), format_metric(3.21e-07), format_metric(None)
    ('0.0186', '-0.0000', '3.2e-07', '-')
    """
    if value is None:
        return "-"
    return f"{value:.1e}" if 0 < abs(value) < 5e-5 else f"{value:.4f}"


def print_summary(console: Console, folder: Path, summary: dict[str, Any], resume_overrides: str) -> None:
    """Print the table of results at the end of a run, and commands that are useful next.

    One of these commands resumes the run with the overrides `resume_overrides`, so that it trains for longer.
    """
    table = Table(title=f"{summary['total_steps']} updates, {summary['total_tokens']:,} tokens", title_justify="left")
    table.add_column("validation")
    table.add_column("last", justify="right")
    table.add_column("best", justify="right")
    last, best = summary["last"], summary["best"]
    for name in sorted((name for name in last if name.startswith("val/")), key=lambda name: "head" in name):
        table.add_row(name.removeprefix("val/"), format_metric(last[name]), format_metric(best.get(name)))
    if best:
        table.add_row("at update", str(last["step"]), str(best["step"]))
    if last:
        console.print(table)
    if summary["stop_reason"]:
        console.print(f"stopped early: {summary['stop_reason']}", soft_wrap=True, highlight=False)
    for name, decoding in (("pass@1", "greedy"), (SAMPLED_PASS, "temperature 1")):
        if (passes := summary.get(name)) is not None:
            interval = "" if passes["low"] is None else f" (95 %: {passes['low']:.2f} to {passes['high']:.2f})"
            problems = f"{passes['problems']} held-out problems, {decoding}, last model"
            console.print(f"{name} {passes['value']:.2f}{interval} of {problems}", soft_wrap=True, highlight=False)
    for name, value in weights_and_values(summary).items():
        console.print(f"weights: {name} {value:.3f} ({WEIGHT_MEASURES[name].chance} is chance)", highlight=False)
    speed = f"{summary['tokens_per_second']:,.0f}" if summary["tokens_per_second"] else "-"
    console.print(f"{speed} tokens/s, peak memory {summary['peak_memory_bytes'] / 2**20:,.0f} MiB", highlight=False)
    console.print(f"The run is in {folder}", soft_wrap=True, highlight=False)
    remote = (read_run(folder) or {}).get("remote")
    if remote is not None:
        console.print(f"its copy is in {remote}", soft_wrap=True, highlight=False)
    sync_state = read_sync_state(folder)
    if sync_state is not None and is_server(sync_state.uri):
        page = sync_state.page(of_run=True) if sync_state.run_id else ""
        console.print(f"its metrics are in {sync_state.uri}{page}", soft_wrap=True, highlight=False)
    console.print("Next:")
    if sync_state is not None and not is_server(sync_state.uri):
        mlflow = display_path(Path(sys.executable).with_name("mlflow"))
        ui = shlex.join([mlflow, "ui", "--backend-store-uri", sync_state.uri])
        console.print(f"  {ui}", soft_wrap=True, highlight=False)
        if sync_state.run_id:
            console.print(f"    and open {LOCAL_UI}{sync_state.page(of_run=False)}", soft_wrap=True, highlight=False)
    if summary["pass@1"] is not None:
        evaluate = f"{module_command('wmtp.evaluate')} {shell_argument('checkpoint', display_path(folder))}"
        console.print(f"  {evaluate}", soft_wrap=True, highlight=False)
    resume = f"{module_command('wmtp.train')} {shell_argument('resume', display_path(folder))} {resume_overrides}"
    console.print(f"  {resume}", soft_wrap=True, highlight=False)
