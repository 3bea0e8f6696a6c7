"""Access to the files in the folder of a run."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from wmtp.config.moved_targets import update_config
from wmtp.errors import InputError, refuse_odd_content
from wmtp.runtime.json_lines import read_json_lines
from wmtp.runtime.run_dir import EVALUATIONS, PRETRAIN, PROVENANCE, TOKENS, read_status
from wmtp.runtime.sweep_jobs import sweep_label
from wmtp.runtime.untrusted_files import parse_yaml, require_inside
from wmtp.tracking.jsonl import FILE_NAME


@dataclass(frozen=True)
class RunRecord:
    """The folder of a run. A file in it is read when its content is first accessed; a missing file counts as empty."""

    folder: Path
    final_status: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Fields that replace those of status.json if a report is written before the final status is saved."""

    @cached_property
    def status(self) -> dict[str, Any]:
        """Content of status.json. The fields in `final_status` replace those of the file."""
        return read_status(self.folder) | dict(self.final_status)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config of the run, read from config.yaml."""
        content: dict[str, Any] = update_config(_yaml(self.folder / "config.yaml"))
        return content

    @cached_property
    def choices(self) -> dict[str, str]:
        """The chosen option of each config group, for example {"algo": "baseline"}.

        Config groups for which no option was chosen are left out.
        """
        saved = _yaml(self.folder / ".hydra" / "hydra.yaml")
        chosen = saved.get("hydra", {}).get("runtime", {}).get("choices", {})
        return {str(group): str(option) for group, option in chosen.items() if option is not None}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """Content of summary.json, which is empty unless the run finished."""
        return _json(self.folder / "summary.json")

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Content of provenance.json."""
        return _json(self.folder / PROVENANCE)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        return read_json_lines(self.folder / FILE_NAME)

    @cached_property
    def pretrain_metrics(self) -> list[dict[str, Any]]:
        """Lines of the metrics.jsonl of stage 1."""
        return read_json_lines(self.folder / PRETRAIN / FILE_NAME)

    @cached_property
    def tokens(self) -> dict[str, Any]:
        """Content of tokens.json: the tokens of some solutions, and the calibration of the value head."""
        return _json(self.folder / TOKENS)

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Lines of samples.jsonl, each with a sample that the model generated for a validation or test problem."""
        return read_json_lines(self.folder / "samples.jsonl")

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Summaries written by `wmtp.evaluate` for models of this run."""
        return [_json(path) for path in sorted(self.folder.glob(f"{EVALUATIONS}/*/summary.json"))]

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.config["seed"])

    @property
    def name(self) -> str:
        """The configured name of the run, the label of its job in a sweep, or the name of its folder."""
        folder = self.folder.resolve()
        return str(self.config.get("run_name") or sweep_label(folder) or folder.name)

    def series(self, metric: str) -> list[tuple[int, float]]:
        """Return the pairs (step, value) of a metric that the run recorded."""
        return [(line["step"], float(line[metric])) for line in self.metrics if line.get(metric) is not None]


def is_attempt(sample: Mapping[str, Any]) -> bool:
    """Return whether a line of samples.jsonl is of an attempt, which is a sample at a temperature above 0."""
    return "temperature" in sample


def find_runs(folders: Iterable[Path]) -> list[RunRecord]:
    """Return the runs in the given folders and in all folders below them. The runs of each folder are sorted by path.

    Raises:
        InputError: a folder does not exist or contains no run.
    """
    found: dict[Path, RunRecord] = {}
    for folder in folders:
        below = [path.parent for path in folder.rglob("status.json") if EVALUATIONS not in path.parts]
        runs = sorted((path for path in below if (path / "config.yaml").exists()), key=_sweep_order)
        if not runs:
            problem = "contains no run" if folder.exists() else "does not exist"
            raise InputError(f"{folder}: {problem}; name the folder of a run, of a sweep, or of several runs")
        for path in runs:
            require_inside(path)
        found |= {path.resolve(): RunRecord(path) for path in runs}
    return list(found.values())


def _sweep_order(path: Path) -> tuple[tuple[int, str], ...]:
    """Return a sort key for a path. Folder names that are numbers are sorted as numbers, others as text."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in path.parts)


def evaluated_on(evaluation: Mapping[str, Any]) -> str:
    """Return the split and the data of an evaluation as text, as far as they are not the test split of the run."""
    split, source = evaluation.get("split", "test"), Path(str(evaluation.get("source"))).name
    where = [split] if split != "test" else []
    where += [source] if evaluation.get("is_run_data") is False else []
    return f"evaluated ({', '.join(where)})" if where else "evaluated"


def _json(path: Path) -> dict[str, Any]:
    with refuse_odd_content(path):
        return dict(json.loads(path.read_bytes())) if path.exists() else {}


def _yaml(path: Path) -> dict[str, Any]:
    with refuse_odd_content(path):
        return dict(parse_yaml(path)) if path.exists() else {}
