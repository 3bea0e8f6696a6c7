"""The targets of each head at each position, and the share of each target in the loss."""

from typing import Literal

from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from wmtp.data.collate import IGNORED


def shift_to_heads(
    values: Shaped[Tensor, "batch position *rest"], num_heads: int, fill: int | float
) -> Shaped[Tensor, "head batch position *rest"]:
    """Shift values of tokens to the positions at which each head predicts these tokens.

    The result at [k−1, :, t] is values[:, t + k], or `fill` if t + k is past the end of the row.

    >>> import torch
    >>> shift_to_heads(torch.tensor([[5, 6, 7]]), num_heads=2, fill=-100).tolist()
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
    """Return the targets. The target of head k at position t is the id of the token at position t + k.

    The result is −100, which means that there is no target, if t + k is past the end of the row, if the label at t + k
    is masked (−100), or if t and t + k belong to different `documents`.
    """
    out = shift_to_heads(labels, num_heads, IGNORED)
    if documents is not None:
        out = out.masked_fill(shift_to_heads(documents, num_heads, -1) != documents, IGNORED)
    return out


Shares = Literal["position", "target"]
"""The influence of targets: all positions have equal influence, or all targets."""


def target_shares(
    valid: Bool[Tensor, "head batch position"], shares: Shares = "position"
) -> Float[Tensor, "head batch position"]:
    """Return the share v of every target, which is 0 where there is no target.

    If `shares` is "position" and n heads have a target at a position, each of these targets has the share 1 / n. The
    shares of a position then sum to 1. If `shares` is "target", every target has the share 1.
    """
    return valid.float() if shares == "target" else valid / valid.sum(dim=0).clamp(min=1)


def mean_over_heads(
    values: Float[Tensor, "head batch position"], valid: Bool[Tensor, "head batch position"]
) -> Float[Tensor, "batch position"]:
    """Return the mean value of each token over the heads that predict it, or NaN if no head predicts it.

    `values` and `valid` are indexed like targets: head k at position t predicts the token at t + k.
    """
    total, count = values.new_zeros(values.shape[1:]), values.new_zeros(values.shape[1:])
    for k in range(1, min(len(values), values.shape[2] - 1) + 1):
        total[:, k:] += values[k - 1, :, :-k].where(valid[k - 1, :, :-k], 0.0)
        count[:, k:] += valid[k - 1, :, :-k]
    return total / count
