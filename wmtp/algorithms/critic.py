"""The algorithm critic. It gives a token a large weight if the token improves the predicted reward of the solution.

The weight of token i is exp(Â_i / beta). A_i is the advantage of token i, which is computed from the output of a value
head by generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438). If trace_decay is 0, A_i is the TD
error. Â_i is A_i after normalization to mean 0 and standard deviation 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from wmtp.algorithms.base import ExponentialAlgorithm, Observations, UpdateAlgorithm
from wmtp.distributed.process_group import Processes
from wmtp.field_types import PositiveFloat, Ratio
from wmtp.models.value_heads import ValueKind
from wmtp.ops.metric_sums import moments
from wmtp.ops.returns import advantages, last_of_response, token_rewards
from wmtp.ops.targets import shift_to_heads


class Whitening:
    """Normalization of advantages to mean 0 and standard deviation 1.

    The mean and the variance are running averages over updates. A new update has the share `MOMENTUM` in the average.
    The first `WARMUP` updates use the mean and the variance of the update instead, because an average of a few updates
    is not reliable.
    """

    MOMENTUM = 0.1
    WARMUP = 10

    def __init__(self) -> None:
        self.num_updates = 0
        self.mean, self.variance = 0.0, 0.0
        self._last: tuple[float, float] | None = None
        """Mean and variance of the last update, if it had values."""

    def __call__(
        self,
        values: Sequence[Float[Tensor, "_ _"]],
        masks: Sequence[Bool[Tensor, "_ _"]],
        processes: Processes,
    ) -> list[Float[Tensor, "_ _"]]:
        """Return the normalized values of all micro-batches of an update. Results outside the masks have no meaning."""
        self._last = moments(values, masks, processes)
        mean, variance = (self.mean, self.variance) if self.num_updates >= self.WARMUP else (self._last or (0.0, 1.0))
        return [(each - mean) / max(math.sqrt(variance), 1e-8) for each in values]

    def finish_update(self) -> None:
        """Update the running averages with the values of the last update."""
        if self._last is None:
            return
        mean, variance = self._last
        share = self.MOMENTUM if self.num_updates else 1.0
        self.mean += share * (mean - self.mean)
        self.variance += share * (variance - self.variance)
        self.num_updates += 1


@dataclass(kw_only=True, eq=False)
class Critic(ExponentialAlgorithm, UpdateAlgorithm):
    """The algorithm with weights exp(Â / beta). The value head is trained together with the policy."""

    value: ValueKind = "state"
    """The kind of the value head."""
    beta: PositiveFloat = 0.9
    """The divisor of the normalized advantage. The weights differ more if it is smaller."""
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The discount factor γ of generalized advantage estimation."""
    trace_decay: Ratio = 0.95
    """The factor λ of generalized advantage estimation."""
    last_token: Literal["reward", "value"] = "reward"
    """The end of the TD error at the last token: the reward, or the value after the token.

    The difference of the two is what the value head could not predict from the solution. With "reward", it counts as a
    merit or a mistake of the last token.
    """
    value_coef: Annotated[float, Field(ge=0)] = 0.5
    """The coefficient of the value loss, relative to the loss of the policy."""

    needs_values = True
    needs_rewards = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.whitening = Whitening()

    def update_weights(self, observed: Sequence[Observations], processes: Processes) -> list[Float[Tensor, "head _ _"]]:
        """Return the weight of the token of each target. It is the same for all heads that predict the token."""
        responses = [each.response for each in observed]
        whitened = self.whitening([self._advantages(each) for each in observed], responses, processes)
        return [
            shift_to_heads(self.exponential(advantage / self.beta), len(each.valid), 1.0)
            for advantage, each in zip(whitened, observed, strict=True)
        ]

    def _advantages(self, observed: Observations) -> Float[Tensor, "batch position"]:
        assert observed.values is not None and observed.rewards is not None
        final = observed.rewards
        if self.last_token == "value":
            final = (observed.values * last_of_response(observed.response)).sum(dim=1)
        rewards = token_rewards(final, observed.response)
        return advantages(
            observed.values, rewards, observed.response, discount=self.discount, trace_decay=self.trace_decay
        )

    def finish_update(self) -> None:
        """Update the running mean and variance of the advantages."""
        self.whitening.finish_update()

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean and variance of the advantages, and the number of updates."""
        whitening = self.whitening
        return {"updates": whitening.num_updates, "mean": whitening.mean, "variance": whitening.variance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        whitening = self.whitening
        whitening.num_updates, whitening.mean, whitening.variance = state["updates"], state["mean"], state["variance"]
