"""The algorithm entropy, which gives small weights to targets for which the policy is certain, right or wrong.

Source: Diao et al. 2026, Entropy-Adaptive Fine-Tuning (arXiv 2601.02151). As in the implementation of its authors in
LLaMA-Factory, the entropy is that of the 20 most probable tokens, whose probabilities are scaled to sum 1. It is
divided by 3.
"""

import math
from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations
from wmtp.errors import InputError
from wmtp.field_types import PositiveFloat


@dataclass(kw_only=True, eq=False)
class Entropy(Algorithm):
    """The algorithm with weights (H / max_entropy)^power, where H is the entropy of the policy in nats.

    Raises:
        InputError: `max_entropy` is less than the largest possible entropy.
    """

    power: PositiveFloat = 1.0
    """The exponent of the relative entropy. The weights differ more if it is larger."""
    top_k: Annotated[int, Field(ge=2)] = 20
    """The number of most probable tokens of which H is the entropy."""
    max_entropy: PositiveFloat = 3.0
    """The divisor of the entropy, in nats. The largest possible entropy of 20 tokens is log(20) = 2.996."""
    rescale: bool = True
    """Whether the weights of each head are scaled to mean 1."""

    uses_losses = "own"
    weight_min = 0.0
    weight_max = 1.0

    def __post_init__(self) -> None:
        if self.max_entropy < math.log(self.top_k):
            largest = math.ceil(1000 * math.log(self.top_k)) / 1000
            raise InputError(f"max_entropy={self.max_entropy:g} must be at least {largest:g}, the logarithm of top_k")
        self.entropy_top_k = self.top_k

    def weights(self, observed: Observations) -> Float[Tensor, "*target"]:
        """Return the weights before the scaling. Each weight depends only on the entropy for its own target."""
        assert observed.entropies is not None
        return (observed.entropies / self.max_entropy) ** self.power
