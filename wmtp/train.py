"""Train a model: `python -m wmtp.train [group=option] [key=value] …`; `--help` lists both."""

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from wmtp.command import main
from wmtp.runtime.folder import RunStatus

if TYPE_CHECKING:  # torch takes seconds to import, and --help needs none of it
    from wmtp.trainer import Trainer


def compose_trainer(config: DictConfig, folder: Path) -> "Trainer":
    """The tree of objects that a checked config describes, built one by one."""
    from wmtp.config import build
    from wmtp.data.dataset import Dataset
    from wmtp.objectives.mtp import MtpObjective
    from wmtp.optimization import parameter_groups
    from wmtp.plan import Plan
    from wmtp.runtime.seeding import seed_torch

    hardware = build(config.hardware)
    cache_dir = Path(config.cache_dir)
    data = Dataset(build(config.data, cache_dir=cache_dir), cache_dir, config.seed)
    seed_torch(config.seed)
    model = build(config.model, vocab_size=data.tokenizer.vocab_size).to(hardware.device)
    optimizer = build(config.optimizer, params=parameter_groups(model))
    plan = build(config, Plan, num_samples=len(data.train))
    trainer: Trainer = build(
        config,
        model=model,
        objective=MtpObjective(build(config.algo)),
        data=data,
        optimizer=optimizer,
        scheduler=build(config.scheduler, optimizer=optimizer, num_updates=plan.num_updates),
        checkpoints=build(config.checkpoint, folder=folder),
        hardware=hardware,
        plan=plan,
    )
    return trainer


def train(config: DictConfig, folder: Path, status: RunStatus) -> float | None:
    """One run in its folder; returns the last validation loss."""
    from wmtp.checks import require_sound
    from wmtp.run import rehearse, run

    require_sound(config)
    trainer = compose_trainer(config, folder)
    if config.dry_run:
        rehearse(config, trainer)
        return None
    return run(config, trainer, folder, status)


if __name__ == "__main__":
    main("train", train)
