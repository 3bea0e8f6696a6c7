"""Weighted multi-token prediction: L = Σ v·w·CE / Σ v over one update.

v shares a position among its valid heads, w is the algorithm's weight, CE the cross-entropy of head k
at position t. With one head and w = 1 this is the ordinary next-token loss.
"""

import torch
from torch import Tensor

from wmtp.algorithms.base import Algorithm, normalised
from wmtp.data.collate import IGNORED, Batch
from wmtp.losses import cross_entropy
from wmtp.metrics import Sums, deviation
from wmtp.models.mtp import MtpModel
from wmtp.targets import head_shares, targets


class MtpObjective:
    """Trains all heads on targets weighted by an algorithm; validates them with uniform weights.

    Validation does not depend on the algorithm, so that runs with different weightings can be compared.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm

    def denominator(self, model: MtpModel, batch: Batch) -> Tensor:
        """Σ v: the number of positions at which at least one head has a target."""
        valid = targets(batch.labels, model.num_heads) != IGNORED
        return valid.any(dim=0).sum()

    def loss(self, model: MtpModel, batch: Batch) -> tuple[Tensor, Sums]:
        """Σ v·w·CE, and the measurements of the batch."""
        target = targets(batch.labels, model.num_heads)
        valid = target != IGNORED
        shares = head_shares(valid)
        losses = cross_entropy(model(batch.tokens), model.unembedding.weight, target)
        raw = self.algorithm.weights(losses.detach(), valid)
        weights = normalised(raw, shares, self.algorithm.weight_min, self.algorithm.weight_max)
        loss = (shares * weights * losses).sum()

        sums = head_sums(losses.detach(), valid)
        share_sum = shares.sum()
        sums.means["loss"] = (loss.detach(), share_sum)
        sums.means["weight_mean"] = ((shares * weights).sum(), share_sum)
        sums.means["weight_square"] = ((shares * weights.square()).sum(), share_sum)
        sums.means["valid_target_ratio"] = (valid.sum(), torch.tensor(batch.num_tokens * len(valid)))
        sums.minima["weight_min"] = weights[valid].min()
        sums.maxima["weight_max"] = weights[valid].max()
        return loss, sums

    def evaluate(self, model: MtpModel, batch: Batch) -> Sums:
        """Σ v·CE and each head's loss."""
        target = targets(batch.labels, model.num_heads)
        valid = target != IGNORED
        shares = head_shares(valid)
        losses = cross_entropy(model(batch.tokens), model.unembedding.weight, target).detach()
        sums = head_sums(losses, valid)
        sums.means["loss"] = ((shares * losses).sum(), shares.sum())
        return sums

    def metrics(self, sums: Sums) -> dict[str, float]:
        """The loss, each head's cross-entropy and their mean (`mtp_loss`), and the weights' moments."""
        values = sums.results()
        heads = [value for name, value in values.items() if name.startswith("head_")]
        values["mtp_loss"] = sum(heads) / len(heads)
        if "weight_square" in values:
            values["weight_std"] = deviation(values["weight_mean"], values.pop("weight_square"))
        return values


def head_sums(losses: Tensor, valid: Tensor) -> Sums:
    """Each head's summed cross-entropy and its number of targets, as `head_1_loss`, `head_2_loss`, …"""
    totals, counts = losses.flatten(1).sum(dim=1), valid.flatten(1).sum(dim=1)
    return Sums({f"head_{k}_loss": (totals[k - 1], counts[k - 1]) for k in range(1, len(valid) + 1)})
