"""The files of an evaluation, which grow answer by answer, so that an interrupted one goes on where it was."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmtp.data.records import Record
from wmtp.errors import InputError
from wmtp.evaluation.sampling import Answer
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.run_dir import typed

SAMPLES, RESULTS, IDENTITY = "samples.jsonl", "results.jsonl", "evaluation.json"
Row = dict[str, Any]
Key = tuple[str, int]


class Journal:
    """samples.jsonl, which public harnesses read, and results.jsonl: a line for each judged sample.

    `identity` is all that decides what the samples are; it must agree with what the folder holds already.

    Raises:
        InputError: the folder holds another evaluation.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        path = folder / IDENTITY
        if path.exists() and (there := _read_identity(path)) != identity:
            changed = ", ".join(sorted(key for key in identity | there if there.get(key) != identity.get(key)))
            raise InputError(
                f"{folder}: holds another evaluation ({changed} differ); name another folder: hydra.run.dir=…"
            )
        replace_atomically(path, encode_json(identity))
        samples, results = (_read(folder / name) for name in (SAMPLES, RESULTS))
        self.results = {key: row for key, row in results.items() if key in samples}
        self._samples = {key: samples[key] for key in self.results}
        self._write(list(self.results))
        self._files = [(folder / name).open("a") for name in (SAMPLES, RESULTS)]

    def add(self, answer: Answer) -> None:
        """Write down an answer that was judged."""
        assert answer.verdict is not None
        completion, record = answer.completion, answer.record
        key = {"task_id": record.task_id, "index": answer.index}
        sample = {**key, "completion": completion.text, "solution": record.preamble + completion.text}
        result = {
            **key,
            "difficulty": record.difficulty,
            "outcome": answer.verdict.outcome,
            "reason": answer.verdict.reason,
            "detail": answer.verdict.detail,
            "seconds": round(answer.verdict.seconds, 3),
            "finish": completion.finish,
            **completion.cost._asdict(),
        }
        self._samples[record.task_id, answer.index] = sample
        self.results[record.task_id, answer.index] = result
        for file, row in zip(self._files, (sample, result), strict=True):
            file.write(json.dumps(row) + "\n")
            file.flush()

    def missing(self, problems: Sequence[Record], n: int) -> list[tuple[Record, int]]:
        """The samples that are still to be made."""
        return [(p, index) for p in problems for index in range(n) if (p.task_id, index) not in self.results]

    def finish(self, problems: Sequence[Record]) -> None:
        """Close the files, with their lines in the order of the problems and not of the workers."""
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
        raise InputError(f"{typed(path)}: is damaged ({error}); delete its folder to begin anew") from error
    return identity


def _read(path: Path) -> dict[Key, Row]:
    """The whole lines of a file; one that was cut off by a crash is left out.

    Raises:
        InputError: a whole line is damaged.
    """
    if not path.exists():
        return {}
    whole, _, _ = path.read_text().rpartition("\n")
    rows: dict[Key, Row] = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["task_id"], row["index"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{typed(path)}:{number}: is damaged ({error}); delete the file to begin anew") from error
    return rows
