"""The loss and the metrics of a value head, in stage 1 and in stage 2."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from wmtp.data.collate import Batch
from wmtp.ops.metric_sums import MetricSums, standard_deviation
from wmtp.ops.returns import (
    explained_variance,
    last_of_response,
    ranking_loss,
    token_rewards,
    value_positions,
    value_targets,
)

Kind = Literal["cross_entropy", "reward", "lambda_return", "ranking"]


class ValueLoss:
    """A loss for value heads. It also defines which value an output of the head stands for.

    - "cross_entropy": the cross-entropy of the reward, which must be between 0 and 1. The output is the logit of the
      value.
    - "reward", "lambda_return": the squared difference between the value and the reward or λ-return. The output is the
      value.
    - "ranking": low if the values of a correct solution are higher than those of an incorrect solution to the same
      task, from the first token on at which the two differ. The output is the value, which is a score and no estimate
      of the reward.
    """

    def __init__(self, kind: Kind = "cross_entropy", discount: float = 1.0, trace_decay: float = 0.95) -> None:
        """Create the loss. `discount` is γ and `trace_decay` is λ. They are used only for the λ-return."""
        self.kind, self.discount, self.trace_decay = kind, discount, trace_decay

    def values(self, outputs: Float[Tensor, "batch position"]) -> Float[Tensor, "batch position"]:
        """Return the values that the outputs of a value head stand for."""
        return outputs.sigmoid() if self.kind == "cross_entropy" else outputs

    def final_values(self, values: Float[Tensor, "batch position"], batch: Batch) -> Float[Tensor, " batch"]:
        """Return the value of each complete solution, which the TD error at its last token uses.

        This is the reward, or the value after the last token if the values are no estimates of the reward.
        """
        if self.kind == "ranking":
            return (values * last_of_response(batch.response)).sum(dim=1)
        return batch.rewards

    def first_output(self, mean_reward: float) -> float:
        """Return the output of a new head, which stands for the mean reward."""
        if self.kind == "ranking":
            return 0.0
        if self.kind == "cross_entropy":
            share = min(max(mean_reward, 1e-3), 1 - 1e-3)
            return math.log(share / (1 - share))
        return mean_reward

    def denominator(self, batch: Batch) -> Tensor:
        """Return the number of terms of the loss. A term is a position with a trained value, or a pair for ranking."""
        if self.kind == "ranking":
            return self._ranking(torch.zeros_like(batch.labels, dtype=torch.float32), batch)[1]
        return value_positions(batch.response).sum()

    def sum(self, outputs: Float[Tensor, "batch position"], batch: Batch) -> tuple[Float[Tensor, ""], MetricSums]:
        """Return the sum of all terms of the loss, and the metric sums of values and rewards."""
        values, mask = self.values(outputs), value_positions(batch.response)
        reward = batch.rewards[:, None].expand_as(mask)[mask]
        if self.kind == "ranking":
            loss, count = self._ranking(values, batch)
        elif self.kind == "cross_entropy":
            loss = F.binary_cross_entropy_with_logits(outputs[mask], reward, reduction="sum")
            count = mask.sum()
        else:
            target = value_targets(
                values, token_rewards(batch.rewards, batch.response), batch.response,
                kind=self.kind, discount=self.discount, trace_decay=self.trace_decay,
            )  # fmt: skip
            loss, count = (values - target)[mask].square().sum(), mask.sum()
        value = values.detach()[mask]
        error = reward - value
        sums = MetricSums({"value_loss": (loss.detach(), count)})
        for name, x in (("value", value), ("value_target", reward), ("value_error", error)):
            sums.means[f"{name}_mean"] = (x.sum(), mask.sum())
            sums.means[f"{name}_square"] = (x.square().sum(), mask.sum())
        return loss, sums

    def _ranking(self, values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        return ranking_loss(values, batch.tokens, batch.response, batch.tasks, batch.is_correct)


def value_metrics(values: dict[str, float]) -> dict[str, float]:
    """Replace the moments of values, targets and errors by three metrics, and keep all other metrics.

    The three metrics are `value_mean`, `value_variance` and `value_explained_variance`.
    """
    if "value_mean" not in values:
        return values
    moments = {
        name: (values[f"{name}_mean"], values[f"{name}_square"]) for name in ("value", "value_target", "value_error")
    }
    replaced = {f"{name}_{power}" for name in moments for power in ("mean", "square")}
    others = {name: value for name, value in values.items() if name not in replaced}
    return others | {
        "value_mean": moments["value"][0],
        "value_variance": standard_deviation(*moments["value"]) ** 2,
        "value_explained_variance": explained_variance(*moments["value_target"], *moments["value_error"]),
    }
