"""A folder that `save_pretrained` wrote: what it must hold, read without running anything in it."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from wmtp.errors import InputError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def read_config(key: str, path: Path, *, weights: bool = True) -> PreTrainedConfig:
    """The config of a folder that has all files; `key` is where the user named it.

    Raises:
        InputError: a file is missing, or the config cannot be used. Code in the folder is never run.
    """
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).is_file():
            raise InputError(
                f"{key}={path}: has no {name}; name the folder that save_pretrained wrote model and tokenizer to"
            )
    if weights and not any((path / name).is_file() for name in WEIGHTS):
        raise InputError(
            f"{key}={path}: has no {WEIGHTS[0]}; other formats are not read: save the model as safetensors"
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{key}={path}: its config.json is not usable: {one_line(error)}") from error
    return config


def one_line(error: Exception) -> str:
    """What an error says, without line breaks."""
    return " ".join(str(error).split())
