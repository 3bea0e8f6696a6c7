"""Test of docs/notebook.ipynb: it runs, and its verdicts are those of the command."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

from tests.conftest import run_command
from wmtp.config.schema import CONFIG_FOLDER

NOTEBOOK = CONFIG_FOLDER.parent / "docs" / "notebook.ipynb"
TIMEOUT = 600
"""Seconds that a cell may take on a busy machine."""


def test_the_notebook_is_stored_without_outputs() -> None:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert all(not cell.outputs and cell.execution_count is None for cell in cells if cell.cell_type == "code")


@pytest.mark.slow
def test_the_notebook_runs_and_its_verdicts_are_those_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
        (tmp_path / name.lower()).mkdir()
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOK.parents[1]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    last_frame = nbformat.v4.new_code_cell("print(_.to_json(orient='records', double_precision=15))")
    notebook.cells.append(last_frame)  # `_` is what the last cell of the notebook shows
    client = nbclient.NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    rows = json.loads("".join(output.text for output in last_frame.outputs))

    (sweep,) = (tmp_path / "tmpdir").glob("wmtp-notebook-*/sweep")
    assert list(tmp_path.glob("*.*")) == [] and not Path("outputs").exists(), "it writes only to its temporary folder"
    capsys.readouterr()
    assert run_command([str(sweep), "folder=compared", "reports=false"], monkeypatch, "compare") == 0
    printed = capsys.readouterr().out
    content = json.loads(Path("compared/compare.json").read_text())
    expected = [(metric["metric"], each) for metric in content["metrics"] for each in metric["differences"]]
    assert [(row["metric"], row["arm"], row["verdict"]) for row in rows] == [
        (metric, each["label"], each["verdict"]) for metric, each in expected
    ]
    assert [row["mean"] for row in rows] == pytest.approx([each["mean"] for _, each in expected])
    assert len(rows) > 0 and all(row["verdict"] in printed for row in rows)
