"""Cross-entropy of every head at every position that has a target."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from wmtp.data.collate import IGNORED


def cross_entropy(
    states: Float[Tensor, "head batch position dim"],
    unembedding: Float[Tensor, "vocabulary dim"],
    targets: Int[Tensor, "head batch position"],
) -> Float[Tensor, "head batch position"]:
    """−log p(target) in nats, 0 where there is no target.

    Logits are made, in fp32, only for positions with a target.
    """
    rows = (targets != IGNORED).flatten().nonzero().squeeze(1)
    logits = states.flatten(0, 2).index_select(0, rows) @ unembedding.T
    losses = F.cross_entropy(logits.float(), targets.flatten()[rows], reduction="none")
    out = losses.new_zeros(targets.numel())
    return out.index_copy(0, rows, losses).view(targets.shape)
