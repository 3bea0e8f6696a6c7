"""Sums that batches, micro-batches and ranks add to; the division comes last, once."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


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

    def results(self) -> dict[str, float]:
        """The means and extremes; a mean of nothing is left out."""
        out = {name: float(total) / float(count) for name, (total, count) in self.means.items() if float(count) > 0}
        out |= {name: float(value) for name, value in (self.minima | self.maxima).items()}
        return out


def deviation(mean: float, mean_of_squares: float) -> float:
    """Standard deviation from the first two moments; rounding below zero counts as zero."""
    return math.sqrt(max(mean_of_squares - mean * mean, 0.0))
