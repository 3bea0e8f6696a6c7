"""Measure the cost of training a pretrained model: seconds and memory of an update, with and without the chunked loss.

    python scripts/benchmark_pretrained.py model=smollm2 data=mbpp data.path=DIR
    python scripts/benchmark_pretrained.py --cases baseline,lora --updates 5 model=huggingface model.path=DIR

Each case runs in its own process, so that its peak memory is measured separately. Overrides are those of `wmtp.train`.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")

import hydra
import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from wmtp.config.overrides import to_hydra_override
from wmtp.config.schema import CONFIG_FOLDER
from wmtp.data.collate import IGNORED
from wmtp.objectives import mtp
from wmtp.ops.cross_entropy import RowFunction
from wmtp.training.builders import build_components, build_objective, build_policy, build_trainer
from wmtp.training.references import reference_models

CASES = {
    "baseline": [],
    "all logits at once": [],
    "critic": ["algo=critic"],
    "rho1": ["algo=rho1", "algo.reference=initial"],
    "token skip": ["algo=rho1_token_skip", "algo.reference=initial"],
    "lora": ["model.lora.rank=16"],
    "medusa": ["model.head_kind=medusa"],
    "recompute": ["hardware.activation_checkpointing=true"],
}
ALL_AT_ONCE = "all logits at once"


def plain_cross_entropy(states: Tensor, unembedding: Tensor, targets: Tensor) -> Tensor:
    """Compute the losses from the logits of all heads at once."""
    logits = (states @ unembedding.T).float()
    return F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none", ignore_index=IGNORED)


def weighted(
    states: Tensor, unembedding: Tensor, targets: Tensor, coefficients: RowFunction, chunk_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the same result as `weighted_cross_entropy`, without chunks."""
    losses = plain_cross_entropy(states, unembedding, targets)
    rows = (targets != IGNORED).flatten().nonzero().squeeze(1)
    used = torch.zeros_like(losses).index_copy(
        0, rows, coefficients(SimpleNamespace(losses=losses.detach()[rows], rows=rows))
    )
    return (losses * used).sum(), losses.detach().view(targets.shape), used.view(targets.shape)


def composed(overrides: list[str]) -> DictConfig:
    """Return train.yaml composed with overrides."""
    with hydra.initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return hydra.compose("train", [to_hydra_override(override) for override in overrides])


def measure(case: str, overrides: list[str], updates: int) -> dict[str, object]:
    """Return the measurements of a case: seconds per update, tokens per second, peak memory, first and last losses."""
    if case == ALL_AT_ONCE:
        mtp.weighted_cross_entropy = weighted  # type: ignore[assignment]
    config = composed([*overrides, *CASES[case], "early_stopping=none"])
    started = time.perf_counter()
    components = build_components(config)
    data = components.data
    if components.algorithm.needs_reference:
        # reference losses are computed once, not in each update; constants replace them here
        for _, reference in reference_models(config, components, None):
            del reference
        shapes = [(len(split.samples.tokens), 1) for split in data.splits]
        data = data.with_columns(reference_losses=[np.ones(shape, np.float32) for shape in shapes])
    model = build_policy(config, components, None)
    loaded = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        objective = build_objective(config, components, data)
        trainer = build_trainer(config, Path(folder), components.hardware, data, model, objective)
        seconds, tokens, losses = [], [], []
        for _ in range(updates + 1):  # the first one is a warm-up
            before, started = trainer.position.tokens, time.perf_counter()
            metrics = trainer.train_update()
            seconds.append(time.perf_counter() - started)
            tokens.append(trainer.position.tokens - before)
            losses.append([metrics["train/loss"], metrics["train/head_1_loss"]])
    on_gpu = components.hardware.device.type == "cuda"
    return {
        "case": case,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "parameters": model.num_parameters,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "load": loaded,
        "seconds": statistics.median(seconds[1:]),
        "tokens": sum(tokens[1:]) / sum(seconds[1:]),
        "peak": components.hardware.peak_memory()
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "first": losses[0],
        "last": losses[-1],
    }


def main() -> None:
    """Print a table of all cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases",
        default=f"baseline,{ALL_AT_ONCE},critic,rho1",
        help=f"comma-separated list of cases: {', '.join(CASES)}",
    )
    parser.add_argument("--updates", type=int, default=3, help="number of measured updates per case")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help="overrides of wmtp.train")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.overrides, arguments.updates)))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {arguments.updates} updates")
    print(f"{'':20}{'million':>9}{'trained':>9}{'load s':>8}{'update s':>10}{'tokens/s':>10}{'peak GB':>9}  losses")
    for case in arguments.cases.split(","):
        command = [sys.executable, __file__, "--one", case, "--updates", str(arguments.updates), *arguments.overrides]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{case:20}failed with {done.returncode}", flush=True)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        (first, first_head), (last, last_head) = row["first"], row["last"]
        print(
            f"{case:20}{row['parameters'] / 1e6:>9.1f}{row['trained'] / 1e6:>9.1f}{row['load']:>8.1f}"
            f"{row['seconds']:>10.3f}{row['tokens']:>10,.0f}{row['peak'] / 1e9:>9.2f}  "
            f"{first:.3f} → {last:.3f}, head 1 {first_head:.3f} → {last_head:.3f} ({row['device']})",
            flush=True,
        )


if __name__ == "__main__":
    main()
