"""The objective of stage 1 of implicit_reward, which trains a language model to be a reward model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from wmtp.data.collate import IGNORED, Batch
from wmtp.distributed.process_group import Processes
from wmtp.errors import TrainingError
from wmtp.models.mtp import MtpModel, Outputs
from wmtp.objectives.base import PreparedBatch, total_denominators
from wmtp.objectives.mtp import SINGLE_PROCESS
from wmtp.ops.cross_entropy import cross_entropy, weighted_cross_entropy
from wmtp.ops.metric_sums import MetricSums
from wmtp.ops.targets import shift_to_heads, targets


class ImplicitRewardObjective:
    """The cross-entropy of the reward R and σ(s), with s = beta · Σ (log p − log p_start) over a solution's tokens.

    log p_start is the cached loss of the model before its training (`Batch.reference_losses`). The mean is over
    solutions. Only head 1 is used. R must be between 0 and 1.
    """

    settings: Mapping[str, Any] = {}

    def __init__(self, beta: float) -> None:
        """Create the objective. `beta` is the coefficient of the summed log-ratio."""
        self.beta = beta

    @property
    def name(self) -> str:
        """The name of the loss and its coefficient."""
        return f"implicit reward, beta {self.beta:g}"

    def prepare(
        self, model: MtpModel, batches: Sequence[Batch], processes: Processes = SINGLE_PROCESS
    ) -> list[PreparedBatch]:
        """Return the micro-batches with the number of solutions of the update.

        Raises:
            TrainingError: no sample of the update has a target.
        """
        denominators = total_denominators([{"solutions": self._solutions(batch).sum()} for batch in batches], processes)
        if not denominators["solutions"]:
            raise TrainingError("no token of the update is a target: every label is masked, so there is no loss")
        return [PreparedBatch(batch, denominators, processes) for batch in batches]

    def loss(self, model: MtpModel, prepared: PreparedBatch) -> tuple[Tensor, MetricSums]:
        """Return the contribution of a micro-batch to the loss, and the metric sums.

        The gradient of the loss with respect to the loss of a token is beta · (R − σ(s)). It is the coefficient of the
        token in a weighted cross-entropy, so the logits of all tokens never exist at the same time.
        """
        batch, outputs = prepared.batch, self._forward(model, prepared.batch)
        target, unembedding = targets(batch.labels, 1), model.unembedding_weight
        losses = cross_entropy(outputs.states.detach(), unembedding.detach(), target)
        scores = self._scores(losses, batch)
        coefficients = self.beta * (batch.rewards - scores.sigmoid())
        factors = coefficients[:, None].expand(batch.tokens.shape).flatten()
        total, _, _ = weighted_cross_entropy(
            outputs.states, unembedding, target, lambda chunk: factors[chunk.rows].to(chunk.losses)
        )
        sums = self._sums(scores, batch)
        value = sums.means["loss"][0]
        return (total - total.detach() + value) / prepared.denominators["solutions"], sums

    def evaluate(self, model: MtpModel, batch: Batch) -> MetricSums:
        """Return the metric sums of a validation batch."""
        outputs = self._forward(model, batch)
        losses = cross_entropy(outputs.states, model.unembedding_weight, targets(batch.labels, 1))
        return self._sums(self._scores(losses, batch), batch)

    def metrics(self, sums: MetricSums) -> dict[str, float]:
        """Return the loss, and the share of solutions whose reward is on the same side of one half as σ(s)."""
        return sums.results()

    def finish_update(self) -> None:
        """Do nothing, because this objective has no state between updates."""

    def state_dict(self) -> dict[str, Any]:
        """Return an empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing, because the state is empty."""

    def _forward(self, model: MtpModel, batch: Batch) -> Outputs:
        outputs: Outputs = model(batch.tokens, num_heads=1)
        return outputs

    def _solutions(self, batch: Batch) -> Tensor:
        return (targets(batch.labels, 1)[0] != IGNORED).any(dim=1)

    def _scores(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return s of each sample. `losses` is the loss of head 1, shape [1, batch, position]."""
        assert batch.reference_losses is not None
        start = shift_to_heads(batch.reference_losses[..., 0], 1, 0.0)[0]
        valid = targets(batch.labels, 1)[0] != IGNORED
        return self.beta * (start - losses[0]).where(valid, 0.0).sum(dim=1)

    def _sums(self, scores: Tensor, batch: Batch) -> MetricSums:
        solutions = self._solutions(batch)
        count = solutions.sum()
        losses = F.binary_cross_entropy_with_logits(scores, batch.rewards, reduction="none")
        agrees = ((scores > 0) == (batch.rewards > 0.5)) & solutions
        return MetricSums(
            {"loss": (losses.where(solutions, 0.0).sum(), count), "reward_accuracy": (agrees.sum(), count)}
        )
