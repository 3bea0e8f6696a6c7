"""Drawings of one run's training: losses, updates, weights and speed."""

import math
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter
from scipy.stats import binomtest

from wmtp.report.plots import (
    BAD,
    FEW,
    INK,
    LINES,
    PAPER,
    QUIET,
    TRAINING,
    Drawing,
    Series,
    crosses,
    curve,
    finish,
    logarithmic,
    panels,
    series_of,
    thinned,
    training_and_validation,
    whole_numbers,
)
from wmtp.report.run_record import RunRecord

LEGEND_COLUMNS = 4


def loss_drawing(run: RunRecord) -> Drawing | None:
    """The loss in training and validation, and which validation was the best."""
    training, validation = run.series("train/loss"), run.series("val/loss")
    if not training and not validation:
        return None
    best = best_validation(run)
    figure, (axes,) = panels(["loss, nats"], height=2.5, legend_rows=1)
    training_and_validation(axes, training, validation)
    label = "The loss over the updates"
    if best is not None:
        step, loss = best
        axes.plot(
            [step], [loss], "o", color=BAD, markerfacecolor="none", markersize=8, markeredgewidth=1.6,
            label=f"best: {loss:.4g} at {step:,}",
        )  # fmt: skip
        label += f"; the best validation is {loss:.4g} at update {step:,}"
    finish(axes, 3)
    caption = "Training: of the last update before each line of the log, and so of one batch. Lower is better."
    return Drawing(figure, "loss", label, caption + crosses(training, validation))


def heads_drawing(run: RunRecord) -> Drawing | None:
    """The loss of every head."""
    pairs = ((run.series(f"train/head_{head}_loss"), run.series(f"val/head_{head}_loss")) for head in count(1))
    heads = dict(enumerate(takewhile(any, pairs), start=1))
    if not heads:
        return None
    rows = math.ceil(len(heads) / LEGEND_COLUMNS)
    figure, (axes,) = panels(["loss of each head, nats"], height=2.5, legend_rows=rows)
    for head, (training, validation) in heads.items():
        curve(axes, training, head - 1, alpha=0.4, **(TRAINING | {"linewidth": 0.8}))
        curve(axes, validation, head - 1, label=f"head {head}")
    finish(axes, LEGEND_COLUMNS)
    ends = ", ".join(f"head {head} {pair[1][-1][1]:.3g}" for head, pair in heads.items() if pair[1])
    label = f"The loss of each head over the updates{f'; last validation: {ends}' if ends else ''}"
    caption = "Head k predicts the k-th next token. Strong: validation; faint: training."
    return Drawing(figure, "heads", label, caption + crosses(*(series for pair in heads.values() for series in pair)))


def update_drawing(run: RunRecord) -> Drawing | None:
    """Gradient norm and learning rate, what early stopping looks at, and where the training stopped."""
    rates, norms = run.series("train/lr"), run.series("train/grad_norm")
    if not norms:
        return None
    levels, times = _levels(run), _times(run)
    rows = math.ceil((1 + len(levels) + len(times)) / 2)
    figure, (upper, lower) = panels(["gradient norm before clipping", "learning rate"], height=1.5, legend_rows=rows)
    curve(upper, norms, 0, linestyle="-", label="gradient norm")
    curve(lower, rates, 2, linestyle="-")
    for label, level, colour, dashes in levels:
        upper.axhline(level, linewidth=1.2, color=colour, linestyle=dashes, label=label)
    for label, first, last in times:
        for axes in (upper, lower):
            shown = label if axes is upper else None
            if first == last:
                axes.axvline(last, color=INK, linewidth=1.2, label=shown)
            else:
                axes.axvspan(first, last, color=LINES[4], alpha=0.25, linewidth=0, label=shown)
    logarithmic(upper)
    finish(upper, 2)
    whole_numbers(lower)
    lower.set_ylim(bottom=0)
    label = f"Gradient norm, last {norms[-1][1]:.3g}, and learning rate over the updates"
    caption = "Of the last update before each line of the log; early stopping sees every update."
    return Drawing(figure, "updates", label, caption + crosses(norms))


