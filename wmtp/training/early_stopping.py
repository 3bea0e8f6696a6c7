"""Early stopping, which ends a run before its last planned update if its metrics meet a criterion."""

import math
from collections import deque
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Field

from wmtp.errors import InputError, TrainingError
from wmtp.field_types import Positive, PositiveFloat
from wmtp.tracking.directions import is_improvement, is_lower_better

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]


class EarlyStopping:
    """Early stopping with three optional criteria.

    - *converged*: none of the last `patience` measurements of the metric `monitor` is an improvement. A measurement is
      an improvement if it is the first finite one, or if it is better than the previous improvement by more than
      `min_delta`. Whether lower or higher values are better depends on the metric (see `tracking.directions`).
    - *unstable*: among the gradient norms of the last `window` updates, the share above `threshold` is at least
      `ratio`. A norm that is not finite counts as above the threshold. The criterion applies only after the first
      `window` updates.
    - *out of range*: the value variance of the latest update is not finite, below `variance_min` or above
      `variance_max`. The criterion does not apply to a model without a value head.

    `mode="any"` stops the run if at least one criterion is met. `mode="all"` stops it if *converged* is met and the
    other two are not. `mode="loss_only"` stops it if *converged* is met. A decision to stop is final. The decision
    depends only on the observed metrics, so every rank must observe global metrics, not those of its own batches.
    """

    def __init__(
        self,
        *,
        mode: Literal["any", "all", "loss_only"] = "any",
        monitor: str = "val/loss",
        patience: Positive | None = None,
        min_delta: NonNegative = 0.0,
        window: Positive | None = None,
        threshold: PositiveFloat = 50.0,
        ratio: Share = 0.7,
        variance_min: NonNegative | None = None,
        variance_max: PositiveFloat | None = None,
    ) -> None:
        """Create the criteria.

        A criterion is switched off if its setting is None. The setting is `patience` for *converged* and `window` for
        *unstable*. The criterion *out of range* is switched off if both `variance_min` and `variance_max` are None.

        Raises:
            InputError: `patience` is None although `mode` needs it, or `variance_min` is above `variance_max`.
        """
        if mode != "any" and patience is None:
            raise InputError(f"mode={mode} stops only a run that has converged, so it needs a patience")
        if variance_min is not None and variance_max is not None and variance_min > variance_max:
            raise InputError(f"variance_min={variance_min} is above variance_max={variance_max}")
        self.mode, self.monitor, self.patience, self.min_delta = mode, monitor, patience, min_delta
        self.window, self.threshold, self.ratio = window, threshold, ratio
        self.variance_min, self.variance_max = variance_min, variance_max
        self._best: float | None = None
        self._counter = 0
        self._exceeded: deque[int] = deque(maxlen=window or 0)
        self._variance: float | None = None
        self._reason: str | None = None

    @property
    def best_metric(self) -> str:
        """The validation metric that chooses the best checkpoint: `monitor`, or `val/loss` if that is of training."""
        return self.monitor if self.monitor.startswith("val/") else "val/loss"

    @property
    def reason(self) -> str | None:
        """The reason to stop the run, as text; None if the run continues."""
        return self._reason

    def stop(self, reason: str) -> None:
        """Stop the run for the given reason, which another rank has found."""
        self._reason = reason

    def observe_update(self, grad_norm: float, value_variance: float | None) -> None:
        """Record an update's gradient norm before clipping, and its value variance.

        The value variance is None if the model has no value head.
        """
        self._exceeded.append(int(grad_norm > self.threshold or not math.isfinite(grad_norm)))
        self._variance = value_variance
        self._decide()

    def observe_metrics(self, metrics: dict[str, float]) -> None:
        """Record the value of the metric `monitor`. Do nothing if `metrics` does not contain it."""
        if self.monitor not in metrics:
            return
        value = metrics[self.monitor]
        if is_improvement(self.monitor, value, self._best, self.min_delta):
            self._best, self._counter = value, 0
        else:
            self._counter += 1
        self._decide()

    def metrics(self) -> dict[str, float]:
        """Return the current values of all criteria that are not switched off, as metrics named `early_stopping/*`.

        Values that are not finite are left out.
        """
        values: dict[str, float | None] = {}
        if self.patience is not None:
            values |= {"counter": float(self._counter), "best": self._best}
        values["unstable_ratio"] = self._unstable_ratio()
        if self._checks_variance():
            values["value_variance"] = self._variance
        return {f"early_stopping/{name}": v for name, v in values.items() if v is not None and math.isfinite(v)}

    def state_dict(self) -> dict[str, Any]:
        """Return the observed values, the settings of the criteria and the reason to stop, as plain JSON values."""
        variance = self._variance
        return {
            "settings": self._settings(),
            "best": self._best,
            "counter": self._counter,
            "exceeded": list(self._exceeded),
            "value_variance": variance if variance is None or math.isfinite(variance) else str(variance),
            "reason": self._reason,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the observed values from `state`, but keep the current settings.

        If `window` is smaller than before, only the newest updates in the window are kept. If `monitor` has changed,
        the best value and the number of measurements without improvement are reset. If the run was stopped and any
        setting has changed, the decision to stop is made again.
        """
        same_monitor = state["settings"]["monitor"] == self.monitor
        self._best, self._counter = (state["best"], state["counter"]) if same_monitor else (None, 0)
        self._exceeded = deque(state["exceeded"], maxlen=self.window or 0)
        self._variance = None if state["value_variance"] is None else float(state["value_variance"])
        self._reason = state["reason"]
        if self._reason is not None and state["settings"] != self._settings():
            self._reason = None
            self._decide()

    def _settings(self) -> dict[str, Any]:
        return {
            "mode": self.mode, "monitor": self.monitor, "patience": self.patience, "min_delta": self.min_delta,
            "window": self.window, "threshold": self.threshold, "ratio": self.ratio,
            "variance_min": self.variance_min, "variance_max": self.variance_max,
        }  # fmt: skip

    def _decide(self) -> None:
        if self._reason is not None:
            return
        converged, unstable, out_of_range = self._converged(), self._unstable(), self._out_of_range()
        if self.mode == "any":
            self._reason = "; ".join(filter(None, (converged, unstable, out_of_range))) or None
        elif self.mode == "loss_only" or not (unstable or out_of_range):
            self._reason = converged

    def _converged(self) -> str | None:
        if self.patience is None or self._counter < self.patience:
            return None
        required = f" by more than {self.min_delta}" if self.min_delta else ""
        best = "no value was finite" if self._best is None else f"best {self._best:.6g}"
        measurements = "measurement" if self._counter == 1 else "measurements"
        return f"converged: {self.monitor} has not improved{required} in {self._counter} {measurements} ({best})"

    def _unstable(self) -> str | None:
        ratio = self._unstable_ratio()
        if ratio is None or ratio < self.ratio:
            return None
        count = sum(self._exceeded)
        return f"unstable: {count} of the last {self.window} gradient norms exceeded {self.threshold:g}"

    def _unstable_ratio(self) -> float | None:
        if self.window is None or len(self._exceeded) < self.window:
            return None
        # Divide instead of comparing with ratio · window: 7 / 100 equals the literal 0.07, but 0.07 · 100 is above 7.
        return sum(self._exceeded) / self.window

    def _checks_variance(self) -> bool:
        return self.variance_min is not None or self.variance_max is not None

    def _out_of_range(self) -> str | None:
        variance = self._variance
        if variance is None or not self._checks_variance():
            return None
        problem = None
        if not math.isfinite(variance):
            problem = "is not finite"
        elif self.variance_min is not None and variance < self.variance_min:
            problem = f"< {self.variance_min}"
        elif self.variance_max is not None and variance > self.variance_max:
            problem = f"> {self.variance_max}"
        return problem and f"out of range: value variance {variance:.6g} {problem}"


def monitor_problem(monitor: str, available: Iterable[str]) -> str | None:
    """Return the reason why early stopping cannot use the metric `monitor`, or None if it can.

    It can use the metrics among `available` that have a direction.
    """
    measured = set(available)
    names = sorted(name for name in measured if is_lower_better(name) is not None)
    if monitor in names:
        return None
    reason = "neither higher nor lower values are better" if monitor in measured else "is never measured"
    return f"{reason}; choose one of {', '.join(names)}" if names else f"{reason}; this run has no metric to monitor"


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
