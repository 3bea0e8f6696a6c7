"""The oracle: what a weighting could reach that knew which tokens mislead.

It is told what no other algorithm knows, so it is a bound to hold others against, and no method.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations
from wmtp.ops.targets import spread


class Oracle(Algorithm):
    """Weight 1 for every token, but `misleading_weight` for noise and for what makes a wrong solution wrong."""

    needs_truth = True
    weight_max = 1.0

    def __init__(self, *, misleading_weight: Annotated[float, Field(ge=0, lt=1)] = 0.0) -> None:
        """With 0, misleading tokens do not train."""
        self.weight_min = misleading_weight

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """A weight per token, handed to every head that predicts it."""
        assert observed.misleading is not None
        token_weights = torch.where(observed.misleading, self.weight_min, 1.0)
        return spread(token_weights, len(observed.valid), 1.0)
