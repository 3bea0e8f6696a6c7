"""The baseline: every target counts the same."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Uniform:
    """Weight 1 for every target."""

    weight_min = 1.0
    weight_max = 1.0

    def weights(
        self, losses: Float[Tensor, "head batch position"], valid: Bool[Tensor, "head batch position"]
    ) -> Float[Tensor, "head batch position"]:
        """Ones, whatever was observed."""
        return torch.ones_like(losses)
