"""The algorithm oracle, whose weights are computed from labels of harmful tokens.

Its result is an upper bound, with which the results of other algorithms are compared. It cannot be used for real data,
because there the harmful tokens are not known.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations
from wmtp.ops.targets import shift_to_heads


@dataclass(kw_only=True, eq=False)
class Oracle(Algorithm):
    """The algorithm that gives harmful tokens `misleading_weight` and all other tokens weight 1.

    A token is harmful if it is noise or if it makes a wrong solution wrong.
    """

    misleading_weight: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The weight of harmful tokens. If it is 0, the model is not trained on them."""
    rescale: bool = True
    """Whether the weights are scaled to mean 1."""

    needs_token_labels = True
    weight_min = 0.0
    weight_max = 1.0

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """Return the weight of the token of each target. It is the same for all heads that predict the token."""
        assert observed.harmful is not None
        token_weights = torch.where(observed.harmful, self.misleading_weight, 1.0)
        return shift_to_heads(token_weights, len(observed.valid), 1.0)
