"""Export a trained model to a format of other libraries: `python -m wmtp.export RUN DIR format=hf`; see `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from wmtp.cli.command import CHECKPOINT_KEY, Command, run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from wmtp.cli.job import JobContext
    from wmtp.config.schema import CheckedConfig

POSITIONAL_KEYS = ("checkpoint", "folder")
"""Config keys that are set by the positional arguments, in this order."""
FORMATS = "format=hf, hf_trunk, medusa or meta"


def export(context: JobContext) -> None:
    """Export a trained model, and print what was exported and how to load it."""
    from wmtp.distributed.device import Hardware
    from wmtp.models.export import TrainedModel, check_format, write_export
    from wmtp.models.loading import TrainedCheckpoint, build_source
    from wmtp.models.lora import merge_adapters
    from wmtp.training.validate import needs_values  # these import torch, which --help does not need

    config = context.config
    cache_dir = Path(config.cache_dir)
    checkpoint: TrainedCheckpoint = context.inputs
    trained, tokenizer = checkpoint.config, checkpoint.tokenizer(cache_dir)
    check_format(config.format, build_source(trained.model, tokenizer, cache_dir).architecture())
    model = checkpoint.load_model(tokenizer, Hardware(device="cpu"), cache_dir)
    merge_adapters(model.trunk)
    notes = ["adapters are merged"] if model.lora is not None else []
    model.lora = None
    named = trained.model.tokenizer.get("path")
    has_files = named is not None and (Path(named) / "tokenizer.json").is_file()
    source = TrainedModel(model.eval(), tokenizer, trained.data.max_length, Path(named) if has_files else None)
    written = write_export(source, config.format, Path(config.folder))
    notes += ["the value head is not exported"] if needs_values(trained) else []
    print("\n  ".join([*written, *notes]))


def check(config: DictConfig, overrides: list[str]) -> CheckedConfig:
    """Check a config, and find and verify its checkpoint."""
    from omegaconf import OmegaConf

    from wmtp.config.overrides import typed_values
    from wmtp.config.schema import CheckedConfig, ConfigIssue, node_issues
    from wmtp.evaluation.validate import read_checkpoint
    from wmtp.models.export import folder_issue
    from wmtp.runtime.writable import write_problem

    issues = [i for i in node_issues(config, "", typed=typed_values(overrides)) if i.key != "checkpoint"]
    if OmegaConf.is_missing(config, "format"):
        issues = [issue for issue in issues if issue.key != "format"]
        issues.append(ConfigIssue("format", "", f"missing; set it with {FORMATS}"))
    if not OmegaConf.is_missing(config, "folder"):
        folder = str(config.folder)
        local_problem = folder_issue(Path(folder)) or write_problem(Path(folder).parent)
        problem = "exports are written to a local folder" if "://" in folder else local_problem
        issues += [ConfigIssue("folder", folder, problem)] if problem else []
    checkpoint, checkpoint_issues = read_checkpoint(config)
    return CheckedConfig(config, [*issues, *checkpoint_issues], checkpoint)


def positional_args(arguments: list[str]) -> list[str]:
    """Return the arguments with the positional arguments converted to `key=value`.

    The first positional argument gets the key `checkpoint`, and the second one gets the key `folder`.

    Raises:
        ConfigError: there are more than two positional arguments.
    """
    from wmtp.config.overrides import is_override, quote
    from wmtp.config.schema import ConfigError, ConfigIssue

    names, result = list(POSITIONAL_KEYS), list[str]()
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_value = before.startswith("-") and before not in ("-m", "--multirun")
        if is_override(argument) or argument.startswith("-") or is_value:
            result.append(argument)
        elif names:
            result.append(f"{names[0]}={quote(argument) if names[0] == 'checkpoint' else argument}")
            del names[0]
        else:
            problem = f"is one too many; write python -m wmtp.export RUN DIR {FORMATS}, and other settings as key=value"
            raise ConfigError([ConfigIssue(argument, "", problem)])
    return result


COMMAND = Command(
    "export", export, check, positional_args=positional_args,
    raw_keys=frozenset({"folder"}), aliases=CHECKPOINT_KEY, remote_keys={"checkpoint.path": "best"},
)  # fmt: skip


def main() -> NoReturn:
    """Run `python -m wmtp.export` with the command-line arguments of this process."""
    run_command(COMMAND)


if __name__ == "__main__":
    main()
