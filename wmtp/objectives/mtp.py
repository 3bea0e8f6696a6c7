"""Weighted multi-token prediction: L = Σ v·w·CE / Σ v over one update.

The sums are over all heads k and positions t. v is the share of the target (see `ops.targets.target_shares`), w is the
algorithm's weight, and CE is the cross-entropy of head k at position t in nats. If the model has one head
and w is 1, L is the usual next-token loss.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations, clip_weights
from wmtp.data.collate import IGNORED, Batch
from wmtp.distributed.process_group import Processes
from wmtp.errors import TrainingError
from wmtp.models.mtp import MtpModel, Outputs
from wmtp.objectives.base import PreparedBatch, total_denominators
from wmtp.objectives.loss_history import LossHistory
from wmtp.objectives.policy_sums import canonical_sums, head_sums, reference_sums
from wmtp.objectives.value_loss import ValueLoss, value_metrics
from wmtp.objectives.weighting import normalized_weights, weight_scales
from wmtp.ops.cross_entropy import Chunk, RowFunction, cross_entropy, row_statistics, weighted_cross_entropy
from wmtp.ops.metric_sums import MetricSums, standard_deviation
from wmtp.ops.targets import Shares, mean_over_heads, shift_to_heads, target_shares, targets

SINGLE_PROCESS = Processes.single_process()

WeightedSum: TypeAlias = tuple[
    Float[Tensor, ""], Float[Tensor, "head batch position"], Float[Tensor, "head batch position"]
]
"""Σ v·w·CE, and the loss and the weight of every target. Losses and weights have no gradient."""


def describe_shares(shares: Shares) -> str:
    """Return a suffix for the name of an objective, which is empty for the default."""
    return "" if shares == "position" else f", {shares} shares"


class MtpObjective:
    """An objective that uses the weights of an algorithm in training and uniform weights in validation.

    The validation loss does not depend on the algorithm, so runs with different algorithms can be compared.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        value_loss: ValueLoss | None = None,
        history: LossHistory | None = None,
        *,
        shares: Shares = "position",
    ) -> None:
        """Create the objective.

        Args:
            algorithm: the algorithm.
            value_loss: the loss of the value head, if the model has one. It is that of stage 1, if there is a stage 1.
            history: the losses of the previous epoch, if the algorithm needs them.
            shares: the influence of targets in training, see `ops.targets.target_shares`.
        """
        assert history is not None or not algorithm.needs_previous_losses
        self.algorithm, self.shares = algorithm, shares
        self.value_loss, self.history = value_loss or ValueLoss(), history

    @property
    def name(self) -> str:
        """The name of the algorithm, and the kind of shares if it is not the default."""
        return f"{self.algorithm.name}{describe_shares(self.shares)}"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the algorithm."""
        return self.algorithm.settings

    def prepare(
        self, model: MtpModel, batches: Sequence[Batch], processes: Processes = SINGLE_PROCESS
    ) -> list[PreparedBatch]:
        """Return the micro-batches with the denominators of the update, and with weights if there are several.

        The weights of a micro-batch depend on all micro-batches of the update. If the algorithm needs outputs of the
        model, they are computed in an additional forward pass without gradient.

        Raises:
            TrainingError: every label of the update is masked.
        """
        denominators = total_denominators([self.denominators(model, batch) for batch in batches], processes)
        if not denominators["targets"]:
            raise TrainingError("no token of the update is a target: every label is masked, so there is no loss")
        if self.history is not None:
            self.history.begin_update(batches[0])
        weights: Sequence[Tensor | None] = [None]
        if len(batches) > 1:
            observed = [self._observe(model, batch) for batch in batches]
            shares = [target_shares(each.valid, self.shares) for each in observed]
            weights = normalized_weights(self.algorithm, observed, shares, processes)
        return [
            PreparedBatch(batch, denominators, processes, weight)
            for batch, weight in zip(batches, weights, strict=True)
        ]

    def denominators(self, model: MtpModel, batch: Batch) -> dict[str, Tensor]:
        """Return Σ v and the number of terms of the value loss for one micro-batch."""
        valid = targets(batch.labels, model.num_heads) != IGNORED
        total = valid.sum() if self.shares == "target" else valid.any(dim=0).sum()
        return {"targets": total, "values": self.value_loss.denominator(batch)}

    def forward(self, model: MtpModel, batch: Batch) -> Outputs:
        """Return the outputs of the model for a micro-batch."""
        outputs: Outputs = model(batch.tokens)
        return outputs

    def loss(self, model: MtpModel, prepared: PreparedBatch) -> tuple[Tensor, MetricSums]:
        """Return the loss and the metric sums.

        The loss is Σ v·w·CE / Σ v. If the model has a value head, the value loss times its coefficient is added.
        """
        outputs = self.forward(model, prepared.batch)
        loss, sums = self.loss_from_outputs(outputs, model, prepared)
        if outputs.values is not None:
            value_sum, value_sums = self.value_loss.sum(outputs.values, prepared.batch)
            loss = loss + self.algorithm.value_coef * value_sum / prepared.denominators["values"].clamp(min=1)
            sums.add(value_sums)
        return loss, sums

    def loss_from_outputs(
        self, outputs: Outputs, model: MtpModel, prepared: PreparedBatch
    ) -> tuple[Tensor, MetricSums]:
        """Return the loss Σ v·w·CE / Σ v and the metric sums, computed from model outputs."""
        batch = prepared.batch
        target = targets(batch.labels, model.num_heads)
        valid = target != IGNORED
        shares = target_shares(valid, self.shares)
        total, losses, weights = self._weighted_sum(outputs, model, prepared, target, shares)
        if self.history is not None:
            self.history.record(batch, losses.masked_fill(~valid, torch.nan))

        sums = head_sums(losses, valid)
        share_sum = shares.sum()
        sums.means["loss"] = (total.detach(), share_sum)
        sums.means["weight_mean"] = ((shares * weights).sum(), share_sum)
        sums.means["weight_square"] = ((shares * weights.square()).sum(), share_sum)
        sums.means["valid_target_ratio"] = (valid.sum(), torch.tensor(batch.num_tokens * len(valid)))
        sums.minima["weight_min"] = weights.where(valid, torch.inf).amin()
        sums.maxima["weight_max"] = weights.where(valid, -torch.inf).amax()
        return total / prepared.denominators["targets"], sums

    def _weighted_sum(
        self, outputs: Outputs, model: MtpModel, prepared: PreparedBatch, target: Tensor, shares: Tensor
    ) -> WeightedSum:
        """Return Σ v·w·CE, and the losses and weights of all targets. `shares` contains the shares v."""
        states, unembedding, algorithm = outputs.states, model.unembedding_weight, self.algorithm
        weights, losses = prepared.weights, None
        if weights is None:
            observed = self._observations(prepared.batch, target, outputs.values)
            if algorithm.uses_losses == "own":
                return self._sum_with_own_losses(states, unembedding, target, shares, observed, prepared.processes)
            if algorithm.uses_losses == "all":
                observed = self._with_losses(observed, states, unembedding, target)
                losses = observed.losses
            (weights,) = normalized_weights(algorithm, [observed], [shares], prepared.processes)
        factors = (shares * weights).flatten()
        if losses is not None:  # leave out the targets with weight 0, unless their loss is not finite
            target = target.masked_fill((weights == 0) & losses.isfinite(), IGNORED)
        total, new_losses, _ = weighted_cross_entropy(states, unembedding, target, lambda chunk: factors[chunk.rows])
        return total, new_losses if losses is None else losses, weights

    def _sum_with_own_losses(
        self,
        states: Tensor,
        unembedding: Tensor,
        target: Tensor,
        shares: Tensor,
        observed: Observations,
        processes: Processes,
    ) -> WeightedSum:
        """Compute losses and weights in one pass, chunk by chunk. The scales of the weights are known at the end."""
        flat_shares, reference_losses = shares.flatten(), observed.reference_losses
        previous_losses = observed.previous_losses

        def _coefficients(chunk: Chunk) -> Tensor:
            """Return the coefficient v·w of each row of a chunk, before the scaling."""
            reference = None if reference_losses is None else reference_losses.flatten(1)[:, chunk.rows]
            previous = None if previous_losses is None else previous_losses.flatten()[chunk.rows]
            valid = torch.ones_like(chunk.losses, dtype=torch.bool)
            algorithm = self.algorithm
            entropies = None if algorithm.entropy_top_k is None else chunk.top_entropies(algorithm.entropy_top_k)
            inputs = replace(
                observed, valid=valid, losses=chunk.losses, entropies=entropies, reference_losses=reference,
                previous_losses=previous,
            )  # fmt: skip
            weights = clip_weights(algorithm.weights(inputs), valid, algorithm.weight_min, algorithm.weight_max)
            return flat_shares[chunk.rows] * weights

        totals, losses, products = weighted_cross_entropy(
            states, unembedding, target, _coefficients, by_head=self.algorithm.rescale
        )
        weights = products / shares.where(shares > 0, 1.0)
        scales = weight_scales(self.algorithm, [weights], [shares], processes)
        total = (totals * scales).sum() if self.algorithm.rescale else totals
        return total, losses, weights * scales[:, None, None]

    @torch.no_grad()
    def _observe(self, model: MtpModel, batch: Batch) -> Observations:
        """Return all inputs of the algorithm for a micro-batch. The model runs only if the algorithm needs outputs."""
        target, algorithm = targets(batch.labels, model.num_heads), self.algorithm
        if algorithm.uses_losses == "none":
            values = model(batch.tokens, num_heads=0).values if algorithm.needs_values else None
            return self._observations(batch, target, values)
        outputs = self.forward(model, batch)
        observed = self._observations(batch, target, outputs.values)
        return self._with_losses(observed, outputs.states, model.unembedding_weight, target)

    def _with_losses(self, observed: Observations, states: Tensor, unembedding: Tensor, target: Tensor) -> Observations:
        """Return the observations with the losses of all targets and, if the algorithm needs them, the entropies."""
        functions: list[RowFunction] = [lambda chunk: chunk.losses]
        if (top_k := self.algorithm.entropy_top_k) is not None:
            functions.append(lambda chunk: chunk.top_entropies(top_k))
        losses, *entropies = row_statistics(states, unembedding, target, functions)
        return replace(observed, losses=losses, entropies=entropies[0] if entropies else None)

    def _observations(self, batch: Batch, target: Tensor, value_outputs: Tensor | None) -> Observations:
        """Return the inputs of the algorithm, except the losses of the policy.

        Args:
            batch: the micro-batch.
            target: the targets of all heads. The shape is [head, batch, position].
            value_outputs: the outputs of the value head, or None if the model has none.
        """
        reference, history = None, self.history
        if self.algorithm.needs_reference:
            assert batch.reference_losses is not None
            reference = shift_to_heads(batch.reference_losses, len(target), 0.0).movedim(-1, 0)
        rewards, values = batch.rewards, None
        if self.algorithm.needs_values and value_outputs is not None:
            values = self.value_loss.values(value_outputs.detach())
            rewards = self.value_loss.final_values(values, batch)
        return Observations(
            target != IGNORED, batch.response, reference_losses=reference, values=values, rewards=rewards,
            previous_losses=None if history is None else history.previous(batch, len(target)),
            harmful=batch.harmful, number=batch.number, samples=batch.samples,
        )  # fmt: skip

    @torch.no_grad()
    def token_metrics(self, model: MtpModel, batch: Batch) -> Float[Tensor, "batch position metric"]:
        """Return the weight, the loss, the value and the unclipped weight of each token.

        The weight is the mean of the weights of all heads that predict the token. The loss is the loss of head 1. The
        value is the output of the value head after the token. The unclipped weight is like the weight, but without the
        limits `weight_min` and `weight_max`. All four are NaN at tokens that are not targets. If the model has no value
        head, all values are NaN.
        """
        target, outputs = targets(batch.labels, model.num_heads), self.forward(model, batch)
        observed = self._observations(batch, target, outputs.values)
        observed = self._with_losses(observed, outputs.states, model.unembedding_weight, target)
        assert observed.losses is not None
        (raw,) = self.algorithm.update_weights([observed], SINGLE_PROCESS)
        clipped = clip_weights(raw, observed.valid, self.algorithm.weight_min, self.algorithm.weight_max)
        shares = target_shares(observed.valid, self.shares)
        scales = weight_scales(self.algorithm, [clipped], [shares], SINGLE_PROCESS)[:, None, None]
        undefined = torch.full(batch.tokens.shape, torch.nan, device=batch.tokens.device)
        loss, values = undefined.clone(), undefined
        loss[:, 1:] = observed.losses[0, :, :-1]
        if outputs.values is not None:
            values = self.value_loss.values(outputs.values)
        weight, unclipped = (mean_over_heads(each * scales, observed.valid) for each in (clipped, raw.detach().float()))
        return torch.stack([weight, *(x.where(batch.response, undefined) for x in (loss, values)), unclipped], dim=-1)

    def evaluate(self, model: MtpModel, batch: Batch) -> MetricSums:
        """Return the metric sums of the unweighted loss, the loss of each head, and the values."""
        outputs = self.forward(model, batch)
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
        shares = target_shares(valid)
        losses = cross_entropy(outputs.states, model.unembedding_weight, target)
        sums = head_sums(losses, valid)
        sums.means["loss"] = ((shares * losses).sum(), shares.sum())
        sums.add(canonical_sums(losses[0], valid[0], batch))
        if self.algorithm.needs_better_reference:
            column = self.algorithm.references.index("reference")
            sums.add(reference_sums(losses[0], valid[0], batch, column))
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

    def finish_update(self) -> None:
        """Update the state of the algorithm."""
        self.algorithm.finish_update()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the algorithm and the losses of the previous epoch. All ranks must call this method."""
        return self.algorithm.state_dict() | ({} if self.history is None else self.history.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        self.algorithm.load_state_dict(state)
        if self.history is not None:
            self.history.load_state_dict(state)
