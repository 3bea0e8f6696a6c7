"""Tests of the exact update at which a run stops early; for each property, a naive stopper violates it."""

import itertools
import json
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Literal, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from wmtp.config.schema import build, node_issues
from wmtp.errors import InputError
from wmtp.evaluation.in_training import sample_metric_names
from wmtp.objectives.base import metric_names
from wmtp.training.early_stopping import EarlyStopping, monitor_problem

Update: TypeAlias = tuple[float, float | None]
Measurement: TypeAlias = dict[str, float]
Event: TypeAlias = Update | Measurement
Mode: TypeAlias = Literal["any", "all", "loss_only"]
Stopper: TypeAlias = type[EarlyStopping]

R5: dict[str, Any] = {"window": 10, "ratio": 0.7, "threshold": 50.0}
SIX_OF_TEN: list[Event] = [(norm, None) for norm in [60.0, 1, 60, 1, 60, 1, 60, 1, 60, 60]]
SEVEN_OF_TEN: list[Event] = [(norm, None) for norm in [60.0, 1, 60, 1, 60, 1, 60, 60, 60, 60]]


def observe(stopper: EarlyStopping, event: Event) -> None:
    if isinstance(event, dict):
        stopper.observe_metrics(event)
    else:
        stopper.observe_update(*event)


def saved_and_resumed(stopper: EarlyStopping, kind: Stopper, settings: dict[str, Any]) -> EarlyStopping:
    """Return a new stopper with the saved state of `stopper`."""
    text = json.dumps(stopper.state_dict(), allow_nan=False)
    after = kind(**settings)
    after.load_state_dict(json.loads(text))
    return after


def stops_at(
    kind: Stopper, settings: dict[str, Any], events: Sequence[Event], resume_at: int | None = None
) -> tuple[int, str] | None:
    """Return the index and the reason of the stop, or None; the run resumes before the event `resume_at`."""
    stopper = kind(**settings)
    for index, event in enumerate(events):
        if index == resume_at:
            stopper = saved_and_resumed(stopper, kind, settings)
        observe(stopper, event)
        if stopper.reason is not None:
            return index, stopper.reason
    return None


def check_detects(check: Callable[[Stopper], None], naive: Stopper) -> None:
    """Check as a control that a naive stopper fails `check`."""
    with pytest.raises(AssertionError):
        check(naive)


# Gradients


class IgnoresWindowSize(EarlyStopping):
    """Naive: does not wait until the window is full."""

    def observe_update(self, grad_norm: float, value_variance: float | None) -> None:
        super().observe_update(grad_norm, value_variance)
        if sum(self._exceeded) / len(self._exceeded) >= self.ratio:
            self._reason = "unstable"


class MissesNan(EarlyStopping):
    """Naive: checks `norm > threshold`, which is false for NaN."""

    def observe_update(self, grad_norm: float, value_variance: float | None) -> None:
        super().observe_update(grad_norm if grad_norm > self.threshold else 0.0, value_variance)


class ForgetsWindow(EarlyStopping):
    """Naive: starts a new window after each resume."""

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"exceeded": []}


class ComparesProducts(EarlyStopping):
    """Naive: compares counts with the product ratio · window, which is rounded."""

    def _unstable_ratio(self) -> float | None:
        full = self.window is not None and len(self._exceeded) == self.window
        return math.inf if full and sum(self._exceeded) >= self.ratio * len(self._exceeded) else None


def check_six_continue_and_seven_stop(kind: Stopper) -> None:
    for resume_at in [None, *range(10)]:
        assert stops_at(kind, R5, SIX_OF_TEN, resume_at) is None
        stopped = stops_at(kind, R5, SEVEN_OF_TEN, resume_at)
        assert stopped == (9, "unstable: 7 of the last 10 gradient norms exceeded 50")


def test_six_of_ten_continue_and_seven_of_ten_stop_for_any_resume() -> None:
    check_six_continue_and_seven_stop(EarlyStopping)
    check_detects(check_six_continue_and_seven_stop, IgnoresWindowSize)
    check_detects(check_six_continue_and_seven_stop, ForgetsWindow)


def check_only_newest_count(kind: Stopper) -> None:
    small_norms: list[Event] = [(1.0, None)] * 10
    for resume_at in range(len(small_norms) + 7):
        stopped = stops_at(kind, R5, [*small_norms, *[(50.5, None)] * 10], resume_at)
        assert stopped is not None and stopped[0] == 16
    assert stops_at(kind, R5, [(50.0, None)] * 30) is None, "a norm equal to the threshold stopped the run"