def _levels(run: RunRecord) -> list[tuple[str, float, str, str]]:
    """Gradient norms that mean something."""
    settings, clip = run.config.get("early_stopping") or {}, run.config.get("max_grad_norm")
    levels: list[tuple[str, float, str, str]] = []
    if clip:
        levels.append((f"clipped to {clip:g}", clip, QUIET, ":"))
    if settings.get("window") and (threshold := settings.get("threshold")):
        levels.append((f"too large: above {threshold:g}", threshold, BAD, "--"))
    return levels


def _times(run: RunRecord) -> list[tuple[str, int, int]]:
    """From when to when early stopping looked last, and when it stopped the training."""
    window = (run.config.get("early_stopping") or {}).get("window")
    last = int(run.summary.get("total_steps") or run.status.get("step") or 0)
    times = [(f"the last {window} updates", max(0, last - window), last)] if window and last else []
    return [*times, (f"stopped early at {last:,}", last, last)] if run.status.get("stop_reason") else times


def weights_drawing(run: RunRecord) -> Drawing | None:
    """How the weights are distributed over time; None where all are one."""
    names = ("mean", "std", "min", "max")
    lines = [line for line in run.metrics if all(f"train/weight_{name}" in line for name in names)]
    if not lines or uniform_weights(run):
        return None
    columns = [[float(line[f"train/weight_{name}"]) for line in lines] for name in names]
    kept = thinned(np.array(columns[3]))
    steps = np.array([float(line["step"]) for line in lines])[kept]
    mean, deviation, low, high = (np.array(column)[kept] for column in columns)
    figure, (axes,) = panels(["weight of a target"], height=2.1, legend_rows=1)
    bands = {"least to greatest": (low, high, 0.16)}
    bands["± one deviation"] = (np.maximum(mean - deviation, low), np.minimum(mean + deviation, high), 0.34)
    for label, (lower, upper, alpha) in bands.items():
        axes.fill_between(steps, lower, upper, color=LINES[0], alpha=alpha, linewidth=0, label=label)
    axes.plot(steps, mean, color=LINES[0], marker="o" if len(kept) <= FEW else "", label="mean")
    axes.set_ylim(bottom=0)
    finish(axes, 3)
    label = f"Weights over the updates; at the last from {low[-1]:.3g} to {high[-1]:.3g}, deviation {deviation[-1]:.3g}"
    return Drawing(figure, "weights", label, "Weights have the mean 1: what one target gains, others lose.")


def uniform_weights(run: RunRecord) -> bool:
    """Whether every weight of the training was one."""
    extremes = [value for name in ("min", "max") for _, value in run.series(f"train/weight_{name}")]
    return bool(extremes) and all(abs(value - 1) < 1e-6 for value in extremes)


def speed_drawing(run: RunRecord) -> Drawing | None:
    """Tokens per second."""
    speeds: Series = run.series("train/tokens_per_second")
    if not speeds:
        return None
    median = float(np.median([value for _, value in speeds]))
    figure, (axes,) = panels(["tokens per second"], height=1.6, legend_rows=1)
    curve(axes, speeds, 0, linestyle="-")
    axes.axhline(median, color=QUIET, linestyle="--", linewidth=1.0, label=f"median {median:,.0f}")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    finish(axes, 1)
    label = f"Tokens per second over the updates, median {median:,.0f}"
    return Drawing(figure, "speed", label, "Of the training alone, without validation.")


def best_validation(run: RunRecord) -> tuple[int, float] | None:
    """The step and the loss of the best validation."""
    finite = [(step, loss) for step, loss in run.series("val/loss") if math.isfinite(loss)]
    return min(finite, key=lambda pair: pair[1], default=None)


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
