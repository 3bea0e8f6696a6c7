"""Oracle: a weighting that uses ground truth about harmful tokens.

It is an upper bound to compare other algorithms with, not a method: real data has no such ground truth.
"""

from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations
from wmtp.ops.targets import shift_to_heads


class Oracle(Algorithm):
    """The weighting that gives harmful tokens `misleading_weight` and all other tokens weight 1.

    A token is harmful if it is noise or if it makes a wrong solution wrong.
    """

    needs_token_labels = True
    weight_max = 1.0

    def __init__(self, *, misleading_weight: Annotated[float, Field(ge=0, lt=1)] = 0.0) -> None:
        """Create the weighting. With `misleading_weight` 0, harmful tokens are not trained."""
        self.weight_min = misleading_weight

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """Return one weight per token, the same for every head that predicts the token."""
        assert observed.harmful is not None
        token_weights = torch.where(observed.harmful, self.weight_min, 1.0)
        return shift_to_heads(token_weights, len(observed.valid), 1.0)
