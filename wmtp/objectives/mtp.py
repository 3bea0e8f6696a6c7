"""Weighted multi-token prediction: L = Σ v·w·CE / Σ v over one update.

The sums are over all heads k and positions t. v is the position weight (see `ops.targets.position_weights`), w is the
algorithm's weight, and CE is the cross-entropy of head k at position t in nats. If the model has one head
and w is 1, L is the usual next-token loss.
"""

from dataclasses import replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations, clip_weights, mean_one_scale
from wmtp.data.collate import IGNORED, Batch
from wmtp.distributed.process_group import Processes
from wmtp.errors import TrainingError
from wmtp.models.mtp import MtpModel, Outputs
from wmtp.objectives.value_loss import ValueLoss, value_metrics
from wmtp.ops.cross_entropy import cross_entropy, weighted_cross_entropy
from wmtp.ops.metric_sums import MetricSums, standard_deviation
from wmtp.ops.targets import position_weights, shift_to_heads, targets

WeightedSum: TypeAlias = tuple[
    Float[Tensor, ""], Float[Tensor, "head batch position"], Float[Tensor, "head batch position"]
]
"""Σ v·w·CE, and the loss and the weight of every target. Losses and weights have no gradient."""


class MtpObjective:
    """An objective that uses the weights of an algorithm in training and uniform weights in validation.

    The validation loss does not depend on the algorithm, so runs with different algorithms can be compared.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm
        self.value_loss = ValueLoss("reward")

    @property
    def name(self) -> str:
        """The name of the algorithm."""
        return self.algorithm.name

    def denominators(self, model: MtpModel, batch: Batch) -> Float[Tensor, " part"]:
        """Return Σ v and the number of trained values.

        Σ v is the number of positions at which at least one head has a target.
        """
        valid = targets(batch.labels, model.num_heads) != IGNORED
        return torch.stack([valid.any(dim=0).sum(), self.value_loss.denominator(batch)]).float()

    def check_denominators(self, denominators: Float[Tensor, " part"]) -> None:
        """Check that the update has at least one target.

        Raises:
            TrainingError: every label of the update is masked.
        """
        if not denominators[0]:
            raise TrainingError("no token of the update is a target: every label is masked, so there is no loss")

    def loss(self, model: MtpModel, batch: Batch, denominators: Float[Tensor, " part"]) -> tuple[Tensor, MetricSums]:
        """Return the loss and the metric sums.

        The loss is Σ v·w·CE / Σ v. If the model has a value head, the value loss times its coefficient is added.
        """
        outputs = model(batch.tokens)
        loss, sums = self.loss_from_outputs(outputs, model, batch, denominators)
        if outputs.values is not None:
            value_sum, value_sums = self.value_loss.sum(outputs.values, batch)
            loss = loss + self.algorithm.value_coef * value_sum / denominators[1]
            sums.add(value_sums)
        return loss, sums

    def loss_from_outputs(
        self, outputs: Outputs, model: MtpModel, batch: Batch, denominators: Float[Tensor, " part"]
    ) -> tuple[Tensor, MetricSums]:
        """Return the loss Σ v·w·CE / Σ v and the metric sums, computed from model outputs."""
        target = targets(batch.labels, model.num_heads)
        valid = target != IGNORED
        shares = position_weights(valid)
        total, losses, weights = self._weighted_sum(outputs, model, batch, target, shares)

        sums = head_sums(losses, valid)
        share_sum = shares.sum()
        sums.means["loss"] = (total.detach(), share_sum)
        sums.means["weight_mean"] = ((shares * weights).sum(), share_sum)
        sums.means["weight_square"] = ((shares * weights.square()).sum(), share_sum)
        sums.means["valid_target_ratio"] = (valid.sum(), torch.tensor(batch.num_tokens * len(valid)))
        sums.minima["weight_min"] = weights.where(valid, torch.inf).amin()
        sums.maxima["weight_max"] = weights.where(valid, -torch.inf).amax()
        return total / denominators[0], sums

    def _weighted_sum(
        self, outputs: Outputs, model: MtpModel, batch: Batch, target: Tensor, shares: Tensor
    ) -> WeightedSum:
        """Return Σ v·w·CE, and the losses and weights of all targets. `shares` contains the position weights v."""
        observed = self.observations(outputs, batch, target)
        kinds = {"none": self._sum_without_losses, "own": self._sum_with_own_losses, "all": self._sum_with_all_losses}
        weighted_sum = kinds[self.algorithm.uses_losses]
        return weighted_sum(outputs.states, model.unembedding_weight, target, shares, observed)

    def _sum_without_losses(
        self, states: Tensor, unembedding: Tensor, target: Tensor, shares: Tensor, observed: Observations
    ) -> WeightedSum:
        """Compute the weights first, because they depend on no loss, and then everything else in one pass."""
        weights = self._clipped(observed)
        weights = weights * mean_one_scale(weights, shares)
        factors = (shares * weights).flatten()
        total, losses, _ = weighted_cross_entropy(states, unembedding, target, lambda losses, rows: factors[rows])
        return total, losses, weights

    def _sum_with_own_losses(
        self, states: Tensor, unembedding: Tensor, target: Tensor, shares: Tensor, observed: Observations
    ) -> WeightedSum:
        """Compute losses and weights in one pass, chunk by chunk. The scale of the weights is known at the end."""
        flat_shares, reference_losses = shares.flatten(), observed.reference_losses

        def _coefficients(losses: Tensor, rows: Tensor) -> Tensor:
            """Return the coefficient v·w of each row of a chunk, given the losses of the rows."""
            reference = None if reference_losses is None else reference_losses.flatten()[rows]
            valid = torch.ones_like(losses, dtype=torch.bool)
            inputs = Observations(valid, observed.response, losses, reference, number=observed.number)
            return flat_shares[rows] * self._clipped(inputs)

        total, losses, products = weighted_cross_entropy(states, unembedding, target, _coefficients)
        weights = products / shares.where(shares > 0, 1.0)
        scale = mean_one_scale(weights, shares)
        return total * scale, losses, weights * scale

    def _sum_with_all_losses(
        self, states: Tensor, unembedding: Tensor, target: Tensor, shares: Tensor, observed: Observations
    ) -> WeightedSum:
        """Compute the losses in a pass of their own, then the weights, and then the gradients in a second pass.

        The second pass leaves out the targets with weight 0, unless their loss is not finite.
        """
        losses = cross_entropy(states.detach(), unembedding.detach(), target)
        weights = self._clipped(replace(observed, losses=losses))
        weights = weights * mean_one_scale(weights, shares)
        factors = (shares * weights).flatten()
        trained = target.masked_fill((weights == 0) & losses.isfinite(), IGNORED)
        total, _, _ = weighted_cross_entropy(states, unembedding, trained, lambda losses, rows: factors[rows])
        return total, losses, weights

    def _clipped(self, observed: Observations) -> Tensor:
        """Return the weights of the algorithm, clipped to its range."""
        algorithm = self.algorithm
        return clip_weights(algorithm.weights(observed), observed.valid, algorithm.weight_min, algorithm.weight_max)

    def observations(self, outputs: Outputs, batch: Batch, target: Tensor) -> Observations:
        """Return the inputs of the algorithm, except the losses of the policy.

        Args:
            outputs: the outputs of the model.
            batch: the micro-batch.
            target: the targets of all heads. The shape is [head, batch, position].
        """
        reference = None
        if self.algorithm.needs_reference:
            assert batch.reference_losses is not None
            reference = shift_to_heads(batch.reference_losses, len(target), 0.0)
        values = outputs.values.detach() if self.algorithm.needs_values and outputs.values is not None else None
        return Observations(
            target != IGNORED, batch.response, reference_losses=reference, values=values, rewards=batch.rewards,
            number=batch.number, harmful=batch.harmful,
        )  # fmt: skip

    @torch.no_grad()
    def token_metrics(self, model: MtpModel, batch: Batch) -> Float[Tensor, "batch position metric"]:
        """Return the weight, the loss and the value of each token.

        The weight is the mean of the weights of all heads that predict the token. The loss is the loss of head 1. The
        value is the output of the value head after the token. All three are NaN at tokens that are not targets. If the
        model has no value head, all values are NaN.
        """
        target, outputs = targets(batch.labels, model.num_heads), model(batch.tokens)
        _, losses, weights = self._weighted_sum(outputs, model, batch, target, position_weights(target != IGNORED))
        total, count = torch.zeros_like(weights[0]), torch.zeros_like(weights[0])
        for k in range(1, len(weights) + 1):
            total[:, k:] += weights[k - 1, :, :-k]
            count[:, k:] += target[k - 1, :, :-k] != IGNORED
        undefined = torch.full_like(total, torch.nan)
        loss, values = undefined.clone(), undefined if outputs.values is None else outputs.values.float()
        loss[:, 1:] = losses[0, :, :-1]
        return torch.stack([total / count, *(x.where(batch.response, undefined) for x in (loss, values))], dim=-1)

    def evaluate(self, model: MtpModel, batch: Batch) -> MetricSums:
        """Return the metric sums of the unweighted loss, the loss of each head, and the values."""
        outputs = model(batch.tokens)
        sums = self.evaluate_outputs(outputs, model, batch)
        if outputs.values is not None:
            sums.add(self.value_loss.sum(outputs.values, batch)[1])
        return sums

    def evaluate_outputs(self, outputs: Outputs, model: MtpModel, batch: Batch) -> MetricSums:
        """Return the metric sums of the unweighted loss and the loss of each head, computed from model outputs.

        The sums include the probabilities of correct solutions, see `canonical_sums`. If the harmful tokens of the
        batch are known, they also include `clean_loss`. It is the loss on all tokens of correct solutions except noise.
        """
        target = targets(batch.labels, model.num_heads)
        valid = target != IGNORED
        shares = position_weights(valid)
        losses = cross_entropy(outputs.states, model.unembedding_weight, target)
        sums = head_sums(losses, valid)
        sums.means["loss"] = ((shares * losses).sum(), shares.sum())
        sums.add(canonical_sums(losses[0], valid[0], batch))
        if batch.harmful is not None:
            clean = shift_to_heads(batch.is_correct[:, None] & ~batch.harmful, model.num_heads, 0) * shares
            sums.means["clean_loss"] = ((clean * losses).sum(), clean.sum())
        return sums

    def metrics(self, sums: MetricSums) -> dict[str, float]:
        """Return the loss, the loss of each head, their mean (`mtp_loss`), and statistics of weights and values."""
        values = value_metrics(sums.results())
        heads = [value for name, value in values.items() if name.startswith("head_")]
        values["mtp_loss"] = sum(heads) / len(heads)
        if "weight_square" in values:
            values["weight_std"] = standard_deviation(values["weight_mean"], values.pop("weight_square"))
        return values

    def finish_update(self, processes: Processes) -> None:
        """Update the state of the algorithm."""
        self.algorithm.finish_update(processes)

    def discard_update(self) -> None:
        """Discard the statistics that the algorithm has of an update that was skipped."""
        self.algorithm.discard_update()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the algorithm."""
        return self.algorithm.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the algorithm."""
        self.algorithm.load_state_dict(state)


def head_sums(losses: Tensor, valid: Tensor) -> MetricSums:
    """Return the metric sums `head_1_loss`, `head_2_loss`, …, from which the mean loss of each head is computed.

    Args:
        losses: the cross-entropy in nats, or 0 where there is no target. The shape is [head, batch, position].
        valid: True where there is a target. The shape is [head, batch, position].
    """
    loss_sums, counts = losses.flatten(1).sum(dim=1), valid.flatten(1).sum(dim=1)
    return MetricSums({f"head_{k}_loss": (loss_sums[k - 1], counts[k - 1]) for k in range(1, len(valid) + 1)})


def canonical_sums(
    losses: Float[Tensor, "batch position"], valid: Bool[Tensor, "batch position"], batch: Batch
) -> MetricSums:
    """Return the metric sums `canonical_logprob` and `canonical_probability`, which are means over correct solutions.

    They are the sum of log p over the tokens of a solution, and the exponential of that sum, which is the probability
    that sampling writes exactly this solution. Noise tokens are left out if they are known, because their text is
    random. A batch without correct solutions has counts of 0.

    Args:
        losses: the cross-entropy of head 1 in nats.
        valid: True where head 1 has a target.
        batch: the validation batch.
    """
    counted = valid & batch.is_correct[:, None]
    if batch.harmful is not None:
        counted &= ~shift_to_heads(batch.harmful, 1, 0)[0]  # in correct solutions, these are the noise tokens
    solutions = counted.any(dim=1)
    logprobs, count = -losses.where(counted, 0.0).sum(dim=1), solutions.sum()
    probabilities = logprobs.exp().where(solutions, 0.0)
    return MetricSums(
        {"canonical_logprob": (logprobs.sum(), count), "canonical_probability": (probabilities.sum(), count)}
    )
