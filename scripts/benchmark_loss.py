"""Compare memory and time of the chunked weighted loss with all logits at once: `scripts/benchmark_loss.py`.

`scripts/benchmark_loss.py chunks` measures instead how the time depends on the chunk size.

Every implementation (arm) computes the losses of the same states, weights them, and runs backward to the states and the
unembedding.

Memory: each case runs in its own process. The figure is the peak of the resident set minus the resident set after the
inputs and their gradient buffers were allocated and written. For `first`, the buffers are then freed, as `zero_grad`
does before the first micro-batch of an update. For `later`, they stay, so that backward adds to them and each arm
needs an additional gradient.

Time: the arms alternate in one process. The figure is the CPU time of one thread, because other processes disturb it
least. Ratios are those of the fastest rounds.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from wmtp.data.collate import IGNORED
from wmtp.ops.cross_entropy import Chunk, RowFunction, cross_entropy, weighted_cross_entropy

NUM_HEADS, NUM_POSITIONS, DIM, VOCAB_SIZE = 4, 1024, 512, 32_000
NUM_TURNS = 5
TORCH_CHUNK_ROWS = 256
"""Chunk size for torch's `linear_cross_entropy`, whose default of a few rows is far slower."""
MEMORY_LIMIT, TIME_LIMIT, WEIGHTING_LIMIT, SKIP_LIMIT = 1 / 20, 1.0, 1.05, 1.1
Arm = Callable[[], None]


class Inputs:
    """States, an unembedding, targets and weights."""

    def __init__(
        self,
        num_positions: int = NUM_POSITIONS,
        num_heads: int = NUM_HEADS,
        dim: int = DIM,
        vocab_size: int = VOCAB_SIZE,
    ) -> None:
        torch.manual_seed(0)
        self.states = torch.randn(num_heads, 1, num_positions, dim).requires_grad_()
        self.unembedding = torch.randn(vocab_size, dim).mul_(dim**-0.5).requires_grad_()
        self.targets = torch.randint(vocab_size, (num_heads, 1, num_positions))
        self.weights = torch.rand(self.targets.shape)

    def ours(self, coefficients: RowFunction, targets: Tensor | None = None, rows: int | None = None) -> None:
        """Compute the chunked loss of wmtp, and run backward."""
        targets = self.targets if targets is None else targets
        loss, _, _ = weighted_cross_entropy(self.states, self.unembedding, targets, coefficients, rows)
        loss.backward()

    def known(self, chunk: Chunk) -> Tensor:
        """Return the fixed weights, which do not depend on the losses."""
        return self.weights.flatten()[chunk.rows]

    def stacked(self) -> None:
        """Compute the loss from all logits at once, and run backward."""
        logits = self.states.flatten(0, 2) @ self.unembedding.T
        losses = F.cross_entropy(logits, self.targets.flatten(), reduction="none")
        del logits  # a caller that keeps them needs one more buffer
        (losses * self.weights.flatten()).sum().backward()

    def native(self) -> None:
        """Compute torch's chunked loss without reduction, weight it, and run backward."""
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=TORCH_CHUNK_ROWS, chunking_method=None)
        losses = F.linear_cross_entropy(
            self.states.flatten(0, 2), self.unembedding, self.targets.flatten(), reduction="none", options=options
        )
        (losses * self.weights.flatten()).sum().backward()

    def skipping(self, keep_fraction: float) -> None:
        """Compute the losses of all rows, then train on the fraction with the largest losses."""
        losses = cross_entropy(self.states, self.unembedding, self.targets)
        kept = losses.flatten().topk(round(keep_fraction * losses.numel())).indices
        targets = torch.full_like(self.targets, IGNORED).flatten()
        targets[kept] = self.targets.flatten()[kept]
        self.ours(self.known, targets.view(self.targets.shape))

    def arms(self) -> dict[str, Arm]:
        """Return all arms by name."""
        arms: dict[str, Arm] = {"stacked": self.stacked}
        if hasattr(F, "linear_cross_entropy"):
            arms["linear_cross_entropy"] = self.native
        return arms | {
            "weighted": lambda: self.ours(self.known),
            "elementwise": lambda: self.ours(lambda chunk: chunk.losses.neg().exp().clamp(0.1, 5.0)),
            "unweighted": lambda: self.ours(lambda chunk: torch.ones_like(chunk.losses)),
            "token skip 0.6": lambda: self.skipping(0.6),
            "token skip 0.3": lambda: self.skipping(0.3),
        }

    def drop_gradients(self) -> None:
        """Drop gradients, as `zero_grad` does."""
        self.states.grad = self.unembedding.grad = None


