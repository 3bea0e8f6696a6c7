"""Measure the time of an update with each algorithm: `scripts/benchmark_algorithms.py [ROUNDS [FILE]]`.

One process trains the micro model on the generated tasks. In each round, the trainer makes one update of the same
batch with every algorithm; the order of the algorithms rotates from round to round. Each time is divided by the
baseline's time in the same round. Reference losses are read from disk, as in every run after the first. FILE is a CSV
file for the ratios. The table of docs/weightings.md has those of docs/weightings_time.csv.
"""

import csv
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from estimate_scaling import table

from wmtp.algorithms.base import Algorithm
from wmtp.algorithms.cleaning import Cleaning
from wmtp.algorithms.contrast import Contrast
from wmtp.algorithms.controls import Control, Random, Shuffled
from wmtp.algorithms.critic import Critic
from wmtp.algorithms.dft import Dft
from wmtp.algorithms.entropy import Entropy
from wmtp.algorithms.excess_loss import ExcessLoss, TokenSkip
from wmtp.algorithms.focal import Focal
from wmtp.algorithms.history import History
from wmtp.algorithms.implicit_reward import ImplicitReward
from wmtp.algorithms.prior import Prior
from wmtp.algorithms.reward import Reward
from wmtp.algorithms.surprisal import Surprisal
from wmtp.algorithms.uniform import Uniform
from wmtp.checkpoint.store import CheckpointStore
from wmtp.data.dataset import Dataset, read_dataset
from wmtp.data.sources import TaskSource
from wmtp.data.tokenizer import task_tokenizer
from wmtp.distributed.device import Hardware
from wmtp.distributed.process_group import Processes
from wmtp.models.llama import LlamaArchitecture, create_llama
from wmtp.objectives.loss_history import LossHistory
from wmtp.objectives.mtp import MtpObjective
from wmtp.training.early_stopping import EarlyStopping
from wmtp.training.optim import constant, parameter_groups
from wmtp.training.plan import Plan
from wmtp.training.trainer import Trainer

BATCH_SIZE, WARM_UP_ROUNDS = 16, 5
TIMES = Path(__file__).resolve().parents[1] / "docs" / "weightings_time.csv"
ALGORITHMS: dict[str, tuple[Algorithm, float | None]] = {
    "baseline": (Uniform(), None),
    "critic": (Critic(value="action", trace_decay=0.0, last_token="value"), 1.10),
    "critic_state": (Critic(), 1.10),
    "rho1": (ExcessLoss(), 1.03),
    "rho1_token_skip": (TokenSkip(), None),
    "contrast": (Contrast(), 1.03),
    "surprisal": (Surprisal(), 1.03),
    "implicit_reward": (ImplicitReward(), 1.03),
    "cleaning": (Cleaning(), 1.03),
    "prior": (Prior(), 1.03),
    "reward": (Reward(), 1.03),
    "dft": (Dft(), 1.03),
    "focal": (Focal(), 1.03),
    "entropy": (Entropy(), 1.03),
    "history": (History(), 1.03),
    "shuffled critic": (Shuffled(of=Critic()), None),
    "random critic": (Random(of=Critic()), None),
    "shuffled rho1": (Shuffled(of=ExcessLoss()), None),
}
"""Each algorithm, and the limit for the time of its update relative to the baseline's; None: no limit."""


def trainer_of(algorithm: Algorithm, data: Dataset, num_updates: int, folder: Path) -> Trainer:
    """Return a trainer of the micro model."""
    torch.manual_seed(0)
    model = create_llama(LlamaArchitecture(
        vocab_size=512, dim=128, num_layers=5, num_heads=4, num_attention_heads=4, num_kv_heads=2, hidden_dim=344
    ))  # fmt: skip
    if algorithm.needs_values:
        model.add_value_head(algorithm.value)
    algorithm.prepare(data.train)
    history = LossHistory(data.train, Processes.single_process()) if algorithm.needs_previous_losses else None
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    return Trainer(
        model,
        MtpObjective(algorithm, history=history),
        data,
        optimizer,
        constant(optimizer, num_updates),
        CheckpointStore(folder),
        Hardware(device="cpu"),
        Plan(len(data.train), max_steps=num_updates, batch_size=BATCH_SIZE),
        EarlyStopping(),
    )


