"""Tests of the Python API for notebooks: its frames have the content of the files, its verdicts are the command's."""

import json
import math
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import wmtp
from tests.support.fake_runs import fake_run, write_json, write_lines
from tests.support.studies import study_lock, study_options
from wmtp import ComparisonFrames, Runs, compare, load_runs
from wmtp.config.schema import CONFIG_FOLDER
from wmtp.errors import InputError
from wmtp.report.compare import compare_runs
from wmtp.report.results import Comparison, Difference
from wmtp.report.run_record import find_runs
from wmtp.studies.collect import collect_study
from wmtp.studies.lock import write_lock

LOSSES = {"baseline": [1.00, 1.10, 0.95], "critic": [0.90, 0.97, 0.86], "rho1": [1.01, 1.09, 0.96]}
TOKENS = [
    {"text": "def", "weight": 1.0, "loss": 4.5, "value": None, "truth": None},
    {"text": " f", "weight": 0.25, "loss": 2.0, "value": 0.5, "truth": "decisive"},
    {"text": "# x", "weight": 0.0, "loss": 7.0, "value": 0.75, "truth": "noise"},
]
"""Tokens of a sample in tokens.json."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with finished runs of three algorithms and three seeds, and a failed run."""
    for algo, losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            run = fake_run(tmp_path / algo / str(seed), algo=algo, seed=seed, val_losses=[loss + 1, loss, loss + 0.1],
                           metrics={"train/lr": [0.1, 0.2, 0.3]}, passes=[True, algo == "critic", seed > 1],
                           stage_tokens=500 if algo == "critic" else None, **{f"algo.{algo}_beta": 0.5})  # fmt: skip
            samples = [{"task_id": f"t/{n}", "is_correct": n == 0, "prompt": "p", "tokens": TOKENS} for n in range(2)]
            write_json(run / "tokens.json", {"step": 30, "split": "validation", "samples": samples, "calibration": []})
    (tmp_path / "critic" / "0" / "pretrain").mkdir()
    stage = [{"step": 5, "epoch": 0, "time": 0.0, "tokens": 500.0, "val/value_loss": value} for value in (0.5, "nan")]
    write_lines(tmp_path / "critic" / "0" / "pretrain" / "metrics.jsonl", stage)
    fake_run(tmp_path / "critic" / "7", algo="critic", seed=7, state="FAILED", tokens=False,
             **{"algo.critic_beta": 0.5})  # fmt: skip
    return tmp_path


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_there_is_one_row_for_each_run(folder: Path) -> None:
    loaded = load_runs(folder / "baseline", str(folder / "critic"), folder / "rho1")
    assert [record.folder for record in loaded.records] == [record.folder for record in find_runs(loaded.folders)]
    frame = loaded.runs
    assert list(frame.index) == [str(record.folder) for record in loaded.records] and frame.index.name == "run"
    first = ["folder", "name", "group", "seed", "state", "algo", "algo.name"]
    assert list(frame.columns[:7]) == first
    assert not {"seed", "optimizer.lr", "data.seed"} & set(frame.columns[5:]), "only settings that differ are columns"
    assert frame["algo"].tolist() == ["baseline"] * 3 + ["critic"] * 4 + ["rho1"] * 3
    row = frame.loc[str(folder / "critic" / "1")]
    summary = json.loads((row["folder"] / "summary.json").read_text())
    assert (row["group"], row["seed"], row["state"]) == ("critic", 1, "FINISHED")
    assert row["best.val/loss"] == summary["best"]["val/loss"] == 0.97
    assert row["last.val/loss"] == summary["last"]["val/loss"] == 1.07
    assert row["pass@1"] == summary["pass@1"]["value"]
    assert (row["tokens"], row["stage_1_tokens"]) == (summary["total_tokens"] + 500, 500)
    assert row["algo.critic_beta"] == 0.5 and math.isnan(row["algo.rho1_beta"])
    failed = frame.loc[str(folder / "critic" / "7")]
    assert failed["state"] == "FAILED" and failed[["tokens", "stage_1_tokens", "best.val/loss", "pass@1"]].isna().all()
    types = frame.dtypes[["seed", "tokens", "best.val/loss", "algo.critic_beta"]].astype(str).tolist()
    assert types == ["int64", "Int64", "float64", "float64"]


