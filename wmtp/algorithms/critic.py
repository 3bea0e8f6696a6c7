"""The critic: a token counts by how much better the solution looks once it was written.

w_i = exp(Â_i / beta), where A_i is the advantage that a value head sees in token i (generalised
advantage estimation, Schulman et al. 2016, arXiv 1506.02438; its TD error with trace_decay = 0) and
Â_i the same, whitened.
"""

import math
from typing import Annotated, Any

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations, require_range
from wmtp.distributed.process_group import Processes
from wmtp.field_types import PositiveFloat, Ratio
from wmtp.ops.metric_sums import deviation
from wmtp.ops.returns import advantages, rewards_at
from wmtp.ops.targets import spread


class Whitening:
    """Brings advantages to mean 0 and deviation 1 by moments that are averaged over updates.

    The first `WARMUP` updates use the micro-batch's own moments, since an average of few says little.
    """

    MOMENTUM = 0.1
    WARMUP = 10

    def __init__(self) -> None:
        self.num_updates = 0
        self.mean, self.variance = 0.0, 0.0
        self._sums = torch.zeros(3, dtype=torch.float64)

    def __call__(
        self, values: Float[Tensor, "batch position"], mask: Bool[Tensor, "batch position"]
    ) -> Float[Tensor, "batch position"]:
        """Whitened values; what the mask leaves out may be anything."""
        chosen = values[mask].cpu().double()
        sums = torch.stack([torch.tensor(float(len(chosen)), dtype=torch.float64), chosen.sum(), chosen.square().sum()])
        self._sums += sums
        mean, variance = moments(sums) if self.num_updates < self.WARMUP else (self.mean, self.variance)
        return (values - mean) / max(math.sqrt(variance), 1e-8)

    def finish_update(self, processes: Processes) -> None:
        """Take the moments of all values whitened since the last update into the average."""
        sums = processes.sum(self._sums)
        if not sums[0]:
            return
        mean, variance = moments(sums)
        share = self.MOMENTUM if self.num_updates else 1.0
        self.mean += share * (mean - self.mean)
        self.variance += share * (variance - self.variance)
        self.num_updates += 1
        self.forget_update()

    def forget_update(self) -> None:
        """Leave out what was whitened since the last update."""
        self._sums.zero_()


def moments(sums: Float[Tensor, "3"]) -> tuple[float, float]:
    """Mean and variance from count, sum and sum of squares; of nothing: 0 and 1."""
    count, total, squares = sums.tolist()
    if not count:
        return 0.0, 1.0
    return total / count, deviation(total / count, squares / count) ** 2


class Critic(Algorithm):
    """Weights exp(Â / beta) from the advantages of a value head that trains beside the policy."""

    needs_values = True

    def __init__(
        self,
        *,
        beta: PositiveFloat = 0.9,
        discount: Annotated[float, Field(gt=0, le=1)] = 1.0,
        trace_decay: Ratio = 0.95,
        weight_min: PositiveFloat = 0.1,
        weight_max: PositiveFloat = 5.0,
        value_coef: Annotated[float, Field(ge=0)] = 0.5,
    ) -> None:
        """γ is `discount`, λ is `trace_decay`. A small `beta` makes weights differ more."""
        require_range(weight_min, weight_max)
        self.beta, self.discount, self.trace_decay = beta, discount, trace_decay
        self.weight_min, self.weight_max, self.value_coef = weight_min, weight_max, value_coef
        self.whitening = Whitening()

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """A weight per token, handed to every head that predicts it."""
        assert observed.values is not None and observed.rewards is not None
        rewards = rewards_at(observed.rewards, observed.response)
        advantage = advantages(
            observed.values, rewards, observed.response, discount=self.discount, trace_decay=self.trace_decay
        )
        exponent = self.whitening(advantage, observed.response) / self.beta
        # clipped as an exponent, so that no weight overflows
        token_weights = exponent.clamp(math.log(self.weight_min), math.log(self.weight_max)).exp()
        return spread(token_weights, len(observed.valid), 1.0)

    def finish_update(self, processes: Processes) -> None:
        """Average the advantages' moments."""
        self.whitening.finish_update(processes)

    def forget_update(self) -> None:
        """Leave the update's advantages out of the average."""
        self.whitening.forget_update()

    def state_dict(self) -> dict[str, Any]:
        """The averaged moments."""
        whitening = self.whitening
        return {"updates": whitening.num_updates, "mean": whitening.mean, "variance": whitening.variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on averaging."""
        whitening = self.whitening
        whitening.num_updates, whitening.mean, whitening.variance = state["updates"], state["mean"], state["variance"]
