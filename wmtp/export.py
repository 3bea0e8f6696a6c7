"""Give a trained model a form that others load: `python -m wmtp.export RUN DIR format=hf`; `--help` lists the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wmtp.cli.command import CHECKPOINT_KEY, Command, run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import Task
    from wmtp.config.schema import Fault

POSITIONS = ("checkpoint", "folder")
"""What the first arguments are that are no overrides."""
FORMATS = "format=hf, hf_trunk, medusa or meta"


def export(task: Task) -> None:
    """Write the model, and say what was written and how it is loaded."""
    from wmtp.config.schema import build
    from wmtp.distributed.device import Hardware
    from wmtp.models.export import Trained, require_form, write
    from wmtp.models.loading import compose_source, find_checkpoint, load_trained, read_config
    from wmtp.models.lora import merge
    from wmtp.training.validate import needs_values  # these import torch, and --help needs none of it

    config = task.config
    cache_dir = Path(config.cache_dir)
    checkpoint, config_path = find_checkpoint(Path(config.checkpoint.path))
    trained = read_config(config_path)
    tokenizer = build(trained.model.tokenizer, cache_dir=cache_dir)
    require_form(config.format, compose_source(trained.model, tokenizer, cache_dir).architecture())
    model = load_trained(checkpoint, tokenizer, Hardware(device="cpu"), cache_dir)
    merge(model.trunk)
    left = ["adapters are merged"] if model.lora is not None else []
    model.lora = None
    named = trained.model.tokenizer.get("path")
    has_files = named is not None and (Path(named) / "tokenizer.json").is_file()
    source = Trained(model.eval(), tokenizer, trained.data.max_length, Path(named) if has_files else None)
    written = write(source, config.format, Path(config.folder))
    left += ["the value head is not exported"] if needs_values(trained) else []
    print("\n  ".join([*written, *left]))


def faults(config: DictConfig) -> list[Fault]:
    """All faults of a config."""
    from omegaconf import OmegaConf

    from wmtp.config.schema import Fault, node_faults
    from wmtp.evaluation.validate import checkpoint_faults
    from wmtp.models.export import occupied

    found = [fault for fault in node_faults(config, "") if fault.key != "checkpoint"]
    if OmegaConf.is_missing(config, "format"):
        found = [fault for fault in found if fault.key != "format"]
        found.append(Fault("format", "", f"missing; set it with {FORMATS}"))
    if not OmegaConf.is_missing(config, "folder"):
        folder = str(config.folder)
        problem = "exports are written to a local folder" if "://" in folder else occupied(Path(folder))
        found += [Fault("folder", folder, problem)] if problem else []
    return [*found, *checkpoint_faults(config)]


def in_full(arguments: list[str]) -> list[str]:
    """The arguments with keys: the first that is no override and no option is the checkpoint, the second the folder.

    Raises:
        ConfigError: there are more.
    """
    from wmtp.config.overrides import quoted
    from wmtp.config.schema import ConfigError, Fault

    names, result = list(POSITIONS), list[str]()
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_override = "=" in argument and not Path(argument).exists()
        if is_override or argument.startswith("-") or (before.startswith("-") and before not in ("-m", "--multirun")):
            result.append(argument)
        elif names:
            result.append(f"{names[0]}={quoted(argument) if names[0] == 'checkpoint' else argument}")
            del names[0]
        else:
            problem = f"is one too many; write python -m wmtp.export RUN DIR {FORMATS}, and all else as key=value"
            raise ConfigError([Fault(argument, "", problem)])
    return result


COMMAND = Command(
    "export", export, faults, lambda config, overrides: None, in_full=in_full,
    texts=frozenset({"folder"}), short=CHECKPOINT_KEY, fetches={"checkpoint.path": "best"},
)  # fmt: skip


def main() -> NoReturn:
    """Run the command with the arguments of this process."""
    run_command(COMMAND)


if __name__ == "__main__":
    main()
