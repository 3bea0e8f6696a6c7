"""Plots of one run. They show its losses, gradient norms, weights, predicted values, speed and pass rates."""

import math
from collections.abc import Mapping, Sequence
from itertools import count, takewhile
from typing import Any

import numpy as np
from matplotlib.ticker import FuncFormatter
from scipy.stats import binomtest

from wmtp.report.plots import (
    BAD,
    INK,
    LINES,
    MAX_MARKED_POINTS,
    PAPER,
    QUIET,
    TRAINING_STYLE,
    Plot,
    Series,
    create_panels,
    downsample_indices,
    finish_axes,
    metric_series,
    nonfinite_caption,
    plot_curve,
    plot_training_and_validation,
    set_integer_x_axis,
    set_log_y_axis,
    set_loss_axis,
)
from wmtp.report.run_record import RunRecord

LEGEND_COLUMNS = 4


def plot_loss(run: RunRecord) -> Plot | None:
    """Plot the training loss and the validation loss, and mark the lowest validation loss."""
    training, validation = run.series("train/loss"), run.series("val/loss")
    if not training and not validation:
        return None
    best = best_validation(run)
    figure, (axes,) = create_panels(["loss, nats"], height=2.5, legend_rows=1)
    plot_training_and_validation(axes, training, validation)
    label = "The loss over the updates"
    if best is not None:
        step, loss = best
        axes.plot(
            [step], [loss], "o", color=BAD, markerfacecolor="none", markersize=8, markeredgewidth=1.6,
            label=f"best: {loss:.4g} at {step:,}",
        )  # fmt: skip
        label += f"; the best validation is {loss:.4g} at update {step:,}"
    set_loss_axis(axes)
    finish_axes(axes, 3)
    caption = "Each training value is the loss of one batch, the last before a log line. Lower is better."
    return Plot(figure, "loss", label, caption + nonfinite_caption(training, validation))


def plot_head_losses(run: RunRecord) -> Plot | None:
    """Plot the training loss and the validation loss of each prediction head."""
    pairs = ((run.series(f"train/head_{head}_loss"), run.series(f"val/head_{head}_loss")) for head in count(1))
    heads = dict(enumerate(takewhile(any, pairs), start=1))
    if not heads:
        return None
    rows = math.ceil(len(heads) / LEGEND_COLUMNS)
    figure, (axes,) = create_panels(["loss of each head, nats"], height=2.5, legend_rows=rows)
    for head, (training, validation) in heads.items():
        plot_curve(axes, training, head - 1, alpha=0.4, **(TRAINING_STYLE | {"linewidth": 0.8}))
        plot_curve(axes, validation, head - 1, label=f"head {head}")
    set_loss_axis(axes)
    finish_axes(axes, LEGEND_COLUMNS)
    ends = ", ".join(f"head {head} {pair[1][-1][1]:.3g}" for head, pair in heads.items() if pair[1])
    label = f"The loss of each head over the updates{f'; last validation: {ends}' if ends else ''}"
    caption = "Head k predicts the k-th next token. Strong lines: validation; faint lines: training."
    return Plot(
        figure, "heads", label, caption + nonfinite_caption(*(series for pair in heads.values() for series in pair))
    )


def plot_canonical(run: RunRecord) -> Plot | None:
    """Plot the log-probability and the probability of the correct validation solutions."""
    logprobs, probabilities = run.series("val/canonical_logprob"), run.series("val/canonical_probability")
    if not logprobs:
        return None
    figure, (upper, lower) = create_panels(["log-probability, nats", "probability"], height=1.4)
    plot_curve(upper, logprobs, 0, linestyle="-")
    plot_curve(lower, probabilities, 2, linestyle="-")
    lower.set_ylim(bottom=0)
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    finish_axes(lower)
    last = f"last {logprobs[-1][1]:.3g} nats and {probabilities[-1][1]:.2g}"
    caption = "Correct validation solutions as a whole, without noise tokens: means over solutions. Higher is better."
    label = f"Log-probability and probability of the correct solutions over the updates, {last}"
    return Plot(figure, "canonical", label, caption + nonfinite_caption(logprobs))


def plot_updates(run: RunRecord) -> Plot | None:
    """Plot the gradient norm and the learning rate.

    The plot also shows the threshold for gradient clipping, and the threshold and the last window of early stopping.
    """
    rates, norms = run.series("train/lr"), run.series("train/grad_norm")
    if not norms:
        return None
    levels, spans = _gradient_norm_levels(run), _early_stopping_spans(run)
    rows = math.ceil((1 + len(levels) + len(spans)) / 2)
    figure, (upper, lower) = create_panels(
        ["gradient norm before clipping", "learning rate"], height=1.5, legend_rows=rows
    )
    plot_curve(upper, norms, 0, linestyle="-", label="gradient norm")
    plot_curve(lower, rates, 2, linestyle="-")
    for label, level, color, dashes in levels:
        upper.axhline(level, linewidth=1.2, color=color, linestyle=dashes, label=label)
    for label, first, last in spans:
        for axes in (upper, lower):
            legend_label = label if axes is upper else None
            if first == last:
                axes.axvline(last, color=INK, linewidth=1.2, label=legend_label)
            else:
                axes.axvspan(first, last, color=LINES[4], alpha=0.25, linewidth=0, label=legend_label)
    set_log_y_axis(upper)
    finish_axes(upper, 2)
    set_integer_x_axis(lower)
    lower.set_ylim(bottom=0)
    label = f"Gradient norm, last {norms[-1][1]:.3g}, and learning rate over the updates"
    caption = "Values of the last update before each log line; early stopping uses every update."
    return Plot(figure, "updates", label, caption + nonfinite_caption(norms))