def test_every_number_of_both_stages_is_in_the_metrics(folder: Path) -> None:
    loaded = load_runs(folder)
    frame = loaded.metrics
    assert list(frame.columns) == ["run", "group", "seed", "stage", "step", "tokens", "metric", "value"]
    assert frame.dtypes.astype(str).tolist()[2:6] == ["int64", "int64", "int64", "Int64"]
    assert frame["value"].dtype == "float64"
    lines = {record.folder: record.metrics + record.pretrain_metrics for record in loaded.records}
    assert len(frame) == sum(len(line.keys() - {"step", "tokens"}) for each in lines.values() for line in each)
    values = frame[frame["run"] == str(folder / "critic" / "1")].query("metric == 'val/loss'")
    expected = json_lines(folder / "critic" / "1" / "metrics.jsonl")
    assert values["value"].tolist() == [line["val/loss"] for line in expected]
    assert values["step"].tolist() == [line["step"] for line in expected]
    assert values["tokens"].tolist() == [line["tokens"] for line in expected]
    stage_1 = frame.query("stage == 1 and metric == 'val/value_loss'")
    assert stage_1["value"].iloc[0] == 0.5 and math.isnan(stage_1["value"].iloc[1]), "a recorded NaN is kept"
    assert set(stage_1["run"]) == {str(folder / "critic" / "0")}
    assert frame[frame["run"] == str(folder / "critic" / "7")]["tokens"].isna().all()
    joined = frame.join(loaded.runs["algo"], on="run")
    assert (joined["algo"] == joined["group"]).all()


def test_every_token_is_in_the_tokens(folder: Path) -> None:
    frame = load_runs(folder).tokens
    assert list(frame.columns) == [
        "run", "group", "seed", "sample", "task_id", "is_correct", "position",
        "text", "weight", "loss", "value", "truth",
    ]  # fmt: skip
    assert len(frame) == 9 * 2 * len(TOKENS)
    rows = frame[frame["run"] == str(folder / "rho1" / "2")].query("sample == 1")
    assert rows["position"].tolist() == [0, 1, 2] and set(rows["task_id"]) == {"t/1"}
    assert not rows["is_correct"].any() and frame.query("sample == 0")["is_correct"].all()
    for name in ("text", "weight", "loss"):
        assert rows[name].tolist() == [token[name] for token in TOKENS]
    assert rows["value"].isna().tolist() == [True, False, False] and rows["value"].tolist()[1:] == [0.5, 0.75]
    assert rows["truth"].isna().tolist() == [True, False, False] and rows["truth"].tolist()[1:] == ["decisive", "noise"]


def test_frames_of_runs_without_metrics_and_tokens_are_empty(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "a", state="RUNNING")
    (run / "metrics.jsonl").unlink()
    loaded = load_runs(run)
    assert loaded.metrics.empty and list(loaded.metrics.columns[-2:]) == ["metric", "value"]
    assert loaded.tokens.empty and loaded.tokens["weight"].dtype == "float64"
    assert loaded.runs[["group", "seed", "state"]].values.tolist() == [["all", 0, "RUNNING"]]


@pytest.mark.parametrize("options", [{}, {"metric": "pass@1", "at": "last"}, {"baseline": "critic"}, {"delta": 0.05}])
def test_the_comparison_equals_that_of_compare_runs(folder: Path, options: dict[str, Any]) -> None:
    expected = compare_runs(find_runs([folder]), **options)
    for runs in (folder, str(folder), [folder / "baseline", folder / "critic", folder / "rho1"], load_runs(folder)):
        frames = compare(runs, **options)
        assert_equal(frames, expected)


def assert_equal(frames: ComparisonFrames, expected: Comparison) -> None:
    """Check that frames have the content of a comparison."""
    differences = [(metric.metric, each) for metric in expected.metrics for each in metric.differences]
    assert list(frames.differences.columns[:3]) == ["arm", "metric", "verdict"]
    assert frames.differences[["metric", "arm", "verdict"]].values.tolist() == [
        [metric, each.label, each.verdict] for metric, each in differences
    ]
    for name in ("mean", "low", "high", "p", "p_holm"):
        numbers = [getattr(each, name) for _, each in differences]
        assert frames.differences[name].isna().tolist() == [number is None for number in numbers]
        assert frames.differences[name].dropna().tolist() == [number for number in numbers if number is not None]
    names = {field.name for field in fields(Difference)} - {"label", "pairs"}
    columns = {name.partition(".")[0] for name in frames.differences.columns}
    assert columns >= names, "every field is a column"
    pairs = [(each.label, metric, *pair) for metric, each in differences for pair in each.pairs.items()]
    assert list(frames.pairs.itertuples(index=False, name=None)) == pairs
    assert list(frames.values.itertuples(index=False, name=None)) == [
        (group.label, metric.metric, *value)
        for metric in expected.metrics for group in metric.groups for value in group.values_by_seed.items()
    ]  # fmt: skip
    assert frames.tokens_to_target["arm"].tolist() == [each.label for each in expected.tokens_to_target]
    assert frames.tokens_to_target["never"].tolist() == [each.never for each in expected.tokens_to_target]
    assert sorted(frames.notes["note"]) == sorted(expected.notes)


def test_missing_numbers_have_the_type_of_numbers(tmp_path: Path) -> None:
    for algo in ("baseline", "critic"):
        fake_run(tmp_path / algo, algo=algo, tokens=False)
    frames = compare(tmp_path)
    assert frames.differences["verdict"].tolist() == ["too few seeds"]
    assert frames.differences[["p", "low", "high", "seeds_needed"]].dtypes.astype(str).tolist() == ["float64"] * 4
    assert frames.tokens_to_target.empty and "ratio" in frames.tokens_to_target.columns


