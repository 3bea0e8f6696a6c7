"""Tests of reading new lines of a run's files, and of converting them to names and points of MLflow."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name

from wmtp.tracking.tail import Position, batches, clean_name, count_lines, line_points, lines_after


@given(st.text(max_size=300) | st.text("./ _a[]=@:é\n", max_size=300))
def test_clean_names_are_valid_in_mlflow(name: str) -> None:
    cleaned = clean_name(name)
    _validate_metric_name(cleaned)
    assert 0 < len(cleaned) <= 250
    assert clean_name(cleaned) == cleaned


@pytest.mark.parametrize(
    ("name", "cleaned"),
    [
        ("train/head_1_loss", "train/head_1_loss"),
        ("a[0]=b@c", "a_0__b_c"),
        ("../up", "_/up"),
        ("..a", "_a"),
        ("/a//b/./c/", "a/b/_/c"),
        ("", "_"),
    ],
)
def test_invalid_characters_of_names_are_replaced(name: str, cleaned: str) -> None:
    assert clean_name(name) == cleaned


def test_every_complete_line_is_read_once(tmp_path: Path) -> None:
    path, position = tmp_path / "lines", Position()
    assert lines_after(path, position) == []
    path.write_bytes(b"a\nb")
    assert lines_after(path, position) == [b"a\n"]
    position = position.after([b"a\n"])
    assert lines_after(path, position) == []
    with path.open("ab") as file:
        file.write(b"c\nd\n")
    assert lines_after(path, position) == [b"bc\n", b"d\n"]
    position = position.after([b"bc\n", b"d\n"])
    assert position == Position(3, 7, "d\n") and count_lines(path, position) == (3, 0)


@pytest.mark.parametrize(
    ("content", "chunks", "pending"),
    [
        (b"aa\nbb\ncc\n", False, 1),
        (b"aa\nbb\n", False, 0),
        (b"aa\n", True, 1),
        (b"aa\nb2\ncc\n", True, 3),
        (b"", True, 0),
    ],
)
def test_a_truncated_file_is_detected_also_after_new_lines(
    tmp_path: Path, content: bytes, chunks: bool, pending: int
) -> None:
    path = tmp_path / "lines"
    path.write_bytes(content)
    position = Position().after([b"aa\n", b"bb\n"])
    assert (lines_after(path, position) is None) == chunks
    assert count_lines(path, position) == (content.count(b"\n"), pending)


@given(st.lists(st.integers(0, 600), max_size=12))
def test_batches_contain_complete_lines(sizes: list[int]) -> None:
    lines = [
        json.dumps({"step": step, "epoch": 0, "time": 1.5} | {f"m{i}": i for i in range(size)}).encode()
        for step, size in enumerate(sizes)
    ]
    chunks = list(batches(lines))
    assert [line for batch, _ in chunks for line in batch] == lines
    assert all(len(points) <= 500 or len(batch) == 1 for batch, points in chunks)
    assert [point for _, points in chunks for point in points] == [
        point for line in lines for point in line_points(json.loads(line))
    ]