def with_losses(data: Dataset, losses: np.ndarray, algorithm: Algorithm) -> Dataset:
    """Return the data with the reference losses that the algorithm needs, if it needs any."""
    if not algorithm.references:
        return data
    columns = losses[:, : len(algorithm.references)]
    return replace(data, train=data.train.with_columns(reference_losses=columns))


def tables() -> list[str]:
    """Return the table of what each weighting costs, with the measured times of updates."""
    with TIMES.open() as file:
        times = {row["algo"]: row for row in csv.DictReader(file)}
    rows = []
    for name, time_of in times.items():
        algorithm, _ = ALGORITHMS[name]
        stored = "4 bytes for each token and head" if algorithm.needs_previous_losses else "–"
        if algorithm.references:
            stored = f"{4 * len(algorithm.references)} bytes for each token"
        added = {"state": "dim", "action": "dim × vocabulary", "block": "a block"}[algorithm.value]
        forward = {"none": "–", "trunk": "of the trunk", "heads": "of trunk and heads"}[algorithm.additional_pass]
        ratio = f"{float(time_of['median']):.2f} ({float(time_of['first']):.2f} to {float(time_of['third']):.2f})"
        head = added if algorithm.needs_values else "–"
        rows.append([name, len(algorithm.references) or "–", stored, head, forward, ratio])
    header = ["`algo=`", "references", "stored losses", "parameters of the value head", "additional forward pass",
              "time of an update"]  # fmt: skip
    return [table(header, rows)]


def write_times(path: Path, found: dict[str, tuple[float, float, float]]) -> None:
    """Write the quartiles of the ratios of each weighting, except controls and the baseline, to a CSV file."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["algo", "first", "median", "third"])
        for name, quartiles in found.items():
            if not isinstance(ALGORITHMS[name][0], Control | Uniform):
                writer.writerow([name, *(f"{ratio:.3f}" for ratio in quartiles)])


def main(num_rounds: int, path: Path | None = None) -> None:
    """Print each algorithm's time per update, its ratio to the baseline, and whether the ratio is within the limit."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = TaskSource(
            tokenizer=task_tokenizer(folder), num_train=num_rounds * BATCH_SIZE // 4,  # two epochs
            difficulties={1: 0.2, 2: 0.4, 3: 0.25, 4: 0.15}, correct_ratio=0.5, noise=0.5,
        )  # fmt: skip
        data = read_dataset(source, folder, seed=0)
        stored = folder / "reference.npy"
        drawn = np.random.default_rng(0).exponential(size=(len(data.train.samples.tokens), 2))
        np.save(stored, drawn.astype(np.float32))
        losses = np.load(stored, mmap_mode="r")
        trainers = {
            name: trainer_of(algorithm, with_losses(data, losses, algorithm), num_rounds, folder / name)
            for name, (algorithm, _) in ALGORITHMS.items()
        }
        seconds: dict[str, list[float]] = {name: [] for name in trainers}
        for round_ in range(num_rounds):
            names = list(trainers)
            for name in names[round_ % len(names) :] + names[: round_ % len(names)]:
                started = time.perf_counter()
                trainers[name].train_update()
                seconds[name].append(time.perf_counter() - started)
    baseline, found = seconds["baseline"][WARM_UP_ROUNDS:], {}
    for name, (_, limit) in ALGORITHMS.items():
        measured = seconds[name][WARM_UP_ROUNDS:]
        ratios = [one / base for one, base in zip(measured, baseline, strict=True)]
        first, middle, third = statistics.quantiles(ratios, n=4)
        found[name] = (first, middle, third)
        verdict = "" if limit is None else f"  limit {limit:.2f}: {'reached' if middle <= limit else 'NOT REACHED'}"
        print(
            f"{name:16} {statistics.median(measured):.3f} s an update; relative to the baseline: "
            f"median {middle:.3f} of {len(ratios)} rounds (quartiles {first:.3f} {third:.3f}){verdict}"
        )
    if path is not None:
        write_times(path, found)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60, *map(Path, sys.argv[2:3]))