def test_only_the_newest_updates_count() -> None:
    check_only_newest_count(EarlyStopping)
    check_detects(check_only_newest_count, ForgetsWindow)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_nonfinite_norms_stop_at_the_first_full_window(norm: float) -> None:
    def check(kind: Stopper) -> None:
        for resume_at in range(10):
            stopped = stops_at(kind, R5, [(norm, None)] * 50, resume_at)
            assert stopped is not None and stopped[0] == 9

    check(EarlyStopping)
    check_detects(check, IgnoresWindowSize)
    if math.isnan(norm):
        check_detects(check, MissesNan)


def check_ratios_are_exact(kind: Stopper) -> None:
    for window in (10, 25, 100):
        for count in range(1, window + 1):
            settings = R5 | {"window": window, "ratio": float(f"{count * 100 // window}e-2")}
            enough: list[Event] = [(99.0 if index < count else 0.0, None) for index in range(window)]
            assert stops_at(kind, settings, enough) is not None, settings
            assert stops_at(kind, settings, [*enough[1:], (0.0, None)]) is None, settings


def test_a_share_equal_to_the_ratio_stops_despite_rounding() -> None:
    check_ratios_are_exact(EarlyStopping)
    check_detects(check_ratios_are_exact, ComparesProducts)


# The monitored metric


def losses(*values: float) -> list[Event]:
    return [{"val/loss": value} for value in values]


class KeepsNan(EarlyStopping):
    """Naive: keeps min(value, best), which stays NaN after a first NaN."""

    def observe_metrics(self, metrics: dict[str, float]) -> None:
        best = self._best
        super().observe_metrics(metrics)
        self._best = min(metrics[self.monitor], metrics[self.monitor] if best is None else best)


class AcceptsInfinity(EarlyStopping):
    """Naive: accepts negative infinity as an improvement."""

    def observe_metrics(self, metrics: dict[str, float]) -> None:
        if metrics[self.monitor] == -math.inf:
            self._best, self._counter = -math.inf, 0
        else:
            super().observe_metrics(metrics)


class AcceptsMinDelta(EarlyStopping):
    """Naive: accepts a difference of exactly `min_delta` as an improvement."""

    def observe_metrics(self, metrics: dict[str, float]) -> None:
        if self._best is not None and self._best - metrics[self.monitor] == self.min_delta:
            self._best, self._counter = metrics[self.monitor], 0
        else:
            super().observe_metrics(metrics)


def check_nan_is_never_best(kind: Stopper) -> None:
    stopper = kind(patience=3)
    for value, counter in [(math.nan, 1), (2.0, 0), (math.nan, 1), (-math.inf, 2), (1.5, 0), (math.inf, 1)]:
        stopper.observe_metrics({"val/loss": value})
        metrics = stopper.metrics()
        assert metrics["early_stopping/counter"] == counter
        assert metrics.get("early_stopping/best", 0.0) in (0.0, 2.0, 1.5)
    assert stopper.metrics()["early_stopping/best"] == 1.5 and stopper.reason is None


def test_a_nonfinite_value_is_never_the_best_but_counts_as_no_improvement() -> None:
    check_nan_is_never_best(EarlyStopping)
    check_detects(check_nan_is_never_best, KeepsNan)
    check_detects(check_nan_is_never_best, AcceptsInfinity)
    never = stops_at(EarlyStopping, {"patience": 3}, losses(*[math.nan] * 5))
    assert never == (2, "converged: val/loss has not improved in 3 measurements (no value was finite)")


def check_min_delta_is_no_improvement(kind: Stopper) -> None:
    settings = {"patience": 2, "min_delta": 0.25}
    stopped = stops_at(kind, settings, losses(2.0, 1.75, 1.75))
    assert stopped == (2, "converged: val/loss has not improved by more than 0.25 in 2 measurements (best 2)")
    just_more = math.nextafter(1.75, 0)
    assert stops_at(kind, settings, losses(2.0, just_more, just_more)) is None
    assert stops_at(kind, {"patience": 1}, losses(1.0, math.nextafter(1.0, 0))) is None
    assert stops_at(kind, {"patience": 1}, losses(1.0, 1.0)) is not None


