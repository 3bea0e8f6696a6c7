"""Compare the training loop with a bare loop and with Hugging Face's Trainer: `scripts/benchmark_loop.py [turns]`.

The three loops (arms) use the same micro model, batches, loss and optimizer in one process. They alternate in turns
of two updates, so that other load on the machine affects all of them equally. Ratios are computed between turns of
the same round. The first turns are a warm-up and are not counted. Needs the extra `dev`.
"""

import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import greenlet
import torch
import transformers
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainerCallback, TrainingArguments

from wmtp.algorithms.uniform import Uniform
from wmtp.checkpoint.store import CheckpointStore
from wmtp.data.collate import Batch
from wmtp.data.dataset import Dataset, read_dataset
from wmtp.data.sources import TaskSource
from wmtp.data.tokenizer import task_tokenizer
from wmtp.distributed.device import Hardware
from wmtp.models.llama import LlamaArchitecture, create_llama
from wmtp.models.mtp import MtpModel
from wmtp.objectives.mtp import MtpObjective
from wmtp.tracking.jsonl import MetricsFile
from wmtp.training.early_stopping import EarlyStopping
from wmtp.training.optim import constant, parameter_groups
from wmtp.training.plan import Plan
from wmtp.training.trainer import Trainer

UPDATES_PER_TURN, WARM_UP_TURNS, BATCH_SIZE = 2, 5, 16
OBJECTIVE = MtpObjective(Uniform())


class WithoutValidation:
    """A data set with an empty validation split, so that only the loop is measured."""

    def __init__(self, data: Dataset, turns: "Turns") -> None:
        self.data, self.turns, self.step = data, turns, 0
        self.fingerprint, self.seed, self.tokenizer = data.fingerprint, data.seed, data.tokenizer

    def micro_batches(self, *position: Any) -> list[Batch]:
        """Return the batches of the next update, after counting the previous update as done."""
        if self.step:
            self.turns.step_done("wmtp", self.step)
        self.step += 1
        return self.data.micro_batches(*position)

    def num_tokens(self, *position: int) -> int:
        """Return the number of tokens of an update."""
        return self.data.num_tokens(*position)

    def validation_batches(self, *sizes: Any) -> list[Batch]:
        """Return no batches."""
        return []


