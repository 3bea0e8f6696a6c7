"""Drawings of what one run learned: how good its values and its answers are."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import binomtest

from wmtp.report.curves import curve, finish, series_of, training_and_validation
from wmtp.report.drawing import INK, LINES, PAPER, QUIET, Drawing, panels
from wmtp.report.runs import RunRecord


def values_drawing(lines: Sequence[Mapping[str, Any]], name: str, caption: str) -> Drawing | None:
    """The value loss, and the share of the rewards' variance that the values explain."""
    shown = {
        metric: (series_of(lines, f"train/{metric}"), series_of(lines, f"val/{metric}"))
        for metric in ("value_loss", "value_explained_variance")
    }
    if not any(series for pair in shown.values() for series in pair):
        return None
    figure, axes = panels(["value loss", "explained variance of the rewards"], height=1.4, legend_rows=1)
    for place, pair in zip(axes, shown.values(), strict=True):
        training_and_validation(place, *pair)
    axes[1].axhline(0, color=INK, linewidth=1.0, linestyle=":")
    finish(axes[0], 2)
    training, validation = shown["value_explained_variance"]
    last = (validation or training or [(0, math.nan)])[-1][1]
    label = f"Value loss and explained variance over the updates; the last explained variance is {last:.3g}"
    return Drawing(figure, name, label, caption)


def stage_drawing(run: RunRecord) -> Drawing | None:
    """The loss of the stage before the training."""
    training, validation = (series_of(run.stage_metrics, name) for name in ("train/loss", "val/loss"))
    if not training and not validation:
        return None
    figure, (axes,) = panels(["loss of the stage before"], height=2.1, legend_rows=1)
    training_and_validation(axes, training, validation)
    finish(axes, 2)
    label = "The loss of the stage before over its updates"
    return Drawing(figure, "stage-loss", label, "What this stage minimises, over its own updates.")


def calibration_drawing(run: RunRecord) -> Drawing | None:
    """The value head's predictions against the rewards that came."""
    bins = [entry for entry in run.tokens.get("calibration") or [] if entry["count"]]
    if not bins:
        return None
    figure, (upper, lower) = panels(["mean reward that came", "tokens"], height=1.4, x_label="predicted value")
    upper.plot([0, 1], [0, 1], color=QUIET, linestyle="--", linewidth=1.0, label="as predicted")
    predicted, came = ([float(entry[name]) for entry in bins] for name in ("value", "reward"))
    upper.plot(predicted, came, color=LINES[0], marker="o", markersize=5)
    upper.set_ylim(-0.05, 1.05)
    lower.bar(
        [entry["low"] for entry in bins], [entry["count"] for entry in bins], align="edge", color=LINES[0], alpha=0.55,
        width=[(entry["high"] - entry["low"]) * 0.94 for entry in bins],
    )  # fmt: skip
    lower.set_xlim(-0.03, 1.03)
    total = sum(entry["count"] for entry in bins)
    error = sum(entry["count"] * abs(entry["value"] - entry["reward"]) for entry in bins) / total
    caption = (
        f"A calibrated value head lies on the dashed line; its mean distance from it, by tokens, is {error:.3f}. "
        "All tokens of a solution share its reward: few solutions make a bumpy line."
    )
    label = f"Calibration of the value head: mean distance {error:.3f} from the diagonal"
    return Drawing(figure, "calibration", label, caption)


def pass_rate_drawing(run: RunRecord) -> Drawing | None:
    """The share of the validation problems that the model solves, over the updates."""
    rates, asked = run.series("val/pass_rate"), run.config.get("num_validation_samples")
    if not rates:
        return None
    figure, (axes,) = panels(["share of validation problems solved"], height=1.8)
    curve(axes, rates, 2, linestyle="-")
    caption = ""
    if asked:
        bands = [binomtest(round(rate * asked), asked).proportion_ci(method="wilson") for _, rate in rates]
        lows, highs = [band.low for band in bands], [band.high for band in bands]
        axes.fill_between([step for step, _ in rates], lows, highs, color=LINES[2], alpha=0.2, linewidth=0)
        caption = f"Of {asked} problems, answered greedily; shaded: the 95 % interval (Wilson) for so many."
    axes.set_ylim(-0.03, 1.03)
    finish(axes)
    return Drawing(figure, "pass-rate", f"Pass rate over the updates, last {rates[-1][1]:.2f}", caption)


def pass_at_k_drawing(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Drawing | None:
    """Estimates of pass@k with their intervals."""
    if not rows:
        return None
    figure, (axes,) = panels(["share of test problems solved"], height=0.21 * len(rows) + 0.1, left=1.7, x_label="")
    for number, (_, estimate) in enumerate(rows):
        if estimate["low"] is not None:
            axes.plot([estimate["low"], estimate["high"]], [number, number], color=LINES[0], linewidth=2)
        axes.plot(
            [estimate["value"]], [number], "o", color=LINES[0], markersize=6, markeredgecolor=PAPER, clip_on=False
        )
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.tick_params(axis="y", pad=7)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1)
    axes.grid(axis="x", visible=True)
    label = "; ".join(f"{name} {estimate['value']:.3f}" for name, estimate in rows)
    caption = "Lines: 95 % intervals over problems; there is none where all problems went alike."
    return Drawing(figure, "pass-at-k", label, caption)
