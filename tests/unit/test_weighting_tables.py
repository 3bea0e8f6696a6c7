"""Tests of the tables of weightings: they contain the results of the given runs, computed by hand."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from wmtp.config.schema import CONFIG_FOLDER


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(CONFIG_FOLDER.parent / "scripts")
    import tabulate_weightings

    monkeypatch.setattr(tabulate_weightings, "RESULTS", tmp_path / "results.csv")
    yield tabulate_weightings
    sys.modules.pop("tabulate_weightings")


def make_run(folder: Path, overrides: list[str], seed: int, last: dict[str, float], noise_auc: float | None) -> str:
    """Write those files of a run that the script reads. Overrides of tags are not in the list of overrides."""
    tags = dict(text.removeprefix("tags.").split("=") for text in overrides if text.startswith("tags."))
    overrides = [text for text in overrides if not text.startswith("tags.")]
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "accepted.json").write_text(json.dumps(overrides))
    (folder / "config.yaml").write_text(f"seed: {seed}\ntags: {json.dumps(tags)}\n")
    weights = {} if noise_auc is None else {"noise_auc": noise_auc}
    summary = {"total_tokens": 70, "pretrain": {"total_tokens": 30}, "weights": weights, "last": last}
    (folder / "summary.json").write_text(json.dumps(summary))
    return str(folder)


def cells(output: str) -> dict[str, list[str]]:
    """Return the cells of each row of a Markdown table, by the first one."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.splitlines() if line]
    return {row[0]: row[1:] for row in rows}


def policy(logprob: float, probability: float) -> dict[str, float]:
    return {"val/canonical_logprob": logprob, "val/canonical_probability": probability}


def test_the_gain_is_relative_to_uniform_and_oracle_weights(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms: list[tuple[str, list[str], tuple[float, ...], tuple[float, ...], Any]] = [
        ("baseline", ["batch_size=4"], (-6.0, -4.0), (0.1, 0.3), None),
        ("oracle", ["algo=oracle"], (-1.0, -1.0), (0.8, 1.0), 1.0),
        ("cleaning", ["algo=shuffled", "algo/of=rho1", "tags.arm=cleaning"], (-2.0, -4.0), (0.4, 0.2), 0.75),
    ]
    runs = [
        make_run(tmp_path / f"{name}{seed}", overrides, seed, policy(logprobs[seed], probabilities[seed]), auc)
        for name, overrides, logprobs, probabilities, auc in arms
        for seed in (0, 1)
    ]
    script.main(["tasks_noisy", *runs])
    found = cells(capsys.readouterr().out)
    assert list(found)[2:] == ["oracle", "cleaning", "baseline"], "the best arm is first"
    assert found["baseline"][:4] == ["2", "-5.00 ± 12.71", "0.00", "0"]
    assert found["oracle"] == ["2", "-1.00", "4.00 ± 12.71", "100", "4.5", "–", "–", "1.00"]
    assert found["cleaning"] == ["2", "-3.00 ± 12.71", "2.00 ± 25.41", "50", "1.5", "–", "–", "0.75"]

    other = make_run(tmp_path / "other", ["algo=shuffled", "algo/of=contrast"], 5, policy(-240.0, 0.0), 0.5)
    script.main(["tasks", other])
    first, second = capsys.readouterr().out.split("\n\n")
    assert cells(first)["shuffled contrast"] == ["1", "–", "–", "0.500"]
    assert cells(second)["cleaning"] == found["cleaning"], "the rows of the other regime are kept"
    assert "240" not in (tmp_path / "results.csv").read_text(), "a policy of one update says nothing"
    script.main(["tasks", other])
    assert cells(capsys.readouterr().out.split("\n\n")[0])["shuffled contrast"][0] == "1", (
        "rows are replaced, not added"
    )
