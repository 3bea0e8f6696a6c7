"""The loss and the metrics of a value head, in stage 1 and in stage 2."""

from typing import Literal

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

Kind = Literal["reward", "lambda_return", "ranking"]


class ValueLoss:
    """A loss for value heads: the squared error of values, or a ranking loss of the values at the last tokens.

    If `kind` is "reward" or "lambda_return", the loss is the squared difference between the value and the reward or
    λ-return. If `kind` is "ranking", the loss is low if the value after a correct solution is higher than the value
    after an incorrect solution of the same task.
    """

    def __init__(self, kind: Kind = "reward", discount: float = 1.0, trace_decay: float = 0.95) -> None:
        """Create the loss. `discount` is γ and `trace_decay` is λ. They are used only for the λ-return."""
        self.kind, self.discount, self.trace_decay = kind, discount, trace_decay

    def denominator(self, batch: Batch) -> Tensor:
        """Return the number of terms of the loss. A term is a position with a trained value, or a pair for ranking."""
        if self.kind == "ranking":
            return ranking_loss(batch.rewards, batch.tasks, batch.is_correct)[1]
        return value_positions(batch.response).sum()

    def sum(self, values: Float[Tensor, "batch position"], batch: Batch) -> tuple[Float[Tensor, ""], MetricSums]:
        """Return the sum of all terms of the loss, and the metric sums of values and rewards."""
        rewards = token_rewards(batch.rewards, batch.response)
        mask = value_positions(batch.response)
        if self.kind == "ranking":
            is_last = last_of_response(batch.response)
            loss, count = ranking_loss((values * is_last).sum(dim=1), batch.tasks, batch.is_correct)
        else:
            target = value_targets(
                values, rewards, batch.response,
                kind=self.kind, discount=self.discount, trace_decay=self.trace_decay,
            )  # fmt: skip
            loss, count = (values - target)[mask].square().sum(), mask.sum()
        reward = batch.rewards[:, None].expand_as(mask)[mask]
        value = values.detach()[mask]
        error = reward - value
        sums = MetricSums({"value_loss": (loss.detach(), count)})
        for name, x in (("value", value), ("value_target", reward), ("value_error", error)):
            sums.means[f"{name}_mean"] = (x.sum(), mask.sum())
            sums.means[f"{name}_square"] = (x.square().sum(), mask.sum())
        return loss, sums


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