def test_a_difference_of_exactly_min_delta_is_no_improvement() -> None:
    check_min_delta_is_no_improvement(EarlyStopping)
    check_detects(check_min_delta_is_no_improvement, AcceptsMinDelta)


def test_many_small_improvements_add_up() -> None:
    settings = {"patience": 3, "min_delta": 0.25}
    assert stops_at(EarlyStopping, settings, losses(2.0, 1.875, 1.75, 1.625, 1.5, 1.375)) is None


def test_patience_counts_measurements_in_a_row() -> None:
    values = losses(1.0, 1.1, 1.2, 0.9, 1.0, 1.0, 1.0)
    for resume_at in range(len(values)):
        assert stops_at(EarlyStopping, {"patience": 3}, values, resume_at) == (
            6,
            "converged: val/loss has not improved in 3 measurements (best 0.9)",
        )


def test_reason_with_patience_one_uses_the_singular() -> None:
    stopped = stops_at(EarlyStopping, {"patience": 1}, losses(1.0, 2.0))
    assert stopped == (1, "converged: val/loss has not improved in 1 measurement (best 1)")


def test_only_measurements_of_the_monitored_metric_count() -> None:
    stopper = EarlyStopping(monitor="val/head_1_loss", patience=1)
    for metrics in ({}, {"train/loss": 9.0}, {"val/loss": math.nan}):
        stopper.observe_metrics(metrics)
        stopper.observe_update(1.0, None)
    assert stopper.reason is None and stopper.metrics() == {"early_stopping/counter": 0.0}
    stopper.observe_metrics({"val/loss": 5.0, "val/head_1_loss": 2.0})
    stopper.observe_metrics({"val/loss": 1.0, "val/head_1_loss": 2.0})
    assert str(stopper.reason).startswith("converged: val/head_1_loss")


class LowerIsBetter(EarlyStopping):
    """Naive: takes a lower value of any metric for an improvement."""

    def observe_metrics(self, metrics: dict[str, float]) -> None:
        super().observe_metrics({self.monitor: metrics[self.monitor]})
        value = metrics[self.monitor]
        self._counter = 0 if self._best is None or value < self._best else self._counter + (value > self._best)


def check_rising_metric_is_an_improvement(kind: Stopper) -> None:
    for monitor in (
        "val/value_explained_variance", "val/pass_rate", "val/sampled_pass_rate", "val/head_2_acceptance",
        "val/canonical_logprob", "val/canonical_probability",
    ):  # fmt: skip
        rising, falling = (kind(monitor=monitor, patience=2, min_delta=0.05) for _ in range(2))
        for value in (-0.3, 0.1, 0.2, 0.4):
            rising.observe_metrics({monitor: value})
            falling.observe_metrics({monitor: -value})
        assert rising.reason is None and rising.metrics()["early_stopping/best"] == 0.4
        assert str(falling.reason).endswith("in 2 measurements (best 0.3)")


def test_a_metric_that_should_rise_improves_when_it_rises() -> None:
    check_rising_metric_is_an_improvement(EarlyStopping)
    check_detects(check_rising_metric_is_an_improvement, LowerIsBetter)


def test_metrics_without_a_direction_cannot_be_monitored() -> None:
    names = metric_names(2, values=True) + [f"val/{name}" for name in sample_metric_names(2)]
    refused = {name.partition("/")[2] for name in names if monitor_problem(name, names)}
    assert refused == {
        "grad_norm", "lr", "weight_mean", "weight_min", "weight_max", "weight_std", "valid_target_ratio", "value_mean",
        "value_variance",
    }  # fmt: skip
    problem = monitor_problem("train/lr", ["train/lr", "val/loss"])
    assert problem == "neither higher nor lower values are better; choose one of val/loss"


def test_unknown_monitor_is_reported_with_the_available_names() -> None:
    names = ["val/loss", "val/head_1_loss", "train/loss"]
    assert monitor_problem("val/loss", iter(names)) is None
    assert monitor_problem("val/los", names) == (
        "is never measured; choose one of train/loss, val/head_1_loss, val/loss"
    )
    assert "no metric to monitor" in str(monitor_problem("val/loss", []))


# The values' variance


class ComparesVariance(EarlyStopping):
    """Naive: checks `variance < min or variance > max`, which is false for NaN."""

    def _out_of_range(self) -> str | None:
        return None if self._variance is not None and math.isnan(self._variance) else super()._out_of_range()


RANGE: dict[str, Any] = {"variance_min": 0.01, "variance_max": 2.0}


