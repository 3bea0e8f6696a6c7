"""Sums that batches, micro-batches and ranks add to; the division comes last, once."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wmtp.distributed.process_group import Processes


@dataclass
class Sums:
    """Named means as pairs (sum, count), and named extremes. Tensors stay where they were computed."""

    means: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    minima: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: "Sums") -> None:
        """Take in what another batch summed."""
        for name, (total, count) in other.means.items():
            old_total, old_count = self.means.get(name, (0.0, 0.0))
            self.means[name] = (old_total + total, old_count + count)
        for name, value in other.minima.items():
            self.minima[name] = torch.minimum(self.minima.get(name, value), value)
        for name, value in other.maxima.items():
            self.maxima[name] = torch.maximum(self.maxima.get(name, value), value)

    def reduced(self, processes: Processes) -> "Sums":
        """What all processes summed; the same bits in each."""
        if processes.size == 1:
            return self
        total = processes.sum(self.row())
        reduced = Sums(dict(zip(self.means, total.view(-1, 2).unbind(), strict=True)))  # type: ignore[arg-type]
        if extremes := [*(-x for x in self.minima.values()), *self.maxima.values()]:
            found = torch.tensor(processes.largest(*torch.stack(extremes).tolist()))
            reduced.minima = dict(zip(self.minima, -found, strict=False))
            reduced.maxima = dict(zip(self.maxima, found[len(self.minima) :], strict=True))
        return reduced

    def row(self) -> Tensor:
        """Sum, count, sum, count, … of the means, in fp64 on the CPU."""
        numbers = [torch.as_tensor(x) for pair in self.means.values() for x in pair]
        device = next((x.device for x in numbers if x.device.type != "cpu"), "cpu")
        # one copy for all of them: each would wait for the GPU
        return torch.stack([x.to(device) for x in numbers]).cpu().double()

    def results(self) -> dict[str, float]:
        """The means and extremes; a mean of nothing is left out."""
        pairs = self.row().view(-1, 2).tolist() if self.means else []
        out = {name: total / count for name, (total, count) in zip(self.means, pairs, strict=True) if count > 0}
        out |= {name: float(value) for name, value in (self.minima | self.maxima).items()}
        return out


def in_order(batches: Sequence[Sums], num_batches: int, processes: Processes) -> Sums:
    """The means over batches of which each process measured every `size`-th; the same for any number of processes.

    Each has measured equally many. What comes after the first `num_batches` counts for nothing.
    """
    table = torch.zeros(len(batches) * processes.size, 2 * len(batches[0].means), dtype=torch.float64)
    table[processes.rank :: processes.size] = torch.stack([sums.row() for sums in batches])
    total = processes.sum(table)[:num_batches].sum(dim=0)  # summed alike, wherever its rows come from
    return Sums(dict(zip(batches[0].means, total.view(-1, 2).unbind(), strict=True)))  # type: ignore[arg-type]


def deviation(mean: float, mean_of_squares: float) -> float:
    """Standard deviation from the first two moments; rounding below zero counts as zero."""
    return math.sqrt(max(mean_of_squares - mean * mean, 0.0))