def _gradient_norm_levels(run: RunRecord) -> list[tuple[str, float, str, str]]:
    """Return the thresholds for gradient norms that the config sets. One is for clipping, another for early stopping.

    Each threshold is a tuple (label, value, color, dash pattern) for a horizontal line.
    """
    settings, clip = run.config.get("early_stopping") or {}, run.config.get("max_grad_norm")
    levels: list[tuple[str, float, str, str]] = []
    if clip:
        levels.append((f"clipped to {clip:g}", clip, QUIET, ":"))
    if settings.get("window") and (threshold := settings.get("threshold")):
        levels.append((f"too large: above {threshold:g}", threshold, BAD, "--"))
    return levels


def _early_stopping_spans(run: RunRecord) -> list[tuple[str, int, int]]:
    """Return the ranges of steps that a plot marks because of early stopping, as tuples (label, first step, last step).

    The first range is the last window of updates that early stopping considered. If the run was stopped early, there is
    a second range, which is the last step.
    """
    window = (run.config.get("early_stopping") or {}).get("window")
    last = int(run.summary.get("total_steps") or run.status.get("step") or 0)
    spans = [(f"the last {window} updates", max(0, last - window), last)] if window and last else []
    return [*spans, (f"stopped early at {last:,}", last, last)] if run.status.get("stop_reason") else spans


def plot_weights(run: RunRecord) -> Plot | None:
    """Plot how the distribution of the token weights changes over the updates.

    The result is None if all weights are 1 or if no weights were recorded.
    """
    names = ("mean", "std", "min", "max")
    lines = [line for line in run.metrics if all(f"train/weight_{name}" in line for name in names)]
    if not lines or has_uniform_weights(run):
        return None
    columns = [[float(line[f"train/weight_{name}"]) for line in lines] for name in names]
    kept = downsample_indices(np.array(columns[3]))
    steps = np.array([float(line["step"]) for line in lines])[kept]
    mean, deviation, low, high = (np.array(column)[kept] for column in columns)
    figure, (axes,) = create_panels(["weight of a target"], height=2.1, legend_rows=1)
    bands = {"min to max": (low, high, 0.16)}
    bands["± 1 std"] = (np.maximum(mean - deviation, low), np.minimum(mean + deviation, high), 0.34)
    for label, (lower, upper, alpha) in bands.items():
        axes.fill_between(steps, lower, upper, color=LINES[0], alpha=alpha, linewidth=0, label=label)
    axes.plot(steps, mean, color=LINES[0], marker="o" if len(kept) <= MAX_MARKED_POINTS else "", label="mean")
    axes.set_ylim(bottom=0)
    finish_axes(axes, 3)
    last = f"last from {low[-1]:.3g} to {high[-1]:.3g}, standard deviation {deviation[-1]:.3g}"
    label = f"Weights over the updates; {last}"
    return Plot(
        figure, "weights", label, "The mean weight is 1: a higher weight of one target lowers the weights of others."
    )


def has_uniform_weights(run: RunRecord) -> bool:
    """Return whether the token weights were recorded and all of them were 1."""
    extremes = [value for name in ("min", "max") for _, value in run.series(f"train/weight_{name}")]
    return bool(extremes) and all(abs(value - 1) < 1e-6 for value in extremes)


def plot_speed(run: RunRecord) -> Plot | None:
    """Plot the training speed in tokens per second, with its median."""
    speeds: Series = run.series("train/tokens_per_second")
    if not speeds:
        return None
    median = float(np.median([value for _, value in speeds]))
    figure, (axes,) = create_panels(["tokens per second"], height=1.6, legend_rows=1)
    plot_curve(axes, speeds, 0, linestyle="-")
    axes.axhline(median, color=QUIET, linestyle="--", linewidth=1.0, label=f"median {median:,.0f}")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    finish_axes(axes, 1)
    label = f"Tokens per second over the updates, median {median:,.0f}"
    return Plot(figure, "speed", label, "Training only, without validation.")


def best_validation(run: RunRecord) -> tuple[int, float] | None:
    """Return the step and the value of the lowest validation loss, or None if no finite loss was recorded."""
    finite = [(step, loss) for step, loss in run.series("val/loss") if math.isfinite(loss)]
    return min(finite, key=lambda pair: pair[1], default=None)


