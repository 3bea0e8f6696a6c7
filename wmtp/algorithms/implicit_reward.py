"""The algorithm implicit_reward. It gives a token a large weight if a reward model prefers it more than its start does.

The reward model is a language model whose summed log-ratio to its frozen start was trained to predict the reward of a
solution. Then the log-ratio of one token is the part of the reward that this token has earned.
Source: Yuan et al. 2024, Free Process Rewards without Process Labels (arXiv 2412.01981), section 3.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import ExponentialAlgorithm, Observations
from wmtp.data.split import TokenizedSplit
from wmtp.field_types import PositiveFloat


@dataclass(kw_only=True, eq=False)
class ImplicitReward(ExponentialAlgorithm):
    """The algorithm with weights exp(r̂ / beta). r is log p − log p_start, and r̂ is r normalized over the training data.

    p is the probability of the token under the reward model, and p_start under the model with which it began.
    """

    beta: PositiveFloat = 0.9
    """The divisor of the normalized log-ratio. The weights differ more if it is smaller."""

    references = ("reward_model", "start")
    needs_rewards = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mean, self.deviation = 0.0, 1.0

    def prepare(self, data: TokenizedSplit) -> None:
        """Compute the mean and the deviation of the log-ratio over the tokens of the training solutions."""
        assert data.reference_losses is not None
        reference, start = data.reference_losses[data.targets].T.astype(np.float64)
        self.mean, self.deviation = float((start - reference).mean()), float((start - reference).std())

    def weights(self, observed: Observations) -> Float[Tensor, "*target"]:
        """Return the weight of the token of each target. It is the same for all heads that predict the token."""
        assert observed.reference_losses is not None
        reference, start = observed.reference_losses
        normalized = (start - reference - self.mean) / max(self.deviation, 1e-8)
        return self.exponential(normalized / self.beta)