def check_range(kind: Stopper) -> None:
    for variance, reason in {
        0.0001: "out of range: value variance 0.0001 < 0.01",
        3.0: "out of range: value variance 3 > 2.0",
        math.nan: "out of range: value variance nan is not finite",
        math.inf: "out of range: value variance inf is not finite",
    }.items():
        assert stops_at(kind, RANGE, [(1.0, 1.0), (1.0, variance)]) == (1, reason)
    assert stops_at(kind, RANGE, [(1.0, variance) for variance in (0.01, 2.0, 1.0)]) is None, (
        "a variance equal to a limit stopped the run"
    )


def test_a_variance_out_of_range_or_nonfinite_stops() -> None:
    check_range(EarlyStopping)
    check_detects(check_range, ComparesVariance)


def test_one_limit_is_optional() -> None:
    assert stops_at(EarlyStopping, {"variance_max": 2.0}, [(1.0, 0.0)]) is None
    assert stops_at(EarlyStopping, {"variance_max": 2.0}, [(1.0, 3.0)]) is not None
    assert stops_at(EarlyStopping, {"variance_min": 0.01}, [(1.0, 3.0)]) is None
    assert stops_at(EarlyStopping, {"variance_min": 0.01}, [(1.0, math.inf)]) is not None


def test_range_is_ignored_without_a_value_head() -> None:
    assert stops_at(EarlyStopping, RANGE, [(1.0, None)] * 20) is None


# Modes

ALL_ON: dict[str, Any] = {"patience": 2, "window": 2, "ratio": 1.0, "threshold": 50.0, **RANGE}
MODES: dict[Mode, Callable[[bool, bool, bool], bool]] = {
    "any": lambda converged, unstable, out_of_range: converged or unstable or out_of_range,
    "all": lambda converged, unstable, out_of_range: converged and not unstable and not out_of_range,
    "loss_only": lambda converged, unstable, out_of_range: converged,
}


class NeedsAllCriteria(EarlyStopping):
    """Naive: in mode all, waits until all three criteria hold."""

    def _decide(self) -> None:
        found = [self._converged(), self._unstable(), self._out_of_range()]
        if self.mode != "all":
            super()._decide()
        elif all(found):
            self._reason = "; ".join(filter(None, found))


def check_truth_table(kind: Stopper) -> None:
    for mode, expected in MODES.items():
        for holds in itertools.product([False, True], repeat=3):
            converged, unstable, out_of_range = holds
            stopper = kind(mode=mode, **ALL_ON)
            for _ in range(2):
                stopper.observe_update(99.0 if unstable else 1.0, 9.0 if out_of_range else 1.0)
            for value in (1.0, 2.0, 2.0) if converged else (1.0, 0.5, 0.25):
                stopper.observe_metrics({"val/loss": value})
            assert (stopper.reason is not None) == expected(*holds), (mode, holds)


def test_each_mode_stops_for_the_right_combinations_of_criteria() -> None:
    check_truth_table(EarlyStopping)
    check_detects(check_truth_table, NeedsAllCriteria)


def test_the_reason_contains_every_criterion_that_holds() -> None:
    settings = {"patience": 1, "window": 1, "threshold": 2.5, **RANGE}
    stopped = stops_at(EarlyStopping, settings, [*losses(1.0), (3.0, 5.0)])
    assert stopped == (
        1,
        "unstable: 1 of the last 1 gradient norms exceeded 2.5; out of range: value variance 5 > 2.0",
    )


@pytest.mark.parametrize("resume_at", [None, *range(8)])
def test_mode_all_stops_when_converged_and_neither_unstable_nor_out_of_range(resume_at: int | None) -> None:
    events: list[Event] = [
        *losses(1.0), (99.0, 1.0), (99.0, 1.0), *losses(1.0, 1.0),  # converged, but unstable
        (1.0, math.nan), *losses(1.0), (1.0, 1.0), (1.0, 1.0),
    ]  # fmt: skip
    assert stops_at(EarlyStopping, ALL_ON | {"mode": "all"}, events, resume_at) == (
        7,
        "converged: val/loss has not improved in 3 measurements (best 1)",
    )


class RevokesDecision(EarlyStopping):
    """Naive: reports the current criteria instead of the first decision."""

    def _decide(self) -> None:
        self._reason = None
        super()._decide()