def plot_values(lines: Sequence[Mapping[str, Any]], name: str, caption: str) -> Plot | None:
    """Plot the loss of the value head, and the share of the rewards' variance that the predicted values explain.

    Args:
        lines: lines of metrics.jsonl.
        name: name of the plot in the HTML page.
        caption: caption of the plot.
    """
    series_by_metric = {
        metric: (metric_series(lines, f"train/{metric}"), metric_series(lines, f"val/{metric}"))
        for metric in ("value_loss", "value_explained_variance")
    }
    if not any(series for pair in series_by_metric.values() for series in pair):
        return None
    figure, axes = create_panels(["value loss", "explained variance of the rewards"], height=1.4, legend_rows=1)
    for panel, pair in zip(axes, series_by_metric.values(), strict=True):
        plot_training_and_validation(panel, *pair)
    axes[1].axhline(0, color=INK, linewidth=1.0, linestyle=":")
    finish_axes(axes[0], 2)
    training, validation = series_by_metric["value_explained_variance"]
    last = (validation or training or [(0, math.nan)])[-1][1]
    label = f"Value loss and explained variance over the updates; the last explained variance is {last:.3g}"
    return Plot(figure, name, label, caption)


def plot_pretrain_loss(run: RunRecord) -> Plot | None:
    """Plot the training loss and the validation loss of stage 1."""
    training, validation = (metric_series(run.pretrain_metrics, name) for name in ("train/loss", "val/loss"))
    if not training and not validation:
        return None
    figure, (axes,) = create_panels(["loss of stage 1"], height=2.1, legend_rows=1)
    plot_training_and_validation(axes, training, validation)
    set_loss_axis(axes)
    finish_axes(axes, 2)
    label = "The loss of stage 1 over its updates"
    return Plot(figure, "stage-loss", label, "The loss that stage 1 minimizes, over its own updates.")


def plot_calibration(run: RunRecord) -> Plot | None:
    """Plot the observed mean reward against the value predicted by the value head."""
    bins = [entry for entry in run.tokens.get("calibration") or [] if entry["count"]]
    if not bins:
        return None
    figure, (upper, lower) = create_panels(["mean observed reward", "tokens"], height=1.4, x_label="predicted value")
    upper.plot([0, 1], [0, 1], color=QUIET, linestyle="--", linewidth=1.0, label="perfect calibration")
    predicted, observed = ([float(entry[name]) for entry in bins] for name in ("value", "reward"))
    upper.plot(predicted, observed, color=LINES[0], marker="o", markersize=5)
    upper.set_ylim(-0.05, 1.05)
    lower.bar(
        [entry["low"] for entry in bins], [entry["count"] for entry in bins], align="edge", color=LINES[0], alpha=0.55,
        width=[(entry["high"] - entry["low"]) * 0.94 for entry in bins],
    )  # fmt: skip
    lower.set_xlim(-0.03, 1.03)
    total = sum(entry["count"] for entry in bins)
    error = sum(entry["count"] * abs(entry["value"] - entry["reward"]) for entry in bins) / total
    caption = (
        f"Dashed line: perfect calibration; the mean distance from it over tokens is {error:.3f}. "
        "All tokens of a solution share one reward, so few solutions give a rough curve."
    )
    label = f"Calibration of the value head: mean distance {error:.3f} from the diagonal"
    return Plot(figure, "calibration", label, caption)


def plot_pass_rate(run: RunRecord) -> Plot | None:
    """Plot how the share of validation problems that the model solves changes during the training.

    If the run made attempts, which are samples at temperature 1, their mean pass rate is also plotted.
    """
    rates, num_problems = run.series("val/pass_rate"), run.config.get("num_validation_samples")
    sampled = run.series("val/sampled_pass_rate")
    if not rates:
        return None
    figure, (axes,) = create_panels(["share of validation problems solved"], height=1.8, legend_rows=int(bool(sampled)))
    plot_curve(axes, rates, 2, linestyle="-", label="greedy")
    caption, label = "", f"Pass rate over the updates, last {rates[-1][1]:.2f}"
    if num_problems:
        bands = [
            binomtest(round(rate * num_problems), num_problems).proportion_ci(method="wilson") for _, rate in rates
        ]
        lows, highs = [band.low for band in bands], [band.high for band in bands]
        axes.fill_between([step for step, _ in rates], lows, highs, color=LINES[2], alpha=0.2, linewidth=0)
        caption = f"{num_problems} problems, greedy decoding; shaded: 95 % Wilson interval."
    if sampled:
        plot_curve(axes, sampled, 0, linestyle="-", label="temperature 1")
        label += f", and at temperature 1 {sampled[-1][1]:.2f}"
        caption += " At temperature 1: mean over the same problems of the share of samples that pass."
    axes.set_ylim(-0.03, 1.03)
    finish_axes(axes, 2 if sampled else 0)
    return Plot(figure, "pass-rate", label, caption.strip())


def plot_pass_at_k(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> Plot | None:
    """Plot estimates of pass@k with their intervals. Each row is a pair (label, estimate)."""
    if not rows:
        return None
    figure, (axes,) = create_panels(
        ["share of test problems solved"], height=0.21 * len(rows) + 0.1, left=1.7, x_label=""
    )
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
    caption = "Lines: 95 % intervals over problems; none if the result is the same for all problems."
    return Plot(figure, "pass-at-k", label, caption)
