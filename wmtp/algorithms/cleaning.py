"""The algorithm cleaning, which trains on the tokens that a reference model has learned most about.

Source: Pang et al. 2025, Token Cleaning: Fine-Grained Data Selection for LLM Supervised Fine-Tuning (arXiv 2502.01968),
the variant with a fixed model. The tokens are chosen once, before training.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations
from wmtp.data.split import TokenizedSplit
from wmtp.field_types import ExistingPath
from wmtp.ops.targets import shift_to_heads


@dataclass(kw_only=True, eq=False)
class Cleaning(Algorithm):
    """The algorithm with weight 1 for the tokens with the largest CE_start − CE_reference, and 0 for all others.

    CE_start is the loss of the reference model before its training. The numbers of tokens are rounded down, but at
    least one token is chosen.
    """

    keep_fraction: Annotated[float, Field(gt=0, le=1)] = 0.6
    """The share of the tokens of solutions that are trained."""
    level: Literal["sample", "global"] = "global"
    """Whether this is the share of each solution, or of the training data."""
    reference: ExistingPath | None = None
    """See `Algorithm.reference`. The policy before training has no difference to itself, so it cannot be selected."""
    rescale: bool = True
    """Whether the weights are scaled to mean 1."""

    references = ("reference", "start")
    needs_better_reference = True
    weight_min = 0.0
    weight_max = 1.0

    def __post_init__(self) -> None:
        self.threshold: float | None = None

    def prepare(self, data: TokenizedSplit) -> None:
        """Compute the smallest difference that is chosen, if the share is that of the training data."""
        if self.level == "sample":
            return
        assert data.reference_losses is not None
        reference, start = data.reference_losses[data.targets].T
        ordered = np.sort(start - reference)
        self.threshold = float(ordered[-self._number(len(ordered))])

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """Return the weight of the token of each target. It is the same for all heads that predict the token."""
        assert observed.reference_losses is not None
        reference, start = observed.reference_losses
        learned = start - reference
        if self.level == "global":
            assert self.threshold is not None
            return torch.where(learned >= self.threshold, 1.0, 0.0)
        kept = self._largest_of_rows(learned[0], observed.valid[0])  # at the positions at which head 1 predicts tokens
        return shift_to_heads(F.pad(kept, (1, -1)).float(), len(observed.valid), 0.0)

    def _largest_of_rows(
        self, values: Float[Tensor, "batch position"], mask: Bool[Tensor, "batch position"]
    ) -> Bool[Tensor, "batch position"]:
        """Return a mask of the largest values of each row within `mask`. Of equal values, the first are preferred."""
        order = values.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True)
        ranks = order.argsort(dim=1)
        numbers = torch.tensor([self._number(count) for count in mask.sum(dim=1).tolist()], device=values.device)
        return mask & (ranks < numbers[:, None])

    def _number(self, count: int) -> int:
        """Return the number of tokens to choose from `count` tokens."""
        return max(1, int(self.keep_fraction * count))
