"""Sums of metrics over batches, micro-batches and ranks. The division by the count is done once, at the end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wmtp.distributed.process_group import Processes


@dataclass
class MetricSums:
    """The sums and counts of metrics that are means, and the values of metrics that are minima or maxima, by name.

    Tensors stay on the device on which they were computed.
    """

    means: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Sum and count of each metric that is a mean."""
    minima: dict[str, Tensor] = field(default_factory=dict)
    maxima: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: "MetricSums") -> None:
        """Add the sums and counts of another batch, and update the minima and maxima."""
        for name, (total, count) in other.means.items():
            old_total, old_count = self.means.get(name, (0.0, 0.0))
            self.means[name] = (old_total + total, old_count + count)
        for name, value in other.minima.items():
            self.minima[name] = torch.minimum(self.minima.get(name, value), value)
        for name, value in other.maxima.items():
            self.maxima[name] = torch.maximum(self.maxima.get(name, value), value)

    def reduced(self, processes: Processes) -> "MetricSums":
        """Return the sums, minima and maxima over all ranks. The result is bitwise equal on all ranks.

        All ranks must call this method.
        """
        if processes.size == 1:
            return self
        total = processes.sum(self.to_vector())
        reduced = MetricSums(dict(zip(self.means, total.view(-1, 2).unbind(), strict=True)))  # type: ignore[arg-type]
        if extremes := [*(-x for x in self.minima.values()), *self.maxima.values()]:
            largest = torch.tensor(processes.max(*torch.stack(extremes).tolist()))
            reduced.minima = dict(zip(self.minima, -largest, strict=False))
            reduced.maxima = dict(zip(self.maxima, largest[len(self.minima) :], strict=True))
        return reduced

    def to_vector(self) -> Tensor:
        """Return the sums and counts of all means as one vector (sum, count, sum, count, …), in fp64 on the CPU."""
        numbers = [torch.as_tensor(x) for pair in self.means.values() for x in pair]
        device = next((x.device for x in numbers if x.device.type != "cpu"), "cpu")
        # copy all of them at once, because each copy waits for the GPU
        return torch.stack([x.to(device) for x in numbers]).cpu().double()

    def results(self) -> dict[str, float]:
        """Return the means, minima and maxima by name. Means whose count is 0 are left out."""
        pairs = self.to_vector().view(-1, 2).tolist() if self.means else []
        metrics = {name: total / count for name, (total, count) in zip(self.means, pairs, strict=True) if count > 0}
        metrics |= {name: float(value) for name, value in (self.minima | self.maxima).items()}
        return metrics


def sum_in_order(batches: Sequence[MetricSums], num_batches: int, processes: Processes) -> MetricSums:
    """Sum over batches in their order, so that the result is bitwise equal for any number of ranks.

    Batch i is on rank i mod `size`, where `size` is the number of ranks. All ranks must call this function.

    Args:
        batches: the sums of the batches of this rank. All ranks must have the same number of batches.
        num_batches: the total number of batches of all ranks. Batches with this index or a higher index are padding
            and are ignored.
        processes: the process group.
    """
    table = torch.zeros(len(batches) * processes.size, 2 * len(batches[0].means), dtype=torch.float64)
    table[processes.rank :: processes.size] = torch.stack([sums.to_vector() for sums in batches])
    total = processes.sum(table)[:num_batches].sum(dim=0)  # same order of summation for any number of ranks
    return MetricSums(dict(zip(batches[0].means, total.view(-1, 2).unbind(), strict=True)))  # type: ignore[arg-type]


def standard_deviation(mean: float, mean_of_squares: float) -> float:
    """Return the standard deviation, or 0 if the variance is negative because of rounding errors."""
    return math.sqrt(max(mean_of_squares - mean * mean, 0.0))


def moments(
    values: Sequence[Float[Tensor, "*any"]], masks: Sequence[Bool[Tensor, "*any"]], processes: Processes
) -> tuple[float, float] | None:
    """Return mean and variance of the values of all micro-batches and ranks, or None if there are none.

    Only finite values inside the masks are used, so that a faulty sample does not change the results of the others. All
    ranks must call this function.
    """
    chosen = torch.cat([each[mask & each.isfinite()].cpu().double() for each, mask in zip(values, masks, strict=True)])
    count = torch.tensor(float(len(chosen)), dtype=torch.float64)
    number, total, squares = processes.sum(torch.stack([count, chosen.sum(), chosen.square().sum()])).tolist()
    if not number:
        return None
    return total / number, standard_deviation(total / number, squares / number) ** 2
