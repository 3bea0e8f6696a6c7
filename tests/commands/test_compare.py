"""Tests of `python -m wmtp.compare`: arguments, output and errors."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Outcome, run_command
from tests.support.fake_runs import fake_run
from wmtp.compare import positional_args

HEAVY_MODULES = ("torch", "scipy", "matplotlib", "mlflow", "transformers")
"""Modules that take long to import."""


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Return a function that runs the command in an empty folder, with a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        code = run_command(list(arguments), monkeypatch, "compare")
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Return a folder with runs of two algorithms and three seeds. Its name contains a space."""
    for seed in range(3):
        for algo, loss in (("baseline", 1.0), ("critic", 0.8)):
            folder = tmp_path / "my runs" / f"{algo}={seed}"
            fake_run(folder, algo=algo, seed=seed, val_losses=[2.0, loss + 0.01 * seed * (algo == "critic")],
                     passes=[True, algo == "critic", False])  # fmt: skip
    return tmp_path / "my runs"


def test_a_comparison_is_printed_and_written(call, runs: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    outcome = call("my runs", "metric=val/loss")
    assert outcome.code == 0, outcome.err
    assert "better" in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 80
    (folder,) = (tmp_path / "outputs" / "comparisons").glob("*/*")
    assert sorted(path.name for path in folder.iterdir()) == ["compare.html", "compare.json"]
    assert str(folder.relative_to(tmp_path)) in outcome.out
    content = json.loads((folder / "compare.json").read_text())
    assert [metric["metric"] for metric in content["metrics"]] == ["val/loss", "pass@1"]
    assert content["metrics"][0]["differences"][0]["verdict"] == "better"
    assert "wmtp-compare-" not in str(logging.getLogger().handlers), "a handler opens a file in the removed folder"


@pytest.mark.slow
def test_missing_reports_of_runs_are_written(call, runs: Path) -> None:  # type: ignore[no-untyped-def]
    folders = sorted(runs.iterdir())
    (folders[0] / "report.html").write_text("existing report")
    assert "Writing report.html" not in call("my runs", "reports=false", "folder=no_reports").out
    assert not (folders[1] / "report.html").exists()
    outcome = call("my runs", "folder=here")
    assert outcome.code == 0, outcome.err
    assert "Writing the missing report.html of 5 runs; skip this with reports=false" in " ".join(outcome.out.split())
    assert all((folder / "report.html").exists() for folder in folders)
    assert (folders[0] / "report.html").read_text() == "existing report"
    assert Path("here/compare.html").read_text().count("report.html") == 6
    assert Path("no_reports/compare.html").read_text().count("report.html") == 1


def test_a_report_that_cannot_be_written_causes_a_warning(  # type: ignore[no-untyped-def]
    call, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(folder: Path) -> None:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("wmtp.report.run_report.write_run_report", fail)
    outcome = call("my runs", "folder=here")
    assert outcome.code == 0
    assert "report.html could not be written: [Errno 13]" in " ".join((outcome.out + outcome.err).split())
    assert Path("here/compare.html").exists()


def test_runs_can_be_listed_and_the_output_folder_must_be_new(call, runs: Path) -> None:  # type: ignore[no-untyped-def]
    paths = sorted(str(path) for path in runs.iterdir())
    outcome = call(*paths, "folder=here", "baseline=critic", "metric=pass@1", "at=last")
    assert outcome.code == 0, outcome.err
    content = json.loads(Path("here/compare.json").read_text())
    assert (content["baseline"], len(content["groups"]["critic"])) == ("critic", 3)
    again = call(*paths, "folder=here")
    assert again.code == 2
    assert "folder=here: exists and is not empty; choose a new folder" in again.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs: missing; give folders of runs: python -m wmtp.compare DIR…"),
        (["nowhere"], "nowhere: does not exist; name the folder of a run"),
        (["my runs", "baseline=rho1"], "there is no such group; the groups are baseline='baseline', baseline='critic'"),
        (
            ["my runs", "metric=val/lss"],
            "metric=val/lss: is not measured at a validation; all of them have pass@1, val/",
        ),
        (["my runs", "at=first"], "at=first: must be 'best' or 'last'"),
        (["my runs", "metrics=val/loss"], "metrics=val/loss: unknown key; did you mean metric?"),
        (["s3://bucket/run"], "only local runs can be compared"),
    ],
)
def test_invalid_arguments_are_reported(call, runs: Path, arguments: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    outcome = call(*arguments)
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())
    assert "Traceback" not in outcome.err
    assert not Path("outputs").exists()


@pytest.mark.slow
def test_training_data_may_differ_by_a_setting_but_not_by_a_file(call, runs: Path) -> None:  # type: ignore[no-untyped-def]
    provenance = {"train_fingerprint": "other"}
    fake_run(runs / "other", algo="rho1", provenance=provenance, **{"data.num_train": 7})
    outcome = call("my runs")
    assert outcome.code == 0 and "the training data differ (data.num_train: 40 and 7)" in outcome.out
    fake_run(runs / "file", algo="critic", seed=9, provenance=provenance, **{"data.path": "other"})
    shutil.rmtree(runs / "other")
    outcome = call("my runs")
    assert outcome.code == 2
    assert (
        "training data differs between my runs/baseline=0 and my runs/file:\n    data.path: - and other" in outcome.err
    )


def test_arguments_without_a_key_are_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b").mkdir()
    assert positional_args(["x", "metric=val/loss", "it's", "a=b"]) == ["metric=val/loss", r"runs=['x','it\'s','a=b']"]
    assert positional_args(["--cfg", "job"]) == ["--cfg", "job"]
    assert positional_args(["--help"]) == ["--help"]


def test_the_command_imports_no_heavy_modules() -> None:
    code = f"import sys, wmtp.compare; sys.exit(', '.join(n for n in {HEAVY_MODULES} if n in sys.modules) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
