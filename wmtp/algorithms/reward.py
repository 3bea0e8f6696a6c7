"""The algorithm reward, which gives all tokens of a solution the same weight, larger for a larger reward.

An algorithm that weights the tokens of a solution differently should be better than this one. Otherwise its gain comes
from knowing which solutions are correct. Source: Peng et al. 2019, Advantage-Weighted Regression (arXiv 1910.00177),
with the mean reward as the baseline.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import ExponentialAlgorithm, Observations
from wmtp.data.split import TokenizedSplit
from wmtp.field_types import PositiveFloat


@dataclass(kw_only=True, eq=False)
class Reward(ExponentialAlgorithm):
    """The algorithm with weights exp((R − R̄) / beta). R is the reward of the solution, and R̄ its mean over the data."""

    beta: PositiveFloat = 1.0
    """The divisor of the difference of rewards. The weights differ more if it is smaller."""

    needs_rewards = True
    weighs_solutions = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mean_reward: float | None = None

    def prepare(self, data: TokenizedSplit) -> None:
        """Compute the mean reward of the training data."""
        self.mean_reward = float(data.rewards.mean(dtype=np.float64))

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """Return the weight of the solution of each target."""
        assert observed.rewards is not None and self.mean_reward is not None
        solution_weights = self.exponential((observed.rewards - self.mean_reward) / self.beta)
        return solution_weights[:, None].expand(observed.valid.shape)
