"""Tests of the table of results at the end of a run."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from wmtp.training.summary import print_summary

SUMMARY: dict[str, Any] = {
    "total_steps": 20, "total_tokens": 9_000, "stop_reason": None, "tokens_per_second": None, "peak_memory_bytes": 0,
    "last": {"step": 20, "val/loss": 0.5, "val/canonical_probability": 3.21e-9, "val/value_explained_variance": 0.053},
    "best": {"step": 10, "val/loss": 0.4}, "weights": {}, "pass@1": None,
}  # fmt: skip


def printed(folder: Path, **entries: Any) -> str:
    """Return what is printed for a summary in which the given entries are replaced."""
    console = Console(width=100, file=io.StringIO(), record=True)
    print_summary(console, folder, SUMMARY | entries, "num_epochs=6")
    return console.export_text()


def test_small_probabilities_are_not_printed_as_zero(tmp_path: Path) -> None:
    text = printed(tmp_path)
    assert "3.2e-09" in text and "0.5000" in text
    assert f"{3.21e-9:.4f}" == "0.0000", "the control"


def test_measures_of_weights_are_printed_with_their_value_at_chance(tmp_path: Path) -> None:
    weights = {"decisive_wrong_auc": 0.912, "decisive_wrong_top1": 0.478, "noise_auc": None}
    text = printed(tmp_path, weights=weights)
    assert "weights: decisive_wrong_auc 0.912 (0.5 is chance)" in text
    assert "weights: decisive_wrong_top1 0.478 (1 / number of tokens is chance)" in text
    assert "weights: val/value_explained_variance 0.053 (0 is chance)" in text
    assert "noise_auc" not in text


def test_both_estimates_of_pass_at_1_are_printed(tmp_path: Path) -> None:
    estimates = {"low": None, "high": None, "problems": 8}
    text = printed(tmp_path, **{"pass@1": {"value": 0.5, **estimates}, "sampled_pass@1": {"value": 0.25, **estimates}})
    assert "pass@1 0.50 of 8 held-out problems, greedy" in text
    assert "sampled_pass@1 0.25 of 8 held-out problems, temperature 1" in text
    assert "sampled_pass@1" not in printed(tmp_path, **{"pass@1": {"value": 0.5, **estimates}})
