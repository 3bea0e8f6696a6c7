"""The algorithm prior, which gives small weights to tokens that the policy found improbable before training.

Source: Wang et al. 2026, PriFT: Prior-Support Guided Supervised Fine-Tuning (arXiv 2606.09396), the variant PriFT-prob.
There the power is 1.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import INITIAL, Algorithm, Observations, Reference
from wmtp.field_types import PositiveFloat


@dataclass(kw_only=True, eq=False)
class Prior(Algorithm):
    """The algorithm with weights p^power, where p is the probability of the token under the reference model.

    Unlike the weights of `Dft`, these weights do not change during training. So the policy cannot increase the weight
    of a token by learning it.
    """

    power: PositiveFloat = 1.0
    """The exponent of the probability. The weights differ more if it is larger."""
    reference: Reference | None = INITIAL
    """See `Algorithm.reference`."""
    rescale: bool = True
    """Whether the weights are scaled to mean 1."""

    references = ("reference",)
    weight_min = 0.0
    weight_max = 1.0

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """Return the weight of the token of each target. It is the same for all heads that predict the token."""
        assert observed.reference_losses is not None
        return torch.exp(-self.power * observed.reference_losses[0])
