"""Train a model: `python -m wmtp.train [group=option] [key=value] …`; `--help` lists both."""

from pathlib import Path

from omegaconf import DictConfig

from wmtp.command import main
from wmtp.runtime.folder import RunStatus


def train(config: DictConfig, folder: Path, status: RunStatus) -> float | None:
    """One run in its folder; returns the last validation loss."""
    from wmtp.checks import require_sound  # these import torch, and --help needs none of it
    from wmtp.run import Run, rehearse

    require_sound(config)
    if config.dry_run:
        rehearse(config, folder)
        return None
    return Run(config, folder, status).train()


if __name__ == "__main__":
    main("train", train)
