"""Tests of reading JSONL files whose last line is incomplete, as a crash can leave them."""

import json
from pathlib import Path

import pytest

from wmtp.evaluation.results_log import ResultsLog
from wmtp.report.metrics import pass_at_k_values
from wmtp.report.run_record import RunRecord
from wmtp.runtime.json_lines import drop_lines_after, drop_torn_line, read_json_lines, read_lines
from wmtp.tracking.jsonl import MetricsFile

TORN = '{"step": 1, "text": "a\\u2028b"}\n{"step": 2}\n{"step": 3, "te'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Return the path of a file with two complete lines and an incomplete one."""
    (tmp_path / "lines.jsonl").write_text(TORN)
    return tmp_path / "lines.jsonl"


def test_an_incomplete_last_line_is_ignored(path: Path) -> None:
    """The control parses all lines."""
    assert [row["step"] for row in read_json_lines(path)] == [1, 2] and path.read_text() == TORN
    with pytest.raises(json.JSONDecodeError):
        [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("content", ["", '{"step": 1'])
def test_a_file_without_complete_line_is_empty(path: Path, content: str) -> None:
    path.write_text(content)
    assert read_json_lines(path) == drop_torn_line(path) == [] and path.read_text() == ""
    assert read_json_lines(path.with_name("missing")) == drop_torn_line(path.with_name("missing")) == []


def test_a_damaged_complete_line_is_an_error(path: Path) -> None:
    path.write_text('{"step": \n{"step": 2}\n')
    with pytest.raises(json.JSONDecodeError):
        read_json_lines(path)


def test_an_incomplete_last_line_is_removed_before_lines_are_appended(path: Path) -> None:
    """The control appends to the incomplete line."""
    inode = path.stat().st_ino
    assert drop_torn_line(path) == read_lines(path) == TORN.encode().splitlines(keepends=True)[:2]
    assert path.stat().st_ino == inode, "the file was replaced while another process may append to it"
    with path.open("a") as file:
        file.write('{"step": 4}\n')
    assert [row["step"] for row in read_json_lines(path)] == [1, 2, 4]
    path.write_text(TORN + '{"step": 4}\n')
    with pytest.raises(json.JSONDecodeError):
        read_json_lines(path)


def test_lines_of_later_steps_are_removed(path: Path) -> None:
    drop_lines_after(path, 1)
    assert [row["step"] for row in read_json_lines(path)] == [1]
    drop_lines_after(path.with_name("missing"), 1)
    assert not path.with_name("missing").exists()


def test_metrics_are_not_appended_to_an_incomplete_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(TORN)
    file = MetricsFile(tmp_path)
    file.log(4, 0, {"loss": 1.0})
    file.close("FINISHED")
    assert [row["step"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 4]


def test_reports_and_evaluations_ignore_an_incomplete_line(tmp_path: Path) -> None:
    folder = tmp_path / "evaluations" / "tasks"
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text("{}")
    (folder / "summary.json").write_text(json.dumps({"pass_at_k": {"1": {"value": 1.0}}}))
    for name in ("results.jsonl", "samples.jsonl"):
        (folder / name).write_text('{"task_id": "a", "index": 0, "outcome": "pass"}\n{"task_id": "b", ')
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n{"st')
    run = RunRecord(tmp_path)
    values = pass_at_k_values(1, [run])
    assert run.samples == [{"step": 1}] and values is not None and values.solved == {run: {"a": 1.0}}
    assert list(ResultsLog(folder, {}).results) == [("a", 0)]
