"""The algorithm critic. It gives a token a large weight if the token improves the predicted reward of the solution.

The weight of token i is exp(Â_i / beta). A_i is the advantage of token i, which is computed from the output of a value
head by generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438). If trace_decay is 0, A_i is the TD
error. Â_i is A_i after normalization to mean 0 and standard deviation 1.
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
from wmtp.ops.metric_sums import standard_deviation
from wmtp.ops.returns import advantages, token_rewards
from wmtp.ops.targets import shift_to_heads


class Whitening:
    """Normalization of advantages to mean 0 and standard deviation 1.

    The mean and the variance are running averages over updates. A new update has the share `MOMENTUM` in the average.
    The first `WARMUP` updates use the mean and the variance of the micro-batch instead, because an average of a few
    updates is not reliable.
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
        """Return the normalized values, and record their statistics. Results outside the mask have no meaning."""
        chosen = values[mask].cpu().double()
        sums = torch.stack([torch.tensor(float(len(chosen)), dtype=torch.float64), chosen.sum(), chosen.square().sum()])
        self._sums += sums
        mean, variance = moments(sums) if self.num_updates < self.WARMUP else (self.mean, self.variance)
        return (values - mean) / max(math.sqrt(variance), 1e-8)

    def finish_update(self, processes: Processes) -> None:
        """Update the running averages with the values of all ranks since the last update."""
        sums = processes.sum(self._sums)
        if not sums[0]:
            return
        mean, variance = moments(sums)
        share = self.MOMENTUM if self.num_updates else 1.0
        self.mean += share * (mean - self.mean)
        self.variance += share * (variance - self.variance)
        self.num_updates += 1
        self.discard_update()

    def discard_update(self) -> None:
        """Discard the statistics of the values since the last update."""
        self._sums.zero_()


def moments(sums: Float[Tensor, "3"]) -> tuple[float, float]:
    """Return mean and variance, computed from count, sum and sum of squares. If the count is 0, return 0 and 1."""
    count, total, squares = sums.tolist()
    if not count:
        return 0.0, 1.0
    return total / count, standard_deviation(total / count, squares / count) ** 2


class Critic(Algorithm):
    """The algorithm with weights exp(Â / beta). The value head is trained together with the policy."""

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
        """Create the algorithm.

        Args:
            beta: the divisor of the normalized advantage. The weights differ more if it is smaller.
            discount: the discount factor γ of generalized advantage estimation.
            trace_decay: the factor λ of generalized advantage estimation.
            weight_min: the lower limit to which weights are clipped before they are scaled to mean 1.
            weight_max: the upper limit to which weights are clipped before they are scaled to mean 1.
            value_coef: the coefficient of the value loss, relative to the loss of the policy.
        """
        require_range(weight_min, weight_max)
        self.beta, self.discount, self.trace_decay = beta, discount, trace_decay
        self.weight_min, self.weight_max, self.value_coef = weight_min, weight_max, value_coef
        self.whitening = Whitening()

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """Return the weight of the token of each target. It is the same for all heads that predict the token."""
        assert observed.values is not None and observed.rewards is not None
        rewards = token_rewards(observed.rewards, observed.response)
        advantage = advantages(
            observed.values, rewards, observed.response, discount=self.discount, trace_decay=self.trace_decay
        )
        exponent = self.whitening(advantage, observed.response) / self.beta
        # the exponent is clipped instead of the weight, to avoid overflow
        token_weights = exponent.clamp(math.log(self.weight_min), math.log(self.weight_max)).exp()
        return shift_to_heads(token_weights, len(observed.valid), 1.0)

    def finish_update(self, processes: Processes) -> None:
        """Update the running mean and variance of the advantages."""
        self.whitening.finish_update(processes)

    def discard_update(self) -> None:
        """Discard the statistics of the advantages of an update that was skipped."""
        self.whitening.discard_update()

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean and variance of the advantages, and the number of updates."""
        whitening = self.whitening
        return {"updates": whitening.num_updates, "mean": whitening.mean, "variance": whitening.variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        whitening = self.whitening
        whitening.num_updates, whitening.mean, whitening.variance = state["updates"], state["mean"], state["variance"]
