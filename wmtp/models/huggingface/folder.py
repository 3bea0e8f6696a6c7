"""Read the config of a folder that `save_pretrained` wrote, without running code in the folder."""

import json
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from wmtp.errors import InputError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
"""Names of the files that indicate stored weights. A folder with weights contains at least one of them."""
ADAPTER = "adapter_config.json"
"""Name of the file with which transformers would load another model and adapters of it."""


def read_model_config(key: str, path: Path, *, weights: bool = True) -> PreTrainedConfig:
    """Load the config in a folder, and check that the required files exist. Code in the folder is never run.

    Args:
        key: the config key that contains the path; it is used in error messages.
        path: the folder.
        weights: whether a file with weights is required.

    Raises:
        InputError: a file is missing, or the config is not usable.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise InputError(
                f"{key}={path}: has no {name}; name the folder to which save_pretrained wrote model and tokenizer"
            )
    if (path / ADAPTER).exists():
        raise InputError(f"{key}={path}: has an {ADAPTER}, which names other models and code; merge the adapter first")
    if weights and not any((path / name).is_file() for name in WEIGHTS):
        raise InputError(
            f"{key}={path}: has no {WEIGHTS[0]}; other formats are not supported: save the model as safetensors"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        index = path / WEIGHTS[1]
        shards = set(json.loads(index.read_bytes())["weight_map"].values()) if index.is_file() else set()
        if outside := [name for name in shards if Path(name).name != name or name == ".."]:
            raise ValueError(f"{index.name} names files outside the folder: {outside}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{key}={path}: its config.json is not usable: {one_line(error)}") from error
    config._attn_implementation = None  # otherwise it could name a repository, whose code transformers would run
    return config


def one_line(error: Exception) -> str:
    """Return the message of an exception as one line."""
    return " ".join(str(error).split())
