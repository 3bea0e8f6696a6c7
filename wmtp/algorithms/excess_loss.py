"""Algorithms that use the excess loss, which is the policy's loss of a target minus the loss of a reference model.

Source: Lin et al. 2024, Rho-1: Not All Tokens Are What You Need (arXiv 2404.07965), section 2.2. The excess loss is
negative if the reference model has the higher loss, which is expected for noise. Such targets get the smallest weights.
"""

import math
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations, Reference, require_range
from wmtp.field_types import PositiveFloat
from wmtp.ops.shares import share_of


class ExcessLoss(Algorithm):
    """The algorithm with weights exp((CE_policy − CE_reference) / temperature). CE is the cross-entropy of a target."""

    uses_losses = "own"
    needs_reference = True

    def __init__(
        self,
        *,
        temperature: PositiveFloat = 1.0,
        weight_min: PositiveFloat = 0.1,
        weight_max: PositiveFloat = 5.0,
        reference: Reference | None = None,
    ) -> None:
        """Create the algorithm.

        Args:
            temperature: the divisor of the excess loss. The weights differ more if it is lower.
            weight_min: the lower limit to which weights are clipped before they are scaled to mean 1.
            weight_max: the upper limit to which weights are clipped before they are scaled to mean 1.
            reference: see `Algorithm.reference`.
        """
        require_range(weight_min, weight_max)
        self.temperature = temperature
        self.weight_min, self.weight_max, self.reference = weight_min, weight_max, reference

    def weights(self, observed: Observations) -> Float[Tensor, "*target"]:
        """Return the weights before the scaling. Each weight depends only on the losses of its own target."""
        exponent = excess(observed) / self.temperature
        # the exponent is clipped instead of the weight, to avoid overflow
        return exponent.clamp(math.log(self.weight_min), math.log(self.weight_max)).exp()


class TokenSkip(Algorithm):
    """The algorithm that trains head 1 on all targets, and heads 2 … H on the targets with the largest excess loss."""

    uses_losses = "all"
    needs_reference = True
    min_heads = 2
    weight_min = 0.0
    weight_max = 1.0

    def __init__(
        self, *, keep_fraction: Annotated[float, Field(gt=0, le=1)] = 0.6, reference: Reference | None = None
    ) -> None:
        """Create the algorithm.

        Args:
            keep_fraction: the share of the targets in a micro-batch on which each of the heads 2 … H is trained. The
                number of these targets is rounded up.
            reference: see `Algorithm.reference`.
        """
        self.keep_fraction, self.reference = keep_fraction, reference

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """Return 1 for the targets on which a head is trained, and 0 for all others."""
        scores = excess(observed).masked_fill(~observed.valid, -torch.inf)
        weights = torch.zeros_like(scores)
        weights[0] = 1.0
        for head in range(1, len(weights)):
            count = share_of(int(observed.valid[head].sum()), self.keep_fraction)
            weights[head].view(-1)[scores[head].flatten().topk(count).indices] = 1.0
        return weights


def excess(observed: Observations) -> Float[Tensor, "*target"]:
    """Return the excess loss CE_policy − CE_reference of every target, in nats."""
    assert observed.losses is not None and observed.reference_losses is not None
    return observed.losses - observed.reference_losses
