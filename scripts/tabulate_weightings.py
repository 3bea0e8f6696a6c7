"""Print the tables of docs/weightings.md from docs/weightings.csv: `scripts/tabulate_weightings.py [REGIME RUN …]`.

With arguments, the results of finished runs are first added to the CSV file. They replace the rows with the same
regime, arm and seed. REGIME is the name of the data, tasks or tasks_noisy. A run belongs to the arm in its `tags.arm`,
or to the one of its overrides of `algo`.
"""

import csv
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from estimate_scaling import table
from omegaconf import OmegaConf

from wmtp.runtime.run_dir import SAVED_OVERRIDES
from wmtp.statistics.paired import estimate_mean_difference

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "weightings.csv"
QUALITY = ("decisive_wrong_auc", "decisive_wrong_top1", "noise_auc")
"""Measures of the weights, from the entry `weights` of summary.json."""
POLICY = ("canonical_logprob", "canonical_probability", "sampled_pass_rate", "clean_loss")
"""Measures of the last model, from the entry `last` of summary.json."""
COLUMNS = ("regime", "arm", "seed", "tokens", *QUALITY, *POLICY)
REGIMES = ("tasks", "tasks_noisy")
Row = dict[str, str]


def key_of(row: Row) -> tuple[str, ...]:
    """Return what identifies a row: its regime, arm and seed."""
    return row["regime"], row["arm"], row["seed"]


def read_run(regime: str, run: Path) -> Row:
    """Return the row of a finished run."""
    config, summary = OmegaConf.load(run / "config.yaml"), json.loads((run / "summary.json").read_text())
    overrides = dict(text.split("=", 1) for text in json.loads((run / SAVED_OVERRIDES).read_text()))
    names = [overrides.get("algo", "baseline"), overrides.get("algo/of")]
    stage = summary["pretrain"] or {"total_tokens": 0}
    measured = {name: summary["weights"].get(name) for name in QUALITY}
    if regime == "tasks_noisy":  # in the other regime, policies are trained only as long as their weights need it
        measured |= {name: summary["last"].get(f"val/{name}") for name in POLICY}
    tokens = summary["total_tokens"] + stage["total_tokens"]
    arm = config.tags.get("arm") or " ".join(filter(None, names))
    row = {"regime": regime, "arm": arm, "seed": config.seed, "tokens": tokens} | measured
    return {name: "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
            for name, value in row.items()}  # fmt: skip


def values_of(rows: Iterable[Row], arm: str, name: str) -> list[float]:
    """Return the values of a measure in the runs of an arm, ordered by seed. Runs without the value are left out."""
    chosen = sorted((row for row in rows if row["arm"] == arm and row[name]), key=lambda row: int(row["seed"]))
    return [float(row[name]) for row in chosen]


def arms_of(rows: list[Row], name: str) -> list[str]:
    """Return the arms, ordered by the mean of a measure: the highest first, those without the measure last."""
    means = {arm: np.mean(values_of(rows, arm, name) or [-np.inf]) for arm in {row["arm"] for row in rows}}
    return sorted(means, key=lambda arm: (-means[arm], arm))


def mean_with_interval(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean of values and half the width of its 95 % interval, or – if there is no value.

    >>> mean_with_interval([0.9, 0.95, 1.0])
    '0.95 ± 0.12'
    """
    if not values:
        return "–"
    estimate = estimate_mean_difference(values)
    width = "" if estimate.high is None else f" ± {estimate.high - estimate.mean:.{digits}f}"
    return f"{estimate.mean:.{digits}f}{width}"


def quality_table(rows: list[Row]) -> str:
    """Return the table of what the weights of each arm identify, best arm first."""
    header = ["arm", "runs", *(f"`{name}`" for name in QUALITY)]
    lines = []
    for arm in arms_of(rows, QUALITY[0]):
        cells = [mean_with_interval(values_of(rows, arm, name), 3) for name in QUALITY]
        lines.append([arm, sum(row["arm"] == arm for row in rows), *cells])
    return table(header, lines)


def gain_table(rows: list[Row]) -> str:
    """Return the table of the policies of each arm, compared with uniform weights and with the oracle's weights.

    All arms must have the same seeds. The best arm is first. The gain is the difference in log-probability from
    uniform weights, paired by seed. Its share of the oracle's gain has no interval, because the oracle's gain is itself
    uncertain.
    """
    logprobs, probabilities = POLICY[:2]
    uniform = np.array(values_of(rows, "baseline", logprobs))
    oracle_gain = np.mean(np.array(values_of(rows, "oracle", logprobs)) - uniform)
    unit = np.mean(values_of(rows, "baseline", probabilities))
    lines = []
    for arm in arms_of(rows, logprobs):
        own = np.array(values_of(rows, arm, logprobs))
        lines.append([
            arm, len(own), mean_with_interval(own.tolist()),
            mean_with_interval((own - uniform).tolist()), f"{100 * np.mean(own - uniform) / oracle_gain:.0f}",
            f"{np.mean(values_of(rows, arm, probabilities)) / unit:.2g}",
            mean_with_interval(values_of(rows, arm, "sampled_pass_rate"), 3),
            *(mean_with_interval(values_of(rows, arm, name)) for name in ("decisive_wrong_top1", "noise_auc")),
        ])  # fmt: skip
    header = ["arm", "runs", "log-probability", "gain", "% of the oracle's gain", "probability ÷ uniform",
              "sampled pass@1", "`decisive_wrong_top1`", "`noise_auc`"]  # fmt: skip
    return table(header, lines)


def tables() -> list[str]:
    """Return the tables of docs/weightings.md, one for each regime that has results."""
    with RESULTS.open() as file:
        rows = list(csv.DictReader(file))
    by_regime = {regime: [row for row in rows if row["regime"] == regime] for regime in REGIMES}
    functions = {"tasks": quality_table, "tasks_noisy": gain_table}
    return [functions[regime](chosen) for regime, chosen in by_regime.items() if chosen]


def main(arguments: Sequence[str]) -> None:
    """Add the rows of the given runs, if there are any, then print the tables."""
    if arguments:
        regime, *runs = arguments
        if regime not in REGIMES:
            sys.exit(f"{regime}: the first argument must be one of {', '.join(REGIMES)}")
        rows: dict[tuple[str, ...], Row] = {}
        if RESULTS.exists():
            with RESULTS.open() as file:
                rows = {key_of(row): row for row in csv.DictReader(file)}
        for run in runs:  # all are read before the file is changed
            row = read_run(regime, Path(run))
            rows[key_of(row)] = row
        with RESULTS.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows.values())
    print("\n\n".join(tables()))


if __name__ == "__main__":
    main(sys.argv[1:])