class Turns:
    """A scheduler that runs the arms in turns of `UPDATES_PER_TURN` updates, and times every turn.

    Each arm is a greenlet, because each thread would create its own pool of torch workers.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.arms: list[greenlet.greenlet] = []
        self.started = 0.0

    def add(self, name: str, arm: Callable[[], None]) -> None:
        """Add an arm; it must call `begin` before its first and `step_done` after each update."""
        self.seconds[name] = []
        self.arms.append(greenlet.greenlet(arm))

    def run(self) -> None:
        """Run all arms until they finish."""
        while self.arms:
            for arm in list(self.arms):
                arm.switch()
                if arm.dead:
                    self.arms.remove(arm)

    def begin(self) -> None:
        """Wait for the arm's next turn, and start its clock. The first call marks the end of the arm's set-up."""
        greenlet.getcurrent().parent.switch()
        self.started = time.perf_counter()

    def step_done(self, name: str, step: int) -> None:
        """Count an update; after the last of a turn, switch to the next arm."""
        if step % UPDATES_PER_TURN == 0:
            self.seconds[name].append(time.perf_counter() - self.started)
            self.begin()


class LastTurn:
    """A tracker that ends the last turn of wmtp's trainer when its last update is logged."""

    def __init__(self, turns: Turns, num_updates: int) -> None:
        self.turns, self.num_updates = turns, num_updates

    def log(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """End the last turn if `step` is the last update."""
        if step == self.num_updates:
            self.turns.step_done("wmtp", step)

    def close(self, state: str) -> None:
        """Do nothing."""


def create_model() -> tuple[MtpModel, torch.optim.Optimizer]:
    """Return a new micro model and its optimizer."""
    torch.manual_seed(0)
    model = create_llama(LlamaArchitecture(
        vocab_size=512, dim=128, num_layers=5, num_heads=4, num_attention_heads=4, num_kv_heads=2, hidden_dim=344
    ))  # fmt: skip
    return model, torch.optim.AdamW(parameter_groups(model), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def wmtp_loop(data: Dataset, batches: list[Batch], turns: Turns, folder: Path) -> None:
    """Run wmtp's trainer, which logs every tenth update to metrics.jsonl."""
    model, optimizer = create_model()
    plan = Plan(len(data.train), num_epochs=99.0, max_steps=len(batches), batch_size=BATCH_SIZE)
    trainer = Trainer(
        model,
        OBJECTIVE,
        WithoutValidation(data, turns),
        optimizer,
        constant(optimizer, len(batches)),
        CheckpointStore(folder),
        Hardware(device="cpu"),
        plan,
        EarlyStopping(),
        log_interval=10,
    )
    turns.begin()
    trainer.fit([MetricsFile(folder), LastTurn(turns, len(batches))])


def bare_loop(batches: list[Batch], turns: Turns) -> None:
    """Run only forward, backward, clipping and step, on prepared batches."""
    model, optimizer = create_model()
    turns.begin()
    for step, batch in enumerate(batches, start=1):
        loss, _ = OBJECTIVE.loss(model, *OBJECTIVE.prepare(model, [batch]))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turns.step_done("bare loop", step)


class ForHuggingFace(torch.nn.Module):
    """The model with the loss in its forward, as Hugging Face's Trainer requires."""

    def __init__(self, model: MtpModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the mean loss of a batch."""
        loss, _ = OBJECTIVE.loss(self.model, *OBJECTIVE.prepare(self.model, [batch]))
        return {"loss": loss}


def hugging_face_loop(batches: list[Batch], turns: Turns, folder: Path) -> None:
    """Run Hugging Face's Trainer on prepared batches; it logs every tenth update."""
    model, optimizer = create_model()

    class Timing(TrainerCallback):
        def on_train_begin(self, arguments: Any, state: Any, control: Any, **options: Any) -> None:
            turns.begin()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **options: Any) -> None:
            turns.step_done("Hugging Face Trainer", state.global_step)

    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=1, max_steps=len(batches), logging_steps=10,
        max_grad_norm=1.0, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, log_level="error", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = HuggingFaceTrainer(
        model=ForHuggingFace(model), args=arguments, train_dataset=[{"batch": batch} for batch in batches],
        data_collator=lambda samples: samples[0], optimizers=(optimizer, constant(optimizer, len(batches))),
        callbacks=[Timing()],
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(batches)
    trainer.train()


def main(num_turns: int) -> None:
    """Print the median speed of each arm, and its ratio to the bare loop within each round of turns."""
    logging.disable(logging.WARNING)
    num_updates = num_turns * UPDATES_PER_TURN
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        difficulties = {1: 0.2, 2: 0.4, 3: 0.25, 4: 0.15}
        source = TaskSource(
            tokenizer=task_tokenizer(folder), num_train=num_updates * BATCH_SIZE, difficulties=difficulties,
            correct_ratio=1.0,
        )  # fmt: skip
        data = read_dataset(source, folder, seed=0)
        batches = [data.micro_batches(0, update, BATCH_SIZE, BATCH_SIZE)[0] for update in range(num_updates)]
        turns = Turns()
        turns.add("bare loop", lambda: bare_loop(batches, turns))
        turns.add("wmtp", lambda: wmtp_loop(data, batches, turns, folder))
        turns.add("Hugging Face Trainer", lambda: hugging_face_loop(batches, turns, folder))
        turns.run()
    counts = [batch.num_tokens for batch in batches]
    tokens = [sum(counts[i : i + UPDATES_PER_TURN]) for i in range(0, num_updates, UPDATES_PER_TURN)]
    bare = turns.seconds["bare loop"][WARM_UP_TURNS:]
    for arm, seconds in turns.seconds.items():
        measured = seconds[WARM_UP_TURNS:]
        speed = statistics.median(n / s for n, s in zip(tokens[WARM_UP_TURNS:], measured, strict=True))
        first, middle, third = statistics.quantiles([b / s for b, s in zip(bare, measured, strict=True)], n=4)
        print(
            f"{arm:20} {speed:8,.0f} tokens/s; ratio to the bare loop: "
            f"median {middle:.3f} of {len(measured)} turns (quartiles {first:.3f} {third:.3f})"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 155)