def check_final(kind: Stopper) -> None:
    settings = {"patience": 1, "window": 1, **RANGE}
    for last in [*losses(1.0), (99.0, 1.0), (1.0, math.nan)]:
        stopper = kind(**settings)
        for event in [*losses(1.0), last]:
            observe(stopper, event)
        reason = stopper.reason
        assert reason is not None
        for event in [*losses(0.5), (1.0, 1.0)]:
            observe(stopper, event)
            assert stopper.reason == reason
            stopper = saved_and_resumed(stopper, kind, settings)
            assert stopper.reason == reason, "the reason is lost after a resume"


def test_a_decision_is_final_also_after_a_resume() -> None:
    check_final(EarlyStopping)
    check_detects(check_final, RevokesDecision)


# State


EVENTS: list[Event] = [*losses(3.0, 3.0, 2.0), (99.0, 9.0), (99.0, 1.0), *losses(math.nan), (1.0, 9.0), *losses(2.5)]
"""Events that stop with the last one in mode loss_only, never in mode all, and early in mode any."""


def final_state(kind: Stopper) -> dict[str, Any]:
    stopper = kind(mode="loss_only", **ALL_ON)
    for event in EVENTS:
        observe(stopper, event)
    return stopper.state_dict()


def test_the_state_is_plain_json() -> None:
    state = final_state(EarlyStopping)
    settings = state.pop("settings")
    assert settings["monitor"] == "val/loss" and settings["patience"] == 2
    assert state == {
        "best": 2.0,
        "counter": 2,
        "exceeded": [1, 0],
        "value_variance": 9.0,
        "reason": "converged: val/loss has not improved in 2 measurements (best 2)",
    }
    assert json.loads(json.dumps(final_state(EarlyStopping), allow_nan=False)) == final_state(EarlyStopping)
    stopper = EarlyStopping(window=3, variance_max=1.0, mode="all", patience=9)
    stopper.observe_update(math.nan, math.nan)
    assert stopper.state_dict()["value_variance"] == "nan"
    after = saved_and_resumed(stopper, EarlyStopping, {"window": 3}).state_dict()
    assert after | {"settings": None} == stopper.state_dict() | {"settings": None}


def check_every_resume(kind: Stopper) -> None:
    """Check that a resume at any event changes nothing; every part of the state decides at least one of the runs."""
    norms = [(99.0, 1.0), (99.0, 1.0), (1.0, 1.0), (99.0, 1.0), (99.0, 1.0), (1.0, 9.0)]
    for mode in MODES:
        for variance_max in (None, 2.0):
            settings = ALL_ON | {"mode": mode, "variance_max": variance_max}
            for events in ([*losses(1.0, 2.0), *norms, *losses(1.5, 1.5)], EVENTS, norms, losses(1.0, 2.0, 2.0, 2.0)):
                uninterrupted = reasons_of(kind, settings, events, None)
                for resume_at in range(len(events)):
                    assert reasons_of(kind, settings, events, resume_at) == uninterrupted, (mode, resume_at)


def reasons_of(
    kind: Stopper, settings: dict[str, Any], events: Sequence[Event], resume_at: int | None
) -> list[str | None]:
    """Return the reason after each event, including those after the decision."""
    stopper, reasons = kind(**settings), []
    for index, event in enumerate(events):
        if index == resume_at:
            stopper = saved_and_resumed(stopper, kind, settings)
        observe(stopper, event)
        reasons.append(stopper.reason)
    return reasons


def test_every_part_of_the_state_is_needed() -> None:
    check_every_resume(EarlyStopping)
    fresh = EarlyStopping().state_dict()
    for part in set(fresh) - {"monitor"}:

        class ResetsPart(EarlyStopping):
            reset_part = part

            def state_dict(self) -> dict[str, Any]:
                return super().state_dict() | {self.reset_part: fresh[self.reset_part]}

        check_detects(check_every_resume, ResetsPart)


def test_settings_are_from_the_config_and_not_from_the_checkpoint() -> None:
    before = EarlyStopping(patience=2, **R5)
    for event in [*SEVEN_OF_TEN[:9], *losses(1.0, 1.0)]:
        observe(before, event)
    restored = saved_and_resumed(before, EarlyStopping, {"patience": 4, **R5})
    assert (restored.patience, restored.window) == (4, 10)
    for event, stops in zip(losses(1.0, 1.0, 1.0), (False, False, True), strict=True):
        observe(restored, event)
        assert (restored.reason is not None) == stops


