"""Weighted multi-token prediction: L = Σ v·w·CE / Σ v over one update.

v shares a position among its valid heads, w is the algorithm's weight, CE the cross-entropy of head k
at position t. With one head and w = 1 this is the ordinary next-token loss.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations, clipped, mean_one
from wmtp.data.collate import IGNORED, Batch
from wmtp.distributed.process_group import Processes
from wmtp.errors import TrainingError
from wmtp.models.mtp import MtpModel, Outputs
from wmtp.objectives.value_loss import ValueLoss, value_metrics
from wmtp.ops.cross_entropy import cross_entropy, weighted_cross_entropy
from wmtp.ops.metric_sums import Sums, deviation
from wmtp.ops.targets import head_shares, spread, targets


class MtpObjective:
    """Trains all heads on targets weighted by an algorithm; validates them with uniform weights.

    Validation does not depend on the algorithm, so that runs with different weightings can be compared.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.value_loss = ValueLoss("reward")

    @property
    def name(self) -> str:
        """The algorithm's."""
        return self.algorithm.name

    def totals(self, model: MtpModel, batch: Batch) -> Float[Tensor, " part"]:
        """Σ v, the number of positions at which a head has a target; and the number of values."""
        valid = targets(batch.labels, model.num_heads) != IGNORED
        return torch.stack([valid.any(dim=0).sum(), self.value_loss.total(batch)]).float()

    def check(self, totals: Float[Tensor, " part"]) -> None:
        """Raises `TrainingError` where nothing in the whole update has a target."""
        if not totals[0]:
            raise TrainingError("no token of the update is a target: every label is masked, so there is no loss")

    def loss(self, model: MtpModel, batch: Batch, totals: Float[Tensor, " part"]) -> tuple[Tensor, Sums]:
        """Σ v·w·CE / Σ v, and the value loss beside it if the algorithm trains one."""
        outputs = model(batch.tokens)
        loss, sums = self.loss_of(outputs, model, batch, totals)
        if outputs.values is not None:
            value_sum, value_sums = self.value_loss.sum(outputs.values, batch)
            loss = loss + self.algorithm.value_coef * value_sum / totals[1]
            sums.add(value_sums)
        return loss, sums

    def loss_of(
        self, outputs: Outputs, model: MtpModel, batch: Batch, totals: Float[Tensor, " part"]
    ) -> tuple[Tensor, Sums]:
        """Σ v·w·CE / Σ v of a forward that was made already."""
        target = targets(batch.labels, model.num_heads)
        valid = target != IGNORED
        shares = head_shares(valid)
        total, losses, weights = self._weighted_sum(outputs, model, batch, target, shares)

        sums = head_sums(losses, valid)
        share_sum = shares.sum()
        sums.means["loss"] = (total.detach(), share_sum)
        sums.means["weight_mean"] = ((shares * weights).sum(), share_sum)
        sums.means["weight_square"] = ((shares * weights.square()).sum(), share_sum)
        sums.means["valid_target_ratio"] = (valid.sum(), torch.tensor(batch.num_tokens * len(valid)))
        sums.minima["weight_min"] = weights.where(valid, torch.inf).amin()
        sums.maxima["weight_max"] = weights.where(valid, -torch.inf).amax()
        return total / totals[0], sums

    def _weighted_sum(
        self, outputs: Outputs, model: MtpModel, batch: Batch, target: Tensor, shares: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Σ v·w·CE with gradient, and every target's loss and weight."""
        algorithm, unembedding = self.algorithm, model.unembedding_weight
        low, high = algorithm.weight_min, algorithm.weight_max
        observed = self.observations(outputs, batch, target)
        if algorithm.uses_losses == "own":
            flat_shares, reference_losses = shares.flatten(), observed.reference_losses

            def coefficients(losses: Tensor, rows: Tensor) -> Tensor:
                reference = None if reference_losses is None else reference_losses.flatten()[rows]
                valid = torch.ones_like(losses, dtype=torch.bool)
                seen = Observations(valid, observed.response, losses, reference, number=observed.number)
                return flat_shares[rows] * clipped(algorithm.weights(seen), valid, low, high)

            total, losses, products = weighted_cross_entropy(outputs.states, unembedding, target, coefficients)
            weights = products / shares.where(shares > 0, 1.0)
            scale = mean_one(weights, shares)
            return total * scale, losses, weights * scale

        if algorithm.uses_losses == "all":
            observed = replace(observed, losses=cross_entropy(outputs.states.detach(), unembedding.detach(), target))
        weights = clipped(algorithm.weights(observed), observed.valid, low, high)
        weights = weights * mean_one(weights, shares)
        factors = (shares * weights).flatten()
        # what has weight 0 costs nothing in the pass that makes gradients, unless the pass before met no number
        skipped = torch.zeros_like(target, dtype=torch.bool)
        if observed.losses is not None:
            skipped = (weights == 0) & observed.losses.isfinite()
        trained = target.masked_fill(skipped, IGNORED)
        total, losses, _ = weighted_cross_entropy(
            outputs.states, unembedding, trained, lambda losses, rows: factors[rows]
        )
        return total, losses if observed.losses is None else observed.losses, weights

    def observations(self, outputs: Outputs, batch: Batch, target: Tensor) -> Observations:
        """What the algorithm may look at before any loss is known."""
        reference = None
        if self.algorithm.needs_reference:
            assert batch.reference_losses is not None
            reference = spread(batch.reference_losses, len(target), 0.0)
        values = outputs.values.detach() if self.algorithm.needs_values and outputs.values is not None else None
        return Observations(
            target != IGNORED, batch.response, reference_losses=reference, values=values, rewards=batch.rewards,
            number=batch.number, misleading=batch.misleading,
        )  # fmt: skip

    @torch.no_grad()
    def token_measures(self, model: MtpModel, batch: Batch) -> Float[Tensor, "batch position measure"]:
        """Of each token its weight, averaged over the heads that predict it, head 1's loss, and the value after it.

        NaN at tokens that are no targets, and for values where there is no value head.
        """
        target, outputs = targets(batch.labels, model.num_heads), model(batch.tokens)
        _, losses, weights = self._weighted_sum(outputs, model, batch, target, head_shares(target != IGNORED))
        total, count = torch.zeros_like(weights[0]), torch.zeros_like(weights[0])
        for k in range(1, len(weights) + 1):
            total[:, k:] += weights[k - 1, :, :-k]
            count[:, k:] += target[k - 1, :, :-k] != IGNORED
        nothing = torch.full_like(total, torch.nan)
        loss, values = nothing.clone(), nothing if outputs.values is None else outputs.values.float()
        loss[:, 1:] = losses[0, :, :-1]
        return torch.stack([total / count, *(x.where(batch.response, nothing) for x in (loss, values))], dim=-1)

    def evaluate(self, model: MtpModel, batch: Batch) -> Sums:
        """Σ v·CE and each head's loss, and how good the values are."""
        outputs = model(batch.tokens)
        sums = self.evaluation_of(outputs, model, batch)
        if outputs.values is not None:
            sums.add(self.value_loss.sum(outputs.values, batch)[1])
        return sums

    def evaluation_of(self, outputs: Outputs, model: MtpModel, batch: Batch) -> Sums:
        """Σ v·CE and each head's loss of a forward that was made already; Σ v·CE over right solutions without noise."""
        target = targets(batch.labels, model.num_heads)
        valid = target != IGNORED
        shares = head_shares(valid)
        losses = cross_entropy(outputs.states, model.unembedding_weight, target)
        sums = head_sums(losses, valid)
        sums.means["loss"] = ((shares * losses).sum(), shares.sum())
        if batch.misleading is not None:
            clean = spread(batch.is_correct[:, None] & ~batch.misleading, model.num_heads, 0) * shares
            sums.means["clean_loss"] = ((clean * losses).sum(), clean.sum())
        return sums

    def metrics(self, sums: Sums) -> dict[str, float]:
        """The loss, each head's cross-entropy and their mean (`mtp_loss`), the weights' and values' moments."""
        values = value_metrics(sums.results())
        heads = [value for name, value in values.items() if name.startswith("head_")]
        values["mtp_loss"] = sum(heads) / len(heads)
        if "weight_square" in values:
            values["weight_std"] = deviation(values["weight_mean"], values.pop("weight_square"))
        return values

    def finish_update(self, processes: Processes) -> None:
        """Tell the algorithm."""
        self.algorithm.finish_update(processes)

    def forget_update(self) -> None:
        """Tell the algorithm."""
        self.algorithm.forget_update()

    def state_dict(self) -> dict[str, Any]:
        """The algorithm's state."""
        return self.algorithm.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put the algorithm's state back."""
        self.algorithm.load_state_dict(state)


def head_sums(losses: Tensor, valid: Tensor) -> Sums:
    """Each head's summed cross-entropy and its number of targets, as `head_1_loss`, `head_2_loss`, …"""
    totals, counts = losses.flatten(1).sum(dim=1), valid.flatten(1).sum(dim=1)
    return Sums({f"head_{k}_loss": (totals[k - 1], counts[k - 1]) for k in range(1, len(valid) + 1)})