def resident(field: str) -> float:
    """Return the resident set of this process in MB: `field` is VmRSS (now) or VmHWM (peak)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def measure_memory(arm: str, is_first: bool) -> float:
    """Return the peak memory of one forward and backward in MB, without inputs and gradient buffers."""
    Inputs(num_positions=2).arms()[arm]()  # excludes what is loaded or allocated only once
    inputs = Inputs()
    inputs.states.grad = torch.ones_like(inputs.states)
    inputs.unembedding.grad = torch.ones_like(inputs.unembedding)
    Path("/proc/self/clear_refs").write_text("5")
    baseline = resident("VmRSS")
    if is_first:
        inputs.drop_gradients()
    inputs.arms()[arm]()
    return resident("VmHWM") - baseline


def measure_time() -> dict[str, list[float]]:
    """Return the CPU seconds of each round, for every arm and for one matrix product of the size of a head."""
    torch.set_num_threads(1)
    small = Inputs(num_positions=8)
    gradients = {}
    for name, arm in small.arms().items():
        arm()
        gradients[name] = small.unembedding.grad
        small.drop_gradients()
    for name in {"linear_cross_entropy", "weighted"} & gradients.keys():
        torch.testing.assert_close(gradients[name], gradients["stacked"])

    inputs = Inputs()
    states, unembedding = inputs.states.detach()[0, 0], inputs.unembedding.detach()
    product = states @ unembedding.T
    arms = inputs.arms() | {"product": lambda: torch.mm(states, unembedding.T, out=product)}
    return turns(arms, inputs)


def turns(arms: dict[str, Arm], inputs: Inputs) -> dict[str, list[float]]:
    """Return the CPU seconds of each round, for every arm."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(NUM_TURNS):
        for name, arm in arms.items():
            inputs.drop_gradients()
            started = time.process_time()
            arm()
            seconds[name].append(time.process_time() - started)
    return seconds


def own_process(*arguments: str, **environment: str) -> str:
    """Run this script with other arguments in a new process, and return its output."""
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | environment
    ).stdout  # fmt: skip


def verdict(text: str, value: float, limit: float) -> None:
    """Print one line of the table of limits."""
    print(f"{text:66} {value:7.3f}  limit {limit:.3f}  {'reached' if value <= limit else 'NOT REACHED'}")


def main() -> None:
    """Print the tables of memory and time, and which limits are met."""
    print(
        f"{NUM_HEADS} heads × {NUM_POSITIONS} positions, dim {DIM}, vocabulary {VOCAB_SIZE}, fp32, "
        f"time of one thread, torch {torch.__version__}"
    )
    if not hasattr(F, "linear_cross_entropy"):
        print("linear_cross_entropy is skipped: this version of torch does not have it")
    # without the low threshold, glibc keeps freed buffers, and allocations that reuse them do not raise the peak
    memory = {
        (name, turn): float(own_process("memory", name, turn, MALLOC_MMAP_THRESHOLD_="65536"))
        for name in Inputs(num_positions=2).arms()
        for turn in (("first", "later") if name in ("stacked", "weighted") else ("first",))
    }
    seconds: dict[str, list[float]] = json.loads(own_process("time"))
    fastest = {name: min(values) for name, values in seconds.items()}

    print(f"\n{'':22} {'MB first':>9} {'MB later':>9} {'seconds':>9} {'of stacked':>11} {'median':>7}")
    for name in fastest:
        if name == "product":
            continue
        later = f"{memory[name, 'later']:.1f}" if (name, "later") in memory else ""
        print(
            f"{name:22} {memory[name, 'first']:9.1f} {later:>9} {fastest[name]:9.3f} "
            f"{fastest[name] / fastest['stacked']:11.3f} {statistics.median(seconds[name]):7.3f}"
        )
    operations = 2 * NUM_POSITIONS * DIM * VOCAB_SIZE
    ideal = 3 * NUM_HEADS * fastest["product"]
    print(
        f"one product of {NUM_POSITIONS} rows: {operations / fastest['product'] / 1e9:.0f} GFLOP/s; the loss needs "
        f"three for each head: {ideal:.3f} s, {ideal / fastest['weighted']:.2f} of the time of `weighted`\n"
    )

    for turn in ("first", "later"):
        verdict(
            f"memory, {turn} micro-batch: weighted / stacked",
            memory["weighted", turn] / memory["stacked", turn],
            MEMORY_LIMIT,
        )
    verdict("time: weighted / stacked", fastest["weighted"] / fastest["stacked"], TIME_LIMIT)
    for name in ("weighted", "elementwise"):
        verdict(f"time: {name} / unweighted sum", fastest[name] / fastest["unweighted"], WEIGHTING_LIMIT)
    for keep_fraction in (0.6, 0.3):
        expected = (1 + 3 * keep_fraction) / 3
        ratio = fastest[f"token skip {keep_fraction}"] / fastest["weighted"]
        verdict(f"time: token skip {keep_fraction} / weighted, over (1 + 3k) / 3", ratio / expected, SKIP_LIMIT)
    if "linear_cross_entropy" in fastest:
        verdict("time: weighted / linear_cross_entropy", fastest["weighted"] / fastest["linear_cross_entropy"], 1.0)


def chunk_sizes() -> None:
    """Print the time for each chunk size, for a large and a small vocabulary."""
    torch.set_num_threads(1)
    for dim, vocab_size in ((DIM, VOCAB_SIZE), (128, 512)):
        inputs = Inputs(1250 if vocab_size == 512 else 512, dim=dim, vocab_size=vocab_size)
        rows = inputs.targets.numel()
        sizes = [size for size in (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192) if size < 2 * rows]

        def arm(size: int, inputs: Inputs = inputs) -> Arm:
            return lambda: inputs.ours(inputs.known, rows=size)

        seconds = turns({str(size): arm(size) for size in sizes}, inputs)
        print(f"{rows} rows, dim {dim}, vocabulary {vocab_size}")
        for size in sizes:
            print(f"  {size:5} rows, {size * vocab_size * 4 / 2**20:6.1f} MiB: {min(seconds[str(size)]):.4f} s")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["memory", name, turn]:
            print(measure_memory(name, turn == "first"))
        case ["time"]:
            print(json.dumps(measure_time()))
        case ["chunks"]:
            chunk_sizes()
        case _:
            main()
