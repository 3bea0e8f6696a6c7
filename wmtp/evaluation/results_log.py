"""The result files of an evaluation. Each graded sample is appended, so an interrupted evaluation can continue."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmtp.data.records import Record
from wmtp.errors import InputError
from wmtp.evaluation.sampling import Sample
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.json_lines import read_lines
from wmtp.runtime.run_dir import display_path

SAMPLES, RESULTS, IDENTITY = "samples.jsonl", "results.jsonl", "evaluation.json"
Row = dict[str, Any]
Key = tuple[str, int]


class ResultsLog:
    """Writer of the files samples.jsonl and results.jsonl. Each file has one line for each graded sample.

    Public evaluation tools can read samples.jsonl. `identity` contains all settings that determine the samples. If the
    folder already contains an evaluation, `identity` must equal the identity stored there.

    Raises:
        InputError: the folder contains another evaluation, or a damaged file.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        path = folder / IDENTITY
        if path.exists() and (stored := _read_identity(path)) != identity:
            changed = ", ".join(sorted(key for key in identity | stored if stored.get(key) != identity.get(key)))
            raise InputError(
                f"{folder}: contains another evaluation ({changed} differ); choose another folder: hydra.run.dir=…"
            )
        replace_atomically(path, encode_json(identity))
        samples, results = (_read(folder / name) for name in (SAMPLES, RESULTS))
        self.results = {key: row for key, row in results.items() if key in samples}
        self._samples = {key: samples[key] for key in self.results}
        self._write(list(self.results))
        self._files = [(folder / name).open("a") for name in (SAMPLES, RESULTS)]

    def add(self, sample: Sample) -> None:
        """Append a graded sample to both files."""
        assert sample.verdict is not None
        completion, record = sample.completion, sample.record
        key = {"task_id": record.task_id, "index": sample.index}
        sample_row = {**key, "completion": completion.text, "solution": record.preamble + completion.text}
        result_row = {
            **key,
            "difficulty": record.difficulty,
            "outcome": sample.verdict.outcome,
            "reason": sample.verdict.reason,
            "detail": sample.verdict.detail,
            "seconds": round(sample.verdict.seconds, 3),
            "finish": completion.finish,
            **completion.stats._asdict(),
        }
        self._samples[record.task_id, sample.index] = sample_row
        self.results[record.task_id, sample.index] = result_row
        for file, row in zip(self._files, (sample_row, result_row), strict=True):
            file.write(json.dumps(row) + "\n")
            file.flush()

    def missing(self, problems: Sequence[Record], n: int) -> list[tuple[Record, int]]:
        """Return a pair (problem, sample index) for each sample that is not in the files.

        A complete evaluation has `n` samples of each problem.
        """
        return [(p, index) for p in problems for index in range(n) if (p.task_id, index) not in self.results]

    def close(self, problems: Sequence[Record]) -> None:
        """Close the files, and sort the lines of each file by problem and sample index."""
        for file in self._files:
            file.close()
        order = {problem.task_id: number for number, problem in enumerate(problems)}
        self._write(sorted(self.results, key=lambda key: (order.get(key[0], len(order)), key)))

    def _write(self, keys: list[Key]) -> None:
        for name, rows in ((SAMPLES, self._samples), (RESULTS, self.results)):
            replace_atomically(self.folder / name, "".join(json.dumps(rows[key]) + "\n" for key in keys).encode())


def _read_identity(path: Path) -> dict[str, Any]:
    try:
        identity: dict[str, Any] = dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise InputError(f"{display_path(path)}: is damaged ({error}); delete its folder to start again") from error
    return identity


def _read(path: Path) -> dict[Key, Row]:
    """Return the rows of a JSONL file, with pairs (problem name, sample index) as keys.

    An incomplete last line, which a crash may have left, is ignored. If the file does not exist, the result is empty.

    Raises:
        InputError: a complete line is damaged.
    """
    rows: dict[Key, Row] = {}
    for number, line in enumerate(read_lines(path), 1):
        try:
            row = json.loads(line)
            rows[row["task_id"], row["index"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{display_path(path)}:{number}: is damaged ({error}); delete the file to start again"
            ) from error
    return rows
