"""Loading of trained models from the folder of a run, from a checkpoint, or from the folder of a pretrained model."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from wmtp.checkpoint.manifest import find_damage, manifest_hash
from wmtp.checkpoint.state import load_model
from wmtp.checkpoint.store import CheckpointStore, load
from wmtp.config.paths import with_start_paths
from wmtp.config.schema import ConfigError, ConfigIssue, build, is_node, iter_nodes, node_issues
from wmtp.config.trust import load_run_config
from wmtp.data.tokenizer import Tokenizer, read_backend, tokenizer_difference
from wmtp.distributed.device import Hardware
from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError, refuse_odd_content
from wmtp.models.lora import Lora
from wmtp.models.mtp import MtpModel
from wmtp.models.source import ModelSource
from wmtp.runtime.standard_streams import announce
from wmtp.runtime.untrusted_files import require_inside

USED_NODES = ("model", "model.tokenizer", "algo", "data")
"""Nodes that the config of a run must have, because they are needed to use its model."""
USED_DATA_KEYS = ("data.template", "data.max_length")
"""Data settings of a run that are used with other data, too."""
MODEL_FOLDER = "model"
"""Name of the subfolder of a run that contains copies of the config and tokenizer of the run's pretrained model."""


@dataclass(frozen=True)
class TrainedCheckpoint:
    """A checkpoint whose files were verified, together with the config of its run."""

    path: Path
    run_folder: Path
    config: DictConfig

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the manifest, which contains the hashes of all other files of the checkpoint."""
        return manifest_hash(self.path)

    @property
    def position(self) -> tuple[int, int]:
        """The training step and the epoch at which the checkpoint was saved."""
        with refuse_odd_content(self.path / "state.json"):
            position = json.loads((self.path / "state.json").read_bytes())["position"]
            return int(position["step"]), int(position["epoch"])

    def tokenizer(self, cache_dir: Path) -> Tokenizer:
        """Return the tokenizer with which the model was trained."""
        tokenizer: Tokenizer = build(self.config.model.tokenizer, cache_dir=cache_dir)
        return tokenizer

    def load_model(self, tokenizer: Tokenizer, hardware: Hardware, cache_dir: Path) -> MtpModel:
        """Build the model from the config of the run, without a value head, and load its weights.

        Raises:
            InputError: files are missing, or the model was trained with another tokenizer.
        """
        announce("loading the model …")
        source = build_source(self.config.model, tokenizer, cache_dir)
        return load_weights(self.path, source.empty(), tokenizer, hardware, verified=True)


def find_trained_checkpoint(path: Path, processes: Processes | None = None) -> TrainedCheckpoint:
    """Find and verify the checkpoint that `path` names, and read the config of its run.

    If `processes` is given, all ranks must call this function, and only rank 0 looks for the checkpoint.

    Raises:
        InputError: there is no undamaged checkpoint, or the config of its run is missing or not valid.
    """
    processes = processes or Processes.single_process()
    checkpoint, run_folder = map(Path, processes.run_on_main(lambda: [str(each) for each in find_checkpoint(path)]))
    return TrainedCheckpoint(checkpoint, run_folder, read_run_config(run_folder / "config.yaml"))


def find_checkpoint(path: Path) -> tuple[Path, Path]:
    """Find and verify a checkpoint. Return its path, and the folder of its run.

    `path` is either a checkpoint or the folder of a run. If it is the folder of a run, the best checkpoint of the run
    is chosen. If no checkpoint is marked as the best, the latest undamaged checkpoint is chosen.

    Raises:
        InputError: there is no checkpoint, or the chosen checkpoint is damaged.
    """
    is_checkpoint = (path / "manifest.json").exists()
    if not is_checkpoint and not (path / "checkpoints").is_dir():
        problem = "neither a run's folder nor a checkpoint nor a pretrained model"
        raise InputError(f"{path}: {problem}: it has no checkpoints, manifest.json or config.json")
    run_folder = path.parent.parent if is_checkpoint else path
    if (run_folder / "config.yaml").exists():  # otherwise it is refused below, and may be a folder as large as /
        require_inside(run_folder)
    chosen = path if is_checkpoint else CheckpointStore(path).best()
    if chosen is None:
        return CheckpointStore(path).latest(), run_folder  # `latest` verifies it
    if (damage := find_damage(chosen)) is not None:
        raise InputError(f"{chosen}: no complete checkpoint: {damage}")
    return chosen, run_folder


def read_run_config(path: Path) -> DictConfig:
    """Load the config.yaml of a run from `path`.

    The run's folder may contain copies of the config and tokenizer of its pretrained model. Then the paths of the
    tokenizer and of the model in the config are replaced by the folder of these copies. If the run has adapters, the
    path of the model is kept, because the original base weights are needed.

    Raises:
        InputError: the file is missing, or one of the nodes in `USED_NODES` is missing or has invalid values.
    """
    if not path.exists():
        raise InputError(f"{path}: is missing; it is needed to build the model of the checkpoint")
    config = with_start_paths(load_run_config(path), path.parent)
    for key in USED_NODES:
        if not is_node(OmegaConf.select(config, key)):
            raise InputError(f"{path}: its {key} is not a class of wmtp")
    if (model_folder := path.parent / MODEL_FOLDER).is_dir():
        config.model.tokenizer.path = str(model_folder)
        if not OmegaConf.select(config, "model.lora.rank"):  # adapters need the original base weights
            config.model.path = str(model_folder)
    nodes = [("model", config.model), *iter_nodes(config.model, "model")]
    issues = [issue for key, node in nodes for issue in node_issues(node, key)]
    issues += [issue for issue in node_issues(config.data, "data") if issue.key in USED_DATA_KEYS]
    if issues:
        raise ConfigError([ConfigIssue(f"{path}: {issue.key}", issue.value, issue.problem) for issue in issues])
    return config


def build_source(node: DictConfig, tokenizer: Tokenizer | None, cache_dir: Path) -> ModelSource:
    """Build the model source that a config node describes.

    The source uses the argument `tokenizer` instead of the tokenizer in `node`.
    """
    model_node = OmegaConf.masked_copy(node, [str(key) for key in node if key != "tokenizer"])
    source: ModelSource = build(model_node, tokenizer=tokenizer, cache_dir=cache_dir)
    return source


def load_weights(
    checkpoint: Path, model: MtpModel, tokenizer: Tokenizer, hardware: Hardware, *, verified: bool = False
) -> MtpModel:
    """Load the weights of a checkpoint into a model, and return the model after moving it to the device of `hardware`.

    If `verified` is true, the files of the checkpoint were verified before, and they are not verified again.

    Raises:
        InputError: the checkpoint is damaged, was trained with another tokenizer or base model, or does not match
            the model.
    """
    snapshot = load(checkpoint, optimizer=False, verified=verified)
    with refuse_odd_content(checkpoint / "state.json"):
        identity = dict(snapshot.state["identity"])
        stored, base = str(identity["tokenizer"]), identity.get("base") and str(identity["base"])
    current = tokenizer.fingerprint
    if stored != current:
        raise InputError(f"{checkpoint}: was trained with another tokenizer: {stored[:16]}…, current: {current[:16]}…")
    if model.value_head is None:
        snapshot.model = {name: x for name, x in snapshot.model.items() if not name.startswith("value_head.")}
    if base != model.base_fingerprint:
        stored, current = ("none" if each is None else f"{each[:16]}…" for each in (base, model.base_fingerprint))
        raise InputError(f"{checkpoint}: its adapters belong to another base model: {stored}, current: {current}")
    try:
        load_model(model, snapshot.model, model.base_names)
    except RuntimeError as error:
        raise InputError(f"{checkpoint}: does not fit the model: {' '.join(str(error).split())}") from error
    return model.to(hardware.device)


def load_trained(
    path: Path, tokenizer: Tokenizer, hardware: Hardware, cache_dir: Path, *, key: str = "algo.reference"
) -> MtpModel:
    """Load a trained model from `path`. `key` is the config key of the path, for error messages.

    `path` is the folder of a run, a checkpoint, or a folder written by `save_pretrained`. The model of a run or of a
    checkpoint is built from the run's config.yaml, without a value head. A model from a folder written by
    `save_pretrained` has one prediction head.

    Raises:
        InputError: files are missing or damaged, or the model was trained with another tokenizer.
    """
    if (path / "config.json").is_file():
        return _load_pretrained(path, tokenizer, key).to(hardware.device)
    return find_trained_checkpoint(path, hardware.processes).load_model(tokenizer, hardware, cache_dir)


def _load_pretrained(path: Path, tokenizer: Tokenizer, key: str) -> MtpModel:
    from wmtp.models.huggingface.pretrained import Pretrained  # imports transformers, which takes seconds

    source = Pretrained(tokenizer=tokenizer, path=path, num_heads=1, lora=Lora())
    source.key = key
    if issues := list(source.issues()):
        raise source.error("; ".join(problem for _, _, problem in issues))
    difference = tokenizer_difference(tokenizer, read_backend(path / "tokenizer.json"))
    if difference is not None:
        raise InputError(
            f"{path}: its tokenizer is not that of the policy: {difference}; use a model with the same one"
        )
    return source.create()


def check_max_positions(model: MtpModel, length: int, key: str) -> None:
    """Check that a model supports sequences of `length` tokens.

    `key` is the config key of this length. It is used in the error message.

    Raises:
        InputError: `length` is greater than the model's maximum number of positions.
    """
    limit = model.architecture.max_positions
    if limit is not None and length > limit:
        raise InputError(f"{key}={length}: the model reads {limit} tokens at most")