class KeepsOldest(EarlyStopping):
    """Naive: a smaller window keeps its oldest entries."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state | {"exceeded": state["exceeded"][: self.window]})


def check_shrunk_window(kind: Stopper) -> None:
    before = kind(**R5 | {"ratio": 1.0})
    for norm in [99.0] * 6 + [1.0] * 3:
        before.observe_update(norm, None)
    after = saved_and_resumed(before, kind, R5 | {"window": 4, "ratio": 0.25})
    assert after.state_dict()["exceeded"] == [1, 0, 0, 0]
    observe(after, (1.0, None))
    assert after.reason is None and after.metrics() == {"early_stopping/unstable_ratio": 0.0}


def test_a_smaller_window_keeps_the_newest_entries_and_a_larger_one_fills_up() -> None:
    check_shrunk_window(EarlyStopping)
    check_detects(check_shrunk_window, KeepsOldest)
    before = EarlyStopping(**R5 | {"window": 4, "ratio": 1.0})
    for _ in range(3):
        before.observe_update(99.0, None)
    after = saved_and_resumed(before, EarlyStopping, R5 | {"window": 5})
    after.observe_update(99.0, None)
    assert after.reason is None
    after.observe_update(1.0, None)
    assert after.reason == "unstable: 4 of the last 5 gradient norms exceeded 50"
    assert saved_and_resumed(after, EarlyStopping, {}).metrics() == {}


def test_a_stopped_run_continues_with_settings_that_would_not_have_stopped_it() -> None:
    before = EarlyStopping(patience=2)
    for event in losses(0.5, 0.6, 0.7):
        observe(before, event)
    assert before.reason is not None
    assert saved_and_resumed(before, EarlyStopping, {"patience": 2}).reason == before.reason
    assert saved_and_resumed(before, EarlyStopping, {"patience": 1}).reason is not None
    for settings in ({"patience": 3}, {}):
        assert saved_and_resumed(before, EarlyStopping, settings).reason is None


def test_different_monitor_resets_its_measurements() -> None:
    before = EarlyStopping(patience=2)
    for event in losses(0.5, 0.6):
        observe(before, event)
    after = saved_and_resumed(before, EarlyStopping, {"patience": 2, "monitor": "train/loss"})
    after.observe_metrics({"train/loss": 3.0})
    assert after.metrics() == {"early_stopping/counter": 0.0, "early_stopping/best": 3.0}


def test_metrics_are_finite_and_contain_only_active_criteria() -> None:
    assert EarlyStopping().metrics() == {}
    stopper = EarlyStopping(mode="all", **ALL_ON)
    assert stopper.metrics() == {"early_stopping/counter": 0.0}
    for event in [(99.0, math.nan), *losses(1.5, 2.0), (1.0, math.nan)]:
        observe(stopper, event)
    expected = {"early_stopping/counter": 1.0, "early_stopping/best": 1.5, "early_stopping/unstable_ratio": 0.5}
    assert stopper.metrics() == expected
    stopper.observe_update(1.0, 0.5)
    assert stopper.metrics() == expected | {
        "early_stopping/unstable_ratio": 0.0,
        "early_stopping/value_variance": 0.5,
    }


# Random sequences


number = st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 50.0, 50.5, 99.0, math.nan, math.inf, -math.inf])
event = st.one_of(
    st.tuples(number, st.one_of(st.none(), number)),
    st.dictionaries(st.sampled_from(["val/loss", "train/loss"]), number),
)
setting = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(["any", "all", "loss_only"]),
        "patience": st.integers(1, 4),
        "min_delta": st.sampled_from([0.0, 0.5]),
        "window": st.one_of(st.none(), st.integers(1, 5)),
        "ratio": st.sampled_from([0.2, 0.5, 0.7, 1.0]),
        "variance_min": st.sampled_from([None, 0.5]),
        "variance_max": st.sampled_from([None, 1.5]),
    }
)


def stop_by_definition(settings: dict[str, Any], events: Sequence[Event]) -> int | None:
    """Return the index of the stop, computed from the whole history with exact numbers and without state."""
    low, high = settings["variance_min"], settings["variance_max"]
    for index in range(len(events)):
        history = events[: index + 1]
        updates = [event for event in history if not isinstance(event, dict)]
        measured = [event["val/loss"] for event in history if isinstance(event, dict) and "val/loss" in event]
        best: Fraction | None = None
        since = 0
        for value in measured:
            better = math.isfinite(value) and (best is None or best - Fraction(value) > Fraction(settings["min_delta"]))
            best, since = (Fraction(value), 0) if better else (best, since + 1)
        recent = updates[-settings["window"] :] if settings["window"] else []
        over = [norm for norm, _ in recent if norm > 50 or not math.isfinite(norm)]
        full = bool(recent) and len(recent) == settings["window"]
        unstable = full and Fraction(len(over), len(recent)) >= Fraction(str(settings["ratio"]))
        variance = updates[-1][1] if updates else None
        is_checked = variance is not None and (low is not None or high is not None)
        within = variance is not None and math.isfinite(variance) and (low or 0) <= variance <= (high or math.inf)
        if MODES[settings["mode"]](since >= settings["patience"], unstable, is_checked and not within):
            return index
    return None


@given(setting, st.lists(event, max_size=14), st.integers(0, 14))
def test_a_resumed_run_stops_as_the_definitions_require(
    settings: dict[str, Any], events: list[Event], resume_at: int
) -> None:
    uninterrupted = stops_at(EarlyStopping, settings, events)
    assert stops_at(EarlyStopping, settings, events, resume_at) == uninterrupted
    assert (uninterrupted and uninterrupted[0]) == stop_by_definition(settings, events)


# Config


def test_each_variant_is_valid_for_both_stages(compose: Callable[..., DictConfig]) -> None:
    for name, active in {
        "none": {},
        "patience": {"patience": 5},
        "stability": {"patience": 5, "window": 10, "variance_max": 1.0},
    }.items():
        config = compose(f"early_stopping={name}", "+early_stopping@stage.early_stopping=patience")
        assert list(node_issues(config.early_stopping, "early_stopping")) == []
        stopper = build(config.early_stopping)
        assert isinstance(stopper, EarlyStopping)
        criteria = {key: vars(stopper)[key] for key in ("patience", "window", "variance_min", "variance_max")}
        assert {key: value for key, value in criteria.items() if value is not None} == active
        assert config.stage.early_stopping.patience == 5 and config.stage.early_stopping.window is None


def test_a_run_without_early_stopping_is_never_stopped(compose: Callable[..., DictConfig]) -> None:
    settings = OmegaConf.to_container(compose("early_stopping=none").early_stopping)
    assert isinstance(settings, dict)
    del settings["_target_"]
    bad_events: list[Event] = [(math.nan, math.nan), *losses(math.nan)]
    assert stops_at(EarlyStopping, {str(key): value for key, value in settings.items()}, bad_events * 50) is None


INVALID_SETTINGS = {
    "mode=some": "must be 'any', 'all' or 'loss_only'",
    "patience=0": "must be greater than or equal to 1",
    "patience=2.5": "must be a valid integer",
    "min_delta=-0.1": "must be greater than or equal to 0",
    "min_delta=nan": "must be a finite number",
    "window=0": "must be greater than or equal to 1",
    "threshold=0": "must be greater than 0",
    "threshold=inf": "must be a finite number",
    "ratio=0": "must be greater than 0",
    "ratio=1.1": "must be less than or equal to 1",
    "ratio=nan": "must be",
    "variance_min=-1": "must be greater than or equal to 0",
    "variance_max=0": "must be greater than 0",
    "monitor=null": "must be a valid string",
    "patiense=3": "did you mean early_stopping.patience?",
}


def test_settings_out_of_range_are_reported(compose: Callable[..., DictConfig]) -> None:
    node = compose("early_stopping=stability").early_stopping
    OmegaConf.set_struct(node, False)
    for override, problem in INVALID_SETTINGS.items():
        changed = OmegaConf.merge(node, OmegaConf.from_dotlist([override]))
        assert isinstance(changed, DictConfig)
        (issue,) = node_issues(changed, "early_stopping")
        assert issue.key == f"early_stopping.{override.partition('=')[0]}"
        assert problem in issue.problem


@pytest.mark.parametrize("mode", ["all", "loss_only"])
def test_contradictory_settings_are_refused(mode: Mode) -> None:
    with pytest.raises(InputError, match=f"mode={mode} stops only a run that has converged"):
        EarlyStopping(mode=mode, window=10)
    with pytest.raises(InputError, match="variance_min=2.0 is above variance_max=1.0"):
        EarlyStopping(variance_min=2.0, variance_max=1.0)
