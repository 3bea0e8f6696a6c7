"""Readers of files in four formats: plain JSONL, MBPP, HumanEval and CodeContests.

Error messages name the file and the row.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from pydantic import ValidationError

from wmtp.data.records import SOLUTION_FIELDS, Record, Splits, StdioTest
from wmtp.data.selection import split_by_task
from wmtp.data.strict_json import ARRAYS, SUFFIXES, Rejected, Row, decode_rows, truncate, verify_json
from wmtp.errors import InputError

T = TypeVar("T")
OnError = Literal["stop", "skip"]

MAX_SHOWN = 20
PROBLEM_FIELDS = [name for name in Record.model_fields if name not in (*SOLUTION_FIELDS, "task_id", "difficulty")]
"""Fields that are equal in all records of a problem."""
LANGUAGES = ("UNKNOWN_LANGUAGE", "PYTHON", "CPP", "PYTHON3", "JAVA")
PYTHON_3 = LANGUAGES.index("PYTHON3")
SOURCES = ("UNKNOWN_SOURCE", "CODECHEF", "CODEFORCES", "HACKEREARTH", "CODEJAM", "ATCODER", "AIZU")
LEVELS = ("UNKNOWN_DIFFICULTY", "EASY", "MEDIUM", "HARD", "HARDER", "HARDEST", "EXTERNAL")
DIFFICULTIES = (*LEVELS, *"ABCDEFGHIJKLMNOPQRSTUV")
"""The names of CodeContests for the numbers 0, 1, 2, …"""
REASONS = {"missing": "missing field", "extra_forbidden": "unknown field"}
EXPECTED = f"Expected one file, or a folder with train, validation (or valid) and test in {', '.join(SUFFIXES)}."


class Rejection(NamedTuple):
    """A rejected row and its location.

    `line` is the number of the line in the file. If the file contains a JSON array, `line` is the number of the row in
    the array. Both numbers start at 1.
    """

    file: str
    line: int
    reason: str
    detail: str

    def __str__(self) -> str:
        row = " row " if self.file.endswith(ARRAYS) else ""
        return f"{self.file}:{row}{self.line}: {Rejected(self.reason, self.detail)}"


def plain_records(row: Row) -> list[Record]:
    """Read a row of plain JSONL. The fields of the row are the fields of `Record`.

    Raises:
        Rejected: a field is missing, unknown, null, or has the wrong type or range.
    """
    return [_record(json.dumps(row))]


def mbpp_records(row: Row) -> list[Record]:
    """Read a problem of MBPP, from either the full or the sanitized version of the data set.

    The prompt ends with the tests, because they contain the name of the function.

    Source: Austin et al. 2021, Program Synthesis with Large Language Models (arXiv 2108.07732).

    Raises:
        Rejected: a field is missing, null or has the wrong type, or the solution is empty.
    """
    text = _field(row, "text" if "text" in row else "prompt", str)
    tests = tuple(_unix_lines(test) for test in _items(row, "test_list", str))
    sanitized = "test_imports" in row and "test_setup_code" not in row
    setup = _items(row, "test_imports", str) if sanitized else [_field(row, "test_setup_code", str)]
    fields: Row = {
        "task_id": f"mbpp/{_field(row, 'task_id', int)}",
        "prompt": "\n".join((_unix_lines(text), *tests)),
        "solution": _unix_lines(_field(row, "code", str)),
        "tests": tests,
        "setup": _unix_lines("\n".join(setup)),
    }
    return [_record(fields)]


def humaneval_records(row: Row) -> list[Record]:
    """Read a problem of HumanEval. Its solution continues the prompt, and its test calls the function.

    Source: Chen et al. 2021, Evaluating Large Language Models Trained on Code (arXiv 2107.03374).

    Raises:
        Rejected: a field is missing, null or has the wrong type, or the solution is empty.
    """
    prompt = _field(row, "prompt", str)
    fields: Row = {
        "task_id": _field(row, "task_id", str),
        "prompt": prompt,
        "preamble": prompt,
        "solution": _field(row, "canonical_solution", str),
        "tests": (f"{_field(row, 'test', str)}\ncheck({_field(row, 'entry_point', str)})",),
    }
    return [_record(fields)]


def codecontests_records(row: Row) -> list[Record]:
    """Read a problem of CodeContests. Each of its correct and incorrect solutions in Python 3 becomes a record.

    The result is empty if the problem has no solution in Python 3. Solutions and tests are either objects that contain
    parallel lists, or lists of objects. Languages, sources and difficulties are either numbers or names. The `task_id`
    begins with the source, because problems of different sources may have the same name.

    Source: Li et al. 2022, Competition-Level Code Generation with AlphaCode (arXiv 2203.07814).

    Raises:
        Rejected: a field is missing, null or has the wrong type, a solution is empty, or parallel lists have different
        lengths.
    """
    name, source = _field(row, "name", str), _optional_number(row, "source", SOURCES)
    if source is not None:
        name = f"{SOURCES[source].lower() if 0 <= source < len(SOURCES) else source}/{name}"
    task: Row = {
        "task_id": name,
        "prompt": _field(row, "description", str),
        "difficulty": _optional_number(row, "difficulty", DIFFICULTIES),
        "tests": tuple(
            StdioTest(stdin=stdin, stdout=stdout)
            for group in ("public_tests", "private_tests", "generated_tests")
            for stdin, stdout in _pairs(row, group, "input", "output", str)
        ),
        **{name: _field(row, name, str) for name in ("input_file", "output_file") if row.get(name) is not None},
        "time_limit": None if row.get("time_limit") is None else _seconds(_field(row, "time_limit", dict)),
    }
    return [
        _record({**task, "solution": solution, "is_correct": is_correct})
        for group, is_correct in (("solutions", True), ("incorrect_solutions", False))
        for language, solution in _pairs(row, group, "language", "solution", object)
        if _number(language, LANGUAGES, "'language'") == PYTHON_3
    ]


SHAPES: dict[str, Callable[[Row], list[Record]]] = {
    "jsonl": plain_records,
    "mbpp": mbpp_records,
    "humaneval": humaneval_records,
    "codecontests": codecontests_records,
}


def read_file(path: Path, shape: str, on_error: OnError, max_errors: int) -> tuple[list[Record], list[Rejection]]:
    """Read the records of one file, in the format that `shape` names.

    A JSON file contains an array of objects. Any other file contains one object per line. A file whose name ends in
    `.gz` is decompressed.

    Raises:
        InputError: the file cannot be read. Or `on_error` is "stop" and a row is faulty. Or `on_error` is "skip" and
            more than `max_errors` rows are faulty.
    """
    records, rejections = _read_rows(path, shape)
    _check_rejections(rejections, on_error, max_errors)
    return records, rejections


def read_splits(path: Path, shape: str, on_error: OnError, max_errors: int) -> tuple[Splits, list[Rejection]]:
    """Read the three splits of a data set, in the format that `shape` names.

    A folder contains one file per split. If the path is one file, `split_by_task` divides its tasks. The number of
    faulty rows in all files together may be at most `max_errors`.

    Raises:
        InputError: a file cannot be read, or there are too many faulty rows (see `read_file`). Or the path is neither a
            file nor a folder with a training file. Or a task is in two splits, or the training split has no records.
    """
    collected = {name: _read_rows(file, shape) for name, file in split_files(path).items()}
    rejections = [rejection for _, rejected in collected.values() for rejection in rejected]
    _check_rejections(rejections, on_error, max_errors)
    parts = {name: records for name, (records, _) in collected.items()}
    splits = split_by_task(parts["all"]) if "all" in parts else Splits(*(parts.get(s, []) for s in Splits._fields))
    counts = Counter(task for records in splits for task in {record.task_id for record in records})
    shared = sorted(task for task, count in counts.items() if count > 1)
    if shared:
        raise InputError(
            f"{path}: {len(shared)} tasks are in several splits, e.g. '{shared[0]}'. "
            "Keep all records of a task in one split."
        )
    if not splits.train:
        raise InputError(
            f"{path}: no records to train on ({len(rejections)} rejected). "
            "Add records to the training split, or use a folder with one file per split."
        )
    return splits, rejections


def split_files(path: Path) -> dict[str, Path]:
    """Return the file of each split in a folder, by the name of the split.

    If `path` is a file, the result contains only this file, under the name "all".

    Raises:
        InputError: the path is neither a file nor a folder with a training file, or a split has several files.
    """
    if path.is_file():
        return {"all": path}
    files: dict[str, Path] = {}
    for split, names in (("train", ["train"]), ("validation", ["validation", "valid"]), ("test", ["test"])):
        found = [file for name in names for end in SUFFIXES if (file := path / f"{name}{end}").is_file()]
        if len(found) > 1:
            raise InputError(f"{path}: keep only one of {', '.join(file.name for file in found)}.")
        if found:
            files[split] = found[0]
    if "train" not in files:
        raise InputError(f"{path}: {'no train file' if path.is_dir() else 'no such file or folder'}. {EXPECTED}")
    return files


def _check_type(value: object, kind: type[T], name: str) -> T:
    if value is None:
        raise Rejected("null", name)
    # In Python a bool is an int; in JSON `true` is not a number.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise Rejected("wrong type", f"{name}: expected {kind.__name__}, found {type(value).__name__}")
    return value


def _field(row: Row, name: str, kind: type[T]) -> T:
    if name not in row:
        raise Rejected("missing field", f"'{name}'")
    return _check_type(row[name], kind, f"'{name}'")


def _items(row: Row, name: str, kind: type[T]) -> list[T]:
    values: list[object] = _field(row, name, list)
    return [_check_type(value, kind, f"'{name}' item {number}") for number, value in enumerate(values, 1)]


def _pairs(row: Row, group: str, left: str, right: str, kind: type[T]) -> list[tuple[T, str]]:
    """Return the pairs of corresponding items of two lists.

    The lists are in the object `row[group]`, under the keys `left` and `right`. Instead, `row[group]` may be a list of
    objects with these keys. The items of the left list have the type `kind`; the items of the right list are strings.
    """
    if isinstance(row.get(group), list):
        objects: list[Row] = _items(row, group, dict)
        return [(_field(each, left, kind), _field(each, right, str)) for each in objects]
    columns: Row = _field(row, group, dict)
    lefts, rights = _items(columns, left, kind), _items(columns, right, str)
    if len(lefts) != len(rights):
        raise Rejected("lengths differ", f"'{group}': {len(lefts)} of '{left}', {len(rights)} of '{right}'")
    return list(zip(lefts, rights, strict=True))


def _seconds(duration: Row) -> float | None:
    """Return a duration of CodeContests in seconds, or None if it is zero, which means that it is unknown."""
    return _field(duration, "seconds", int) + _field(duration, "nanos", int) / 1e9 or None


def _number(value: object, names: tuple[str, ...], field: str) -> int:
    """Return the number that a value is or names."""
    if isinstance(value, str) and value not in names:
        raise Rejected("wrong value", f"{field}: expected a number or one of {', '.join(names)}")
    return names.index(value) if isinstance(value, str) else _check_type(value, int, field)


def _optional_number(row: Row, field: str, names: tuple[str, ...]) -> int | None:
    return None if row.get(field) is None else _number(row[field], names, f"'{field}'")


def _record(fields: Row | str) -> Record:
    """Build a record from its fields or their JSON text. Raise `Rejected` if the fields do not match the schema."""
    try:
        # In strict mode, pydantic accepts lists as tuples only if it parses the JSON itself.
        return Record.model_validate_json(fields) if isinstance(fields, str) else Record.model_validate(fields)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        kind, place = details["type"], ".".join(map(str, details["loc"]))
        reason = REASONS.get(kind, "wrong type" if kind.endswith("_type") else "wrong value")
        if details["input"] is None:
            reason = "null"
        elif kind == "string_too_short" and place == "solution":
            reason = "no solution"
        problem = details["msg"]
        if reason == "unknown field" and len(details["loc"]) == 1:
            problem = f"the fields are {', '.join(Record.model_fields)}"
        raise Rejected(reason, f"{truncate(repr(place))}: {problem}" if place else problem) from error


def _unix_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_rows(path: Path, shape: str) -> tuple[list[Record], list[Rejection]]:
    if shape not in SHAPES:
        raise InputError(f"{path}: unknown shape '{shape}'. Expected one of {', '.join(SHAPES)}.")
    records: list[Record] = []
    rejections: list[Rejection] = []
    first: dict[str, tuple[int, Record]] = {}
    unit = "row" if path.name.endswith(ARRAYS) else "line"
    for number, value in decode_rows(path):
        try:
            verify_json(value)
            found = SHAPES[shape](_check_type(value, dict, "the row"))
            for record in found:
                line, other = first.setdefault(record.task_id, (number, record))
                _check_same_problem(record, other, f"{unit} {line}")
            records += found
        except Rejected as error:
            rejections.append(Rejection(str(path), number, error.reason, error.detail))
    return records, rejections


def _check_same_problem(record: Record, other: Record, place: str) -> None:
    """Raise `Rejected` unless two records with the same `task_id` belong to the same problem.

    `place` is the place of the other record.
    """
    for name in PROBLEM_FIELDS:
        if getattr(record, name) != getattr(other, name):
            problem = f"also in {place}, with another '{name}'; give each problem its own task_id"
            raise Rejected("task_id of another problem", f"{truncate(repr(record.task_id))} is {problem}")


def _check_rejections(rejections: list[Rejection], on_error: OnError, max_errors: int) -> None:
    """Raise `InputError` unless the rejected rows may be skipped.

    They may be skipped if `on_error` is "skip" and there are at most `max_errors` of them.
    """
    number = len(rejections)
    if on_error == "stop" and rejections:
        listed = "\n  ".join(map(str, rejections[:MAX_SHOWN]))
        rest = f"\n  and {number - MAX_SHOWN} more" if number > MAX_SHOWN else ""
        raise InputError(f"faulty rows: {number}\n  {listed}{rest}\nCorrect them, or skip them: data.on_error=skip.")
    if number > max_errors:
        counts = Counter(rejection.reason for rejection in rejections).most_common()
        reasons = "\n  ".join(f"{count} x {reason}" for reason, count in counts)
        head = f"faulty rows: {number}, more than data.max_errors={max_errors}; the first: {rejections[0]}"
        raise InputError(f"{head}\n  {reasons}\nCorrect them, or raise data.max_errors.")
