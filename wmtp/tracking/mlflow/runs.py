"""A run in MLflow: finding the one that belongs to a folder, or making it, and saying what it is."""

import getpass
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp.runtime.background import described
from wmtp.runtime.run_dir import PROVENANCE
from wmtp.tracking.tail import clean_name

if TYPE_CHECKING:  # importing mlflow takes seconds: only the thread does it
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Param, Run, RunTag

log = logging.getLogger(__name__)
PARAMETER_CHARACTERS = 6_000
TAG_CHARACTERS = 5_000
DIGEST_CHARACTERS = 36
CHANGES = "+changes"
SOURCE = "wmtp.train"


@dataclass(frozen=True)
class Mark:
    """A tag that one run alone has, by which it is found when nothing else tells which one it is."""

    name: str
    value: str

    def matches(self) -> str:
        """The condition of a search."""
        quote = '"' if "'" in self.value else "'"
        return f"tags.`{self.name}` = {quote}{self.value}{quote}"


@dataclass(frozen=True)
class NewRun:
    """What a run is made with."""

    name: str
    mark: Mark | None
    tags: dict[str, str] = field(default_factory=dict)


def open_run(client: "MlflowClient", experiment_id: str, run_id: str, new: NewRun) -> "Run":
    """The run of this id; without one the run that has the mark; a new one if there is none or somebody deleted it."""
    run = known_run(client, run_id) if run_id else None
    if run is None and new.mark is not None:
        found = client.search_runs([experiment_id], new.mark.matches(), max_results=1, order_by=["start_time ASC"])
        run = found[0] if found else None
    if run is not None:
        return run
    marked = {} if new.mark is None else {new.mark.name: new.mark.value}
    tags = {clean_name(name): text[:TAG_CHARACTERS] for name, text in (new.tags | marked).items()}
    return client.create_run(experiment_id, run_name=new.name, tags=tags)


def known_run(client: "MlflowClient", run_id: str) -> "Run | None":
    """The run of this id, unless it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        log.warning("MLflow knows nothing of run %s, it is made again: %s", run_id, described(error))
        return None
    if run.info.lifecycle_stage != "active":
        log.warning("run %s was deleted in MLflow, it is made again", run_id)
        return None
    return run


def described_by(run: "Run", parameters: dict[str, object], tags: dict[str, str]) -> "tuple[list[Param], list[RunTag]]":
    """The parameters and tags that a run lacks. A parameter cannot change: one that did is a tag `resumed.<name>`."""
    from mlflow.entities import Param, RunTag

    wanted = {clean_name(name): text[:TAG_CHARACTERS] for name, text in tags.items()}
    missing: dict[str, str] = {}
    for name, value in parameters.items():
        key, text = clean_name(name), str(value)[:PARAMETER_CHARACTERS]
        changed = clean_name(f"resumed.{key}")
        if key not in run.data.params:
            missing[key] = text
        elif run.data.params[key] != text or changed in run.data.tags:
            wanted[changed] = text[:TAG_CHARACTERS]
    changes = {key: text for key, text in wanted.items() if run.data.tags.get(key) != text}
    return [Param(key, text) for key, text in missing.items()], [RunTag(key, text) for key, text in changes.items()]


def origin_tags(provenance: dict[str, Any]) -> dict[str, str]:
    """Tags, some of which MLflow shows in columns of their own, that say who ran which code."""
    tags = {"mlflow.source.name": SOURCE, "mlflow.source.type": "LOCAL"}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError) as error:  # a container's user may have no name
        log.info("the user has no name, so the run has no tag mlflow.user: %s", error)
    if revision := provenance.get("git_revision"):
        tags |= {"wmtp.git_revision": revision, "mlflow.source.git.commit": revision.removesuffix(CHANGES)}
    return tags


def missing_inputs(run: "Run", provenance: dict[str, Any]) -> "list[DatasetInput]":
    """The data that a run learns from and is validated on, as far as MLflow does not know them."""
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    data = provenance.get("data")
    if not data:
        return []
    known = {(one.dataset.name, one.dataset.digest) for one in run.inputs.dataset_inputs} if run.inputs else set()
    inputs = []
    for context in ("train", "validation"):
        # MLflow takes inputs that share name and digest for one, and would lose a context.
        name, digest = f"{data['name']}/{context}", data["fingerprint"][:DIGEST_CHARACTERS]
        source = json.dumps({"uri": str(data["source"]), "tokenizer": data["tokenizer"]})
        profile = json.dumps({"num_records": data[context]})
        if (name, digest) not in known:
            dataset = Dataset(name, digest, source_type="local", source=source, profile=profile)
            inputs.append(DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)]))
    return inputs


def read_provenance(folder: Path) -> dict[str, Any]:
    """The content of a folder's provenance.json; empty if it has none."""
    path = folder / PROVENANCE
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content
