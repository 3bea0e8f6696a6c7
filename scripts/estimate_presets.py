"""Print the tables of docs/presets.md: memory and time of every preset in conf/experiment, calculated, not measured.

Models are built from the configs on the meta device; pretrained models have the published sizes.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hydra
from estimate_scaling import YES, fits, table
from omegaconf import DictConfig

from wmtp.config.overrides import to_hydra_override
from wmtp.config.schema import CONFIG_FOLDER, build, stage_config
from wmtp.models.shapes import ModelShape
from wmtp.training.absent_hardware import planned_shape
from wmtp.training.dry_run import format_duration
from wmtp.training.estimate.memory import GB, ParallelSetting, all_logits_bytes, memory
from wmtp.training.estimate.speed import Cluster, speed
from wmtp.training.plan import Plan
from wmtp.training.stages import Stage

META_7B = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "vocab_size": 32000, "norm_eps": 1e-5,
    "rope_theta": 10000.0, "n_future_tokens": 4,
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PUBLISHED = {"MetaCheckpoint": ("params.json", META_7B), "SmolLM2": ("config.json", SMOLLM2)}
"""File name and content that replace the folder of a pretrained model, by the class of the model source."""
MBPP = 374
"""Number of training problems of MBPP."""
NOMINAL = {"cuda": 80, "cpu": 16, "mps": 16}
"""Nominal memory in GB: an A100 for cuda, a laptop for cpu and mps."""
PARTS = ("parameters", "gradients", "optimizer", "activations", "loss", "work", "total")


@dataclass(frozen=True)
class Training:
    """The inputs of the estimate for one stage of a preset."""

    name: str
    shape: ModelShape
    machine: Cluster
    setting: ParallelSetting
    num_samples: int
    num_updates: int


def presets() -> list[str]:
    """Return the names of the presets, without `base` files and sweeps."""
    folder = CONFIG_FOLDER / "experiment"
    found = [path.relative_to(folder).with_suffix("") for path in folder.glob("**/*.yaml") if path.stem != "base"]
    return sorted(str(name) for name in found if name.parts[0] != "sweep")


def composed(preset: str, folder: Path) -> DictConfig:
    """Return the config of a preset. A pretrained model is replaced by its config file in `folder`/`preset`."""
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = hydra.compose("train", [to_hydra_override(f"experiment={preset}")])
    file, content = PUBLISHED.get(config.model["_target_"].rpartition(".")[2], (None, None))
    if file is not None:
        place = folder / preset
        place.mkdir(parents=True)
        (place / file).write_text(json.dumps(content))
        (place / "tokenizer.json").touch()
        config.model.path = str(place)
    return config


def shape(config: DictConfig, folder: Path, stage: Stage | None) -> ModelShape:
    """Return the shape of a stage's model, with its trained parameters; `folder` is the cache of tokenizers."""
    is_new = "path" not in config.model  # a new model, whose vocabulary size is that of its tokenizer
    tokenizer = build(config.model.tokenizer, cache_dir=folder) if is_new else None
    return planned_shape(config, tokenizer, stage or build(config.algo))


def training(name: str, config: DictConfig, folder: Path, stage: Stage | None = None) -> Training:
    """Return the estimate's inputs for one stage of a config; `stage` is None for stage 2."""
    hardware, data = config.hardware, config.data
    num_samples = data.n_samples or data.get("num_train") or MBPP
    device = "cpu" if hardware.device == "auto" else hardware.device
    plan = build(config, Plan, num_samples=num_samples, num_processes=hardware.num_processes)
    setting = ParallelSetting(
        hardware.strategy if hardware.num_processes > 1 else "single", hardware.activation_checkpointing,
        hardware.reduce_each_micro_batch, plan.micro_batch_size, hardware.precision,
        scales_heads_in_one_pass=stage is None and build(config.algo).scales_heads_in_one_pass,
        additional_pass="none" if stage else build(config.algo).additional_pass,
    )  # fmt: skip
    machine = Cluster(hardware.num_processes, data.max_length, plan.batch_size, device, NOMINAL[device])
    return Training(name, shape(config, folder, stage), machine, setting, num_samples, plan.num_updates)


def trainings() -> Iterator[Training]:
    """Yield the inputs for every stage of every preset."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for preset in presets():
            config = composed(preset, folder)
            if config.pretrain is not None:
                stage: Stage = build(config.pretrain)
                yield training(f"{preset}, stage 1", stage_config(config), folder, stage)
            yield training(preset, config, folder)


def in_millions(number: int) -> str:
    """Format a number of parameters."""
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"


def memory_row(each: Training) -> list[object]:
    """Return a row of the table of memory, in GB of one process."""
    found, counts = memory(each.shape, each.machine, each.setting), each.shape.counted
    sizes = [f"{found[part] / GB:.2f}" for part in PARTS]
    tokens = each.setting.micro_batch_size * each.machine.sequence
    at_once = "–" if each.shape.trains_values_only else f"{all_logits_bytes(each.shape, tokens) / GB:.2f}"
    room = f"{YES[fits(each.shape, each.machine, each.setting)]}, {each.machine.memory} GB"
    return [
        each.name, in_millions(counts.parameters), in_millions(counts.trained),
        f"{each.setting.micro_batch_size} × {each.machine.sequence}", *sizes, room, at_once,
    ]  # fmt: skip


def time_row(each: Training) -> list[object]:
    """Return a row of the table of time; every sample is assumed to have the maximum length."""
    samples = [each.name, f"{each.num_samples:,}", each.machine.sequence, each.num_updates]
    if each.machine.device != "cuda":
        return [*samples, "dry run", "dry run", "dry run"]
    found, tokens = speed(each.shape, each.machine, each.setting), each.machine.batch_size * each.machine.sequence
    seconds = [tokens / found.fast, tokens / found.slow]
    # if only the value head trains, the trunk processes the data once, and later epochs read its cached states
    updates = each.num_samples / each.machine.batch_size if each.shape.trains_values_only else each.num_updates
    least, most = (format_duration(updates * second) for second in seconds)
    return [
        *samples, f"{seconds[0]:.1f} – {seconds[1]:.1f}", f"{found.slow:,.0f} – {found.fast:,.0f}", f"{least} – {most}"
    ]  # fmt: skip


def tables() -> list[str]:
    """Return the tables of memory and of time."""
    found = list(trainings())
    figures = ["preset", "model parameters", "trained", "samples × tokens", *PARTS, "fits", "all logits"]
    planned = ["preset", "samples", "max tokens", "updates", "s per update", "tokens/s", "total time"]
    return [table(figures, [memory_row(each) for each in found]), table(planned, [time_row(each) for each in found])]


if __name__ == "__main__":
    print("\n\n".join(tables()))
