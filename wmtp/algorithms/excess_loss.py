"""Algorithms that use the excess loss, which is the policy's loss of a target minus the loss of a reference model.

Source: Lin et al. 2024, Rho-1: Not All Tokens Are What You Need (arXiv 2404.07965), section 2.2. The excess loss is
negative if the reference model has the higher loss, which is expected for noise. Such targets get the smallest weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from wmtp.algorithms.base import ExponentialAlgorithm, Observations, Reference, UpdateAlgorithm
from wmtp.distributed.process_group import Processes
from wmtp.field_types import PositiveFloat
from wmtp.ops.shares import share_of


@dataclass(kw_only=True, eq=False)
class ExcessLoss(ExponentialAlgorithm):
    """The algorithm with weights exp((CE_policy − CE_reference) / temperature). CE is the cross-entropy of a target."""

    temperature: PositiveFloat = 1.0
    """The divisor of the excess loss. The weights differ more if it is lower."""
    reference: Reference | None = None
    """See `Algorithm.reference`."""

    uses_losses = "own"
    references = ("reference",)
    needs_better_reference = True

    def weights(self, observed: Observations) -> Float[Tensor, "*target"]:
        """Return the weights before the scaling. Each weight depends only on the losses of its own target."""
        return self.exponential(excess(observed) / self.temperature)


@dataclass(kw_only=True, eq=False)
class TokenSkip(UpdateAlgorithm):
    """The algorithm that trains head 1 on all targets, and heads 2 … H on the targets with the largest excess loss."""

    keep_fraction: Annotated[float, Field(gt=0, le=1)] = 0.6
    """The share of the targets of an update on which each of the heads 2 … H is trained. The number of these targets is
    rounded up."""
    reference: Reference | None = None
    """See `Algorithm.reference`."""
    rescale: bool = True
    """Whether the weights of each head are scaled to mean 1."""

    uses_losses = "all"
    references = ("reference",)
    needs_better_reference = True
    min_heads = 2
    weight_min = 0.0
    weight_max = 1.0

    def update_weights(self, observed: Sequence[Observations], processes: Processes) -> list[Float[Tensor, "head _ _"]]:
        """Return 1 for the targets on which a head is trained, and 0 for all others.

        The targets of all micro-batches and ranks are ranked together. If excess losses are equal, the earlier
        micro-batch and position is preferred.
        """
        weights = [each.valid.float() for each in observed]
        numbers = [each.number for each in observed]
        for head in range(1, len(weights[0])):
            scores = [excess(each)[head][each.valid[head]] for each in observed]
            kept = largest_of_update(scores, numbers, self.keep_fraction, processes)
            for weight, each, mask in zip(weights, observed, kept, strict=True):
                weight[head][each.valid[head]] = mask.to(weight)  # on the device of the weight
        return weights


def largest_of_update(
    scores: Sequence[Float[Tensor, " _"]], numbers: Sequence[int], fraction: float, processes: Processes
) -> list[Bool[Tensor, " _"]]:
    """Return a mask of the largest scores of an update for each micro-batch of this rank.

    The number of these scores is `fraction` times the number of scores of all ranks, rounded up. Equal scores are
    ranked by the number of their micro-batch, and then by their position. All ranks must call this function.

    Args:
        scores: the scores of each micro-batch of this rank.
        numbers: the number of each micro-batch (`Observations.number`).
        fraction: the share of the scores to keep.
        processes: the process group.
    """
    own = {(number, processes.rank, i): part for i, (number, part) in enumerate(zip(numbers, scores, strict=True))}
    gathered = processes.gather([[*key, len(part)] for key, part in own.items()])
    counts = {tuple(key): count for rank in gathered for *key, count in rank}
    ordered = sorted(counts)
    parts = [own[key].cpu() if key in own else torch.zeros(counts[key]) for key in ordered]
    all_scores = processes.sum(torch.cat(parts))
    keep = torch.zeros(len(all_scores), dtype=torch.bool)
    largest = torch.argsort(all_scores, descending=True, stable=True)
    keep[largest[: share_of(len(all_scores), fraction)]] = True
    masks = dict(zip(ordered, torch.split(keep, [counts[key] for key in ordered]), strict=True))
    return [masks[key] for key in own]


def excess(observed: Observations) -> Float[Tensor, "*target"]:
    """Return the excess loss CE_policy − CE_reference of every target, in nats."""
    assert observed.losses is not None and observed.reference_losses is not None
    return observed.losses - observed.reference_losses[0]
