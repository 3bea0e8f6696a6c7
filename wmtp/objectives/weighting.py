"""The weights of the targets of an update: an algorithm's weights, clipped and scaled over the whole update."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations, clip_weights, mean_one_scales
from wmtp.distributed.process_group import Processes


def normalized_weights(
    algorithm: Algorithm,
    observed: Sequence[Observations],
    shares: Sequence[Float[Tensor, "head _ _"]],
    processes: Processes,
) -> list[Float[Tensor, "head _ _"]]:
    """Return the clipped and scaled weights of all micro-batches that this rank has in an update.

    All ranks must call this function.

    Args:
        algorithm: the algorithm.
        observed: the inputs of the algorithm for each micro-batch.
        shares: the shares v of the targets of each micro-batch (`ops.targets.target_shares`).
        processes: the process group.
    """
    weights = [
        clip_weights(raw, each.valid, algorithm.weight_min, algorithm.weight_max)
        for raw, each in zip(algorithm.update_weights(observed, processes), observed, strict=True)
    ]
    scales = weight_scales(algorithm, weights, shares, processes)
    return [weight * scales[:, None, None] for weight in weights]


def weight_scales(
    algorithm: Algorithm,
    weights: Sequence[Float[Tensor, "head _ _"]],
    shares: Sequence[Float[Tensor, "head _ _"]],
    processes: Processes,
) -> Float[Tensor, " head"]:
    """Return the factor by which the clipped weights of each head must be multiplied.

    With these factors the weights have mean 1 over all micro-batches and ranks of the update. If the algorithm does not
    rescale its weights, the factors are 1. Weights that are NaN are ignored, so that only the loss of their own
    micro-batch is NaN and the check of the update can name it. All ranks must call this function. See
    `normalized_weights` for the arguments.
    """
    if not algorithm.rescale:
        return torch.ones_like(weights[0][:, 0, 0])
    sums = [
        torch.stack([(share * weight).nansum(dim=(1, 2)), share.sum(dim=(1, 2))])
        for weight, share in zip(weights, shares, strict=True)
    ]
    weight_sums, share_sums = processes.sum(torch.stack(sums).sum(dim=0))
    return mean_one_scales(weight_sums, share_sums, per_head=algorithm.uses_losses != "none")