def test_a_result_within_a_result_has_names_with_dots(tmp_path: Path) -> None:
    for algo in ("baseline", "critic"):
        fake_run(tmp_path / algo, algo=algo, passes=[True, algo == "critic"])
    frame = compare(tmp_path).differences.set_index("metric")
    assert frame.loc["pass@1", ["mcnemar.won", "mcnemar.lost", "mcnemar.tied"]].tolist() == [1, 0, 1]
    assert "mcnemar" not in frame.columns and math.isnan(frame.loc["val/loss", "mcnemar.won"])
    assert frame["lost.failed"].tolist() == [0, 0]


def test_a_study_has_the_verdicts_and_options_of_its_lock(tmp_path: Path) -> None:
    options = study_options(list(LOSSES))
    write_lock(tmp_path, study_lock(options))
    fake_run(tmp_path / "tuning" / "critic" / "trial-0" / "seed-100", algo="critic", seed=100, val_losses=[0.1])
    with pytest.raises(InputError, match="has no runs to compare yet; .*continue: python -m wmtp.study study="):
        compare(tmp_path)
    for algo, losses in LOSSES.items():
        for seed, loss in enumerate(losses):
            fake_run(tmp_path / "judging" / algo / f"updates-{max(options.horizons)}" / f"seed-{seed}", algo=algo,
                     seed=seed, val_losses=[loss - 1, loss])  # fmt: skip
    result = collect_study(tmp_path)
    assert result.comparison is not None and result.departures != []
    departures = [f"departs from the lock: {each}" for each in result.departures]
    expected = replace(result.comparison, notes=[*departures, *result.comparison.notes])
    assert expected.metrics[0].at == "last model" and expected.metrics[0].delta == 0.01
    for frames in (compare(tmp_path), compare(load_runs(tmp_path), at="last", delta=0.01), compare([str(tmp_path)])):
        assert_equal(frames, expected)
    assert compare(tmp_path / "judging").differences["at"].tolist() == ["best checkpoint"] * 2, "the control"
    with pytest.raises(InputError, match="metric=val/mtp_loss: is fixed by the lock of the study in "):
        compare(tmp_path, metric="val/mtp_loss")


def test_mistakes_are_named(folder: Path) -> None:
    with pytest.raises(InputError, match="nowhere: does not exist; name the folder of a run"):
        load_runs("nowhere")
    with pytest.raises(InputError, match="needs the folder of a run"):
        load_runs()
    with pytest.raises(InputError, match="at=first: must be 'best' or 'last'"):
        compare(folder, at="first")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="metric=val/los: is not measured at a validation"):
        compare(folder, metric="val/los")
    damaged = folder / "rho1" / "0"
    (damaged / "metrics.jsonl").write_text("[\n")
    with pytest.raises(InputError, match=f"{damaged}: its files are damaged or changed"):
        _ = load_runs(folder).metrics


def test_notebooks_show_the_main_frame(folder: Path) -> None:
    loaded = load_runs(folder)
    assert loaded._repr_html_() == loaded.runs._repr_html_()
    frames = compare(loaded)
    assert frames._repr_html_() == frames.differences._repr_html_()
    assert isinstance(loaded, Runs) and isinstance(frames.differences, pd.DataFrame)


def run_python(code: str) -> str:
    """Run code in a new process, and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CONFIG_FOLDER.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "print([name for name in ('pandas', 'torch', 'scipy', 'matplotlib', 'hydra') if name in sys.modules])"
    assert run_python(f"import sys, wmtp, wmtp.compare; {heavy}") == "[]"
    assert "pandas" in run_python(f"import sys; from wmtp import load_runs; {heavy}"), "the control"
    assert "'torch'" not in run_python(f"import sys; from wmtp import load_runs; {heavy}")


@pytest.mark.parametrize(
    "before", ["", "import wmtp.compare", "from wmtp.compare import main", "from wmtp import compare as earlier, train"]
)
def test_compare_is_the_function_also_after_the_import_of_the_command(before: str) -> None:
    code = f"{before}\nfrom wmtp import compare\nfrom wmtp.compare import main, COMMAND, compare as job\nimport wmtp"
    after = "print(compare.__module__, wmtp.compare is compare, main.__module__, job is compare, COMMAND.job is job)"
    assert run_python(f"{code}\n{after}") == "wmtp.api True wmtp.compare False True"


def test_the_package_has_the_public_names_and_no_others() -> None:
    assert all(getattr(wmtp, name).__module__ == "wmtp.api" for name in wmtp.__all__)
    with pytest.raises(AttributeError, match="module 'wmtp' has no attribute 'compares'"):
        _ = wmtp.compares


def test_the_code_of_the_page_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (CONFIG_FOLDER.parent / "docs" / "sweeps.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert code.count("outputs/<date>/<sweep>") == 1
    exec(code.replace("outputs/<date>/<sweep>", str(folder)), {})
    assert "verdict" in capsys.readouterr().out
