"""Which token each head predicts at each position, and how much each prediction counts."""

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from wmtp.data.collate import IGNORED


def spread(
    values: Shaped[Tensor, "batch position"], num_heads: int, fill: int | float
) -> Shaped[Tensor, "head batch position"]:
    """What belongs to a token, handed to every head that predicts it: out[k−1, :, t] = values[:, t + k].

    Labels and token weights travel through this same function. Past the end stands `fill`.

    >>> import torch
    >>> spread(torch.tensor([[5, 6, 7]]), num_heads=2, fill=-100).tolist()
    [[[6, 7, -100]], [[7, -100, -100]]]
    """
    out = values.new_full((num_heads, *values.shape), fill)
    for k in range(1, min(num_heads, values.shape[1] - 1) + 1):
        out[k - 1, :, :-k] = values[:, k:]
    return out


def targets(
    labels: Int[Tensor, "batch position"],
    num_heads: int,
    documents: Int[Tensor, "batch position"] | None = None,
) -> Int[Tensor, "head batch position"]:
    """The token that head k predicts at position t, or −100 where there is none.

    There is none past the end, at a masked label, and where `documents` says that the token belongs
    to another document than position t.
    """
    out = spread(labels, num_heads, IGNORED)
    if documents is not None:
        out = out.masked_fill(spread(documents, num_heads, -1) != documents, IGNORED)
    return out


def head_shares(valid: Bool[Tensor, "head batch position"]) -> Float[Tensor, "head batch position"]:
    """v[k, t] = 1/|K(t)| at the valid heads K(t) of a position, 0 at the others: each position counts once."""
    return valid / valid.sum(dim=0).clamp(min=1)
