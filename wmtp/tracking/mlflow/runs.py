"""Find or create the MLflow run that belongs to a folder, and collect its parameters, tags and data sets."""

import getpass
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wmtp.runtime.background import format_error
from wmtp.runtime.run_dir import PROVENANCE
from wmtp.tracking.tail import clean_name

if TYPE_CHECKING:  # the import takes seconds: only the sending thread imports mlflow
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Param, Run, RunTag

log = logging.getLogger(__name__)
MAX_PARAMETER_LENGTH = 6_000
MAX_TAG_LENGTH = 5_000
MAX_DIGEST_LENGTH = 36
DIRTY_SUFFIX = "+changes"
"""Suffix that is appended to a git revision if the working tree has uncommitted changes."""
SOURCE = "wmtp.train"
"""Name of the training program, as shown in MLflow."""


@dataclass(frozen=True)
class UniqueTag:
    """A tag of an MLflow run that no other run has. The run is found by this tag if mlflow.json is missing."""

    name: str
    value: str

    def search_filter(self) -> str:
        """Return the filter string with which MLflow finds the run that has this tag."""
        quote = '"' if "'" in self.value else "'"
        return f"tags.`{self.name}` = {quote}{self.value}{quote}"


@dataclass(frozen=True)
class NewRun:
    """Name and tags of an MLflow run that is to be created."""

    name: str
    unique_tag: UniqueTag | None
    tags: dict[str, str] = field(default_factory=dict)


def open_run(client: "MlflowClient", experiment_id: str, run_id: str, new: NewRun) -> "Run":
    """Find an MLflow run by its id or by its unique tag. If the run does not exist or was deleted, create a new run.

    Args:
        client: client of the MLflow store.
        experiment_id: id of the experiment that contains the run.
        run_id: id of the run; empty if the id is not known.
        new: name and tags of the new run. They include the unique tag.
    """
    run = get_active_run(client, run_id) if run_id else None
    if run is None and new.unique_tag is not None:
        filter_string = new.unique_tag.search_filter()
        found = client.search_runs([experiment_id], filter_string, max_results=1, order_by=["start_time ASC"])
        run = found[0] if found else None
    if run is not None:
        return run
    unique = {} if new.unique_tag is None else {new.unique_tag.name: new.unique_tag.value}
    tags = {clean_name(name): text[:MAX_TAG_LENGTH] for name, text in (new.tags | unique).items()}
    return client.create_run(experiment_id, run_name=new.name, tags=tags)


def get_active_run(client: "MlflowClient", run_id: str) -> "Run | None":
    """Return the MLflow run with the id `run_id`. If it is missing or was deleted, log a warning and return None."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        log.warning("run %s does not exist in MLflow; it is created again: %s", run_id, format_error(error))
        return None
    if run.info.lifecycle_stage != "active":
        log.warning("run %s was deleted in MLflow; it is created again", run_id)
        return None
    return run


def missing_params_and_tags(
    run: "Run", parameters: dict[str, object], tags: dict[str, str]
) -> "tuple[list[Param], list[RunTag]]":
    """Return those of the given parameters and tags that an MLflow run does not have.

    MLflow does not allow a parameter to be changed. If the value of a parameter has changed, the new value is returned
    as a tag with the name `resumed.<parameter name>`.
    """
    from mlflow.entities import Param, RunTag

    new_tags = {clean_name(name): text[:MAX_TAG_LENGTH] for name, text in tags.items()}
    missing: dict[str, str] = {}
    for name, value in parameters.items():
        key, text = clean_name(name), str(value)[:MAX_PARAMETER_LENGTH]
        resumed_tag = clean_name(f"resumed.{key}")
        if key not in run.data.params:
            missing[key] = text
        elif run.data.params[key] != text or resumed_tag in run.data.tags:
            new_tags[resumed_tag] = text[:MAX_TAG_LENGTH]
    changes = {key: text for key, text in new_tags.items() if run.data.tags.get(key) != text}
    return [Param(key, text) for key, text in missing.items()], [RunTag(key, text) for key, text in changes.items()]


def origin_tags(provenance: dict[str, Any]) -> dict[str, str]:
    """Return tags that contain the name of the training program, the user and the git revision.

    MLflow shows tags whose names start with `mlflow.` in columns of its table of runs.
    """
    tags = {"mlflow.source.name": SOURCE, "mlflow.source.type": "LOCAL"}
    try:
        tags["mlflow.user"] = getpass.getuser()
    except (KeyError, OSError) as error:  # in a container, the user may have no name
        log.info("the user has no name, so the run has no tag mlflow.user: %s", error)
    if revision := provenance.get("git_revision"):
        tags |= {"wmtp.git_revision": revision, "mlflow.source.git.commit": revision.removesuffix(DIRTY_SUFFIX)}
    return tags


def missing_inputs(run: "Run", provenance: dict[str, Any]) -> "list[DatasetInput]":
    """Return the training data and the validation data of a run as MLflow data sets.

    Data sets that the MLflow run already has are left out. `provenance` is the content of provenance.json.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    data = provenance.get("data")
    if not data:
        return []
    logged = [entry.dataset for entry in run.inputs.dataset_inputs] if run.inputs else []
    known = {(dataset.name, dataset.digest) for dataset in logged}
    inputs = []
    for context in ("train", "validation"):
        # MLflow merges inputs of equal name and digest, so equal names would lose one of the contexts.
        name, digest = f"{data['name']}/{context}", data["fingerprint"][:MAX_DIGEST_LENGTH]
        source = json.dumps({"uri": str(data["source"]), "tokenizer": data["tokenizer"]})
        profile = json.dumps({"num_records": data[context]})
        if (name, digest) not in known:
            dataset = Dataset(name, digest, source_type="local", source=source, profile=profile)
            inputs.append(DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)]))
    return inputs


def read_provenance(folder: Path) -> dict[str, Any]:
    """Return the content of the provenance.json in a run's folder, or an empty dictionary if the file is missing."""
    path = folder / PROVENANCE
    content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return content
