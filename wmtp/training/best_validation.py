"""The validation that chooses the best checkpoint."""

from typing import Any

from wmtp.errors import TrainingError
from wmtp.tracking.directions import is_improvement
from wmtp.training.early_stopping import monitor_problem


class BestValidation:
    """The step and the metrics of the validation with the best value of the metric `metric`."""

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.step: int | None = None
        self.metrics: dict[str, float] = {}

    def observe(self, step: int, metrics: dict[str, float]) -> bool:
        """Record the metrics of a validation after update `step`, and return whether it is the best so far.

        Of validations with equal values of the metric, the one with the lowest loss is the best.

        Raises:
            TrainingError: no validation has measured the metric.
        """
        best = self.metrics.get(self.metric)
        if self.metric not in metrics:
            if best is None:
                problem = monitor_problem(self.metric, metrics)
                raise TrainingError(f"after update {step}, early_stopping.monitor={self.metric}: {problem}")
            return False
        value = metrics[self.metric]
        is_best = is_improvement(self.metric, value, best)
        if value == best:
            is_best = metrics["val/loss"] < self.metrics["val/loss"]
        if is_best:
            self.step, self.metrics = step, metrics
        return is_best

    def summary(self) -> dict[str, float]:
        """Return the loss and the metric that chose this validation."""
        return {name: self.metrics[name] for name in sorted({"val/loss", self.metric}) if name in self.metrics}

    def state_dict(self) -> dict[str, Any]:
        """Return the step and the metrics."""
        return {"best_step": self.step, "best": self.metrics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the step and the metrics, even if another metric chose them."""
        best_loss = state.get("best_loss")  # earlier versions saved it instead of `best`
        self.step = state["best_step"]
        self.metrics = state.get("best") or ({} if best_loss is None else {"val/loss": best_loss})
