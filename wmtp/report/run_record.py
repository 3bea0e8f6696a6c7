"""What a run left in its folder, as the reports read it."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from wmtp.config.moved_targets import update_targets
from wmtp.errors import InputError
from wmtp.runtime.run_dir import EVALUATIONS, PRETRAIN, PROVENANCE, TOKENS, read_status
from wmtp.tracking.jsonl import FILE_NAME, read_metrics


@dataclass(frozen=True)
class RunRecord:
    """A run's folder; files are read when they are asked for, and one that is missing is empty."""

    folder: Path
    ending: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What status.json is about to say, while the run is still ending."""

    @cached_property
    def status(self) -> dict[str, Any]:
        """The content of status.json."""
        return read_status(self.folder) | dict(self.ending)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The resolved config."""
        content: dict[str, Any] = update_targets(_yaml(self.folder / "config.yaml"))
        return content

    @cached_property
    def choices(self) -> dict[str, str]:
        """The option that was chosen of each config group; groups without one are left out."""
        saved = _yaml(self.folder / ".hydra" / "hydra.yaml")
        chosen = saved.get("hydra", {}).get("runtime", {}).get("choices", {})
        return {str(group): str(option) for group, option in chosen.items() if option is not None}

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The content of summary.json; empty where the run did not end well."""
        return _json(self.folder / "summary.json")

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """The content of provenance.json."""
        return _json(self.folder / PROVENANCE)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return _lines(self.folder / FILE_NAME)

    @cached_property
    def stage_metrics(self) -> list[dict[str, Any]]:
        """The lines that the stage before the training wrote."""
        return _lines(self.folder / PRETRAIN / FILE_NAME)

    @cached_property
    def tokens(self) -> dict[str, Any]:
        """The content of tokens.json: some samples token by token, and how well values are calibrated."""
        return _json(self.folder / TOKENS)

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """The lines of samples.jsonl: answers to held-out problems."""
        return _lines(self.folder / "samples.jsonl")

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The summaries of what `wmtp.evaluate` measured of the run's model."""
        return [_json(path) for path in sorted(self.folder.glob(f"{EVALUATIONS}/*/summary.json"))]

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.config["seed"])

    @property
    def name(self) -> str:
        """What the user called the run, or the name of its folder."""
        return str(self.config.get("run_name") or self.folder.resolve().name)

    def series(self, metric: str) -> list[tuple[int, float]]:
        """A metric's values with their steps."""
        return [(line["step"], float(line[metric])) for line in self.metrics if line.get(metric) is not None]


def find_runs(folders: Iterable[Path]) -> list[RunRecord]:
    """The runs in these folders or below them, in the order of their paths.

    Raises:
        InputError: a folder is not there, or holds no run.
    """
    found: dict[Path, RunRecord] = {}
    for folder in folders:
        below = [path.parent for path in folder.rglob("status.json") if EVALUATIONS not in path.parts]
        runs = sorted((path for path in below if (path / "config.yaml").exists()), key=_in_order)
        if not runs:
            problem = "holds no run" if folder.exists() else "nothing is there"
            raise InputError(f"{folder}: {problem}; name a run's folder, a sweep's, or one above several")
        found |= {path.resolve(): RunRecord(path) for path in runs}
    return list(found.values())


def _in_order(path: Path) -> tuple[tuple[int, str], ...]:
    """Jobs of a sweep by their numbers, anything else by its name."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in path.parts)


def _json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content


def _yaml(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text()) if path.exists() else {}
    return content


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that a run appends to; a last one that was cut off by a crash is left out."""
    return list(read_metrics(path)) if path.exists() else []
