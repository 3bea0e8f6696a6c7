"""Collection of the results of a study from the folders of its runs."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

from wmtp.errors import InputError
from wmtp.report.comparability import require_same_data
from wmtp.report.compare import compare_groups
from wmtp.report.differences import DecisionRule
from wmtp.report.measures import measured_values
from wmtp.report.metrics import is_lower_better
from wmtp.report.paired_groups import pair_by_seed
from wmtp.report.results import Comparison
from wmtp.report.run_record import RunRecord
from wmtp.report.tokens_to_target import pretrain_tokens
from wmtp.statistics.best_of_n import expected_best
from wmtp.statistics.power import planned_equivalence_power, planned_power
from wmtp.statistics.token_factor import HorizonPoint, TokenFactor, mean_token_factor, token_ratio
from wmtp.statistics.variance import Component, PairingGain, pairing_gain, variance_components
from wmtp.studies.departures import find_departures, read_settings
from wmtp.studies.lock import FILE_NAME, read_lock
from wmtp.studies.options import StudyOptions
from wmtp.studies.plan import JUDGING, PREPARATIONS, SOURCES, TUNING, VARIANCE, Plan, has_failed
from wmtp.studies.results import FINAL_VERDICTS, ArmHorizons, ArmSearch, HorizonResult, PlannedPower, StudyResult, Trial

MIN_PAIRS_FOR_CORRELATION = 3
"""Minimum number of pairs for an estimate of what pairing by seed saves."""


class StudyFolder:
    """The runs in the folder of a study."""

    def __init__(self, folder: Path) -> None:
        """Read the lock of a study.

        Raises:
            InputError: the folder contains no lock, or the lock is damaged.
        """
        lock = read_lock(folder)
        if lock is None:
            raise InputError(f"{folder}: is not the folder of a study: it has no {FILE_NAME}")
        self.folder, self.lock, self.options = folder, lock, lock.options
        self.plan = Plan(lock.options, folder)
        self.lower_is_better = is_lower_better(lock.options.metric)

    def value(self, run: RunRecord) -> float | None:
        """Return the primary metric of a finished run. None if the run has not finished, or has no finite value.

        Raises:
            InputError: the run has finished and does not measure the metric.
        """
        if run.status.get("state") != "FINISHED" or not run.summary:
            return None
        measured = measured_values(run, self.options.at)
        if self.options.metric not in measured:
            known = ", ".join(sorted(measured))
            raise InputError(f"study.metric={self.options.metric}: {run.folder} does not measure it; it has {known}")
        value = measured[self.options.metric]
        return value if math.isfinite(value) else None

    def search(self, label: str) -> ArmSearch:
        """Return the trials of an arm."""
        folder = self.folder / TUNING / label
        numbers = sorted(int(path.name.removeprefix("trial-")) for path in folder.glob("trial-*"))
        trials = []
        for number in numbers:
            runs = _runs(self.plan.trial_folder(label, number))
            if runs:
                settings = read_settings(runs[0], self.options.space_of(label))
                values = {run.seed: self.value(run) for run in runs}
                trials.append(Trial(number, settings, dict.fromkeys(self.options.tuning_seeds) | values))
        known = [(trial.mean, trial) for trial in trials if trial.mean is not None]
        best = min if self.lower_is_better else max
        chosen = best(known, key=lambda pair: pair[0])[1] if known else None
        curve = expected_best([mean for mean, _ in known], lower_is_better=self.lower_is_better) if known else []
        return ArmSearch(label, trials, chosen, curve)

    def judged(self, label: str, updates: int) -> dict[int, RunRecord]:
        """Return the ended judged runs of an arm with a horizon, by seed in the order of the lock."""
        runs = {run.seed: run for run in _runs(self.plan.judged_folder(label, updates)) if _has_ended(run)}
        return {seed: runs[seed] for seed in self.options.judging_seeds if seed in runs}

    def comparison(self, num_seeds: int | None = None) -> Comparison | None:
        """Return the comparison of the judged runs with the longest horizon.

        Args:
            num_seeds: number of seeds to use, or None for all.

        Returns:
            The comparison, or None if there are not yet two runs that can be compared.

        Raises:
            InputError: the runs have different validation data, or do not measure the primary metric.
        """
        longest, seeds = max(self.options.horizons), tuple(self.options.judging_seeds[:num_seeds])
        ended = {label: self.judged(label, longest) for label in self.options.arms}
        ended = {label: {s: run for s, run in runs.items() if s in seeds} for label, runs in ended.items()}
        groups = {label: [run for run in runs.values() if self.value(run) is not None] for label, runs in ended.items()}
        groups = {label: runs for label, runs in groups.items() if runs}
        failed = {label: {seed for seed, run in runs.items() if run not in groups.get(label, ())}
                  for label, runs in ended.items()}  # fmt: skip
        if self.options.baseline not in groups or len(groups) < 2:
            return None
        base = num_reached(seeds, ended[self.options.baseline])
        reached = {label: min(base, num_reached(seeds, runs)) for label, runs in ended.items()}
        notes = require_same_data([run for runs in groups.values() for run in runs])
        notes += [f"{label} has no judged run with a value" for label in self.options.arms if label not in groups]
        rule = DecisionRule(self.options.delta, self.options.looks, seeds, reached, len(self.options.others))
        # without its notes on seeds that only the baseline has: arms with a verdict get no more seeds
        paired = pair_by_seed(groups, self.options.baseline, failed, [])
        return compare_groups(paired, self.options.metric, self.options.at, rule, notes)

    def open_arms(self, comparison: Comparison | None, num_seeds: int | None = None) -> list[str]:
        """Return the arms without a final verdict, if not all judging seeds have been used.

        Args:
            comparison: the comparison of the runs so far.
            num_seeds: number of seeds that have been used. None: as many as have ended for each arm.
        """
        found = {each.label: each for each in comparison.metrics[0].differences} if comparison else {}
        longest = max(self.options.horizons)
        result = []
        for label in self.options.others:
            used = num_reached(self.options.judging_seeds, self.judged(label, longest))
            num = num_seeds or used
            # an arm without any value at the first look has only failed runs, if there is a baseline to compare it with
            has_failed_only = comparison is not None and num >= self.options.looks[0]
            is_final = found[label].verdict in FINAL_VERDICTS if label in found else has_failed_only
            if not is_final and num < len(self.options.judging_seeds):
                result.append(label)
        return result

    def horizons(self) -> list[ArmHorizons]:
        """Return the end values of all arms at all horizons, with the factors of tokens."""
        points = {label: self._points(label) for label in self.options.arms}
        results = []
        for label, runs in points.items():
            by_horizon = [
                HorizonResult(updates, fmean(point.tokens for point in found.values()),
                              {seed: point.loss for seed, point in found.items()})
                for updates, found in sorted(runs.items()) if found
            ]  # fmt: skip
            factor = None if label == self.options.baseline else self._factor(points[self.options.baseline], runs)
            results.append(ArmHorizons(label, by_horizon, factor))
        return results

    def _points(self, label: str) -> dict[int, dict[int, HorizonPoint]]:
        """Return the tokens and the end value of each judged run of an arm, by horizon and seed."""
        found: dict[int, dict[int, HorizonPoint]] = {}
        for updates in self.options.horizons:
            runs = self.judged(label, updates)
            values = {seed: (run, self.value(run)) for seed, run in runs.items()}
            found[updates] = {
                seed: HorizonPoint(_tokens(run), value) for seed, (run, value) in values.items() if value is not None
            }
        return found

    def _factor(
        self, baseline: dict[int, dict[int, HorizonPoint]], arm: dict[int, dict[int, HorizonPoint]]
    ) -> TokenFactor | None:
        """Return the factor of tokens of an arm. It uses the seeds that have both arms' runs at all horizons."""
        if len(self.options.horizons) < 2:
            return None
        horizons, every = sorted(self.options.horizons), [*baseline.values(), *arm.values()]
        seeds = [seed for seed in self.options.judging_seeds if all(seed in found for found in every)]
        pairs = [[[self._loss_point(runs[each][seed]) for each in horizons] for runs in (baseline, arm)]
                 for seed in seeds]  # fmt: skip
        ratios = [token_ratio(base, own) for base, own in pairs if has_curve(base) and has_curve(own)]
        return mean_token_factor(ratios) if ratios else None

    def _loss_point(self, point: HorizonPoint) -> HorizonPoint:
        """Return a point whose value is better if it is lower. A log-probability becomes a loss."""
        return point if self.lower_is_better else replace(point, loss=-point.loss)

    def result(self) -> StudyResult:
        """Return everything that the study has found so far."""
        searches = [self.search(label) for label in self.options.arms]
        problems = list[str]()
        try:
            comparison = self.comparison()
        except InputError as error:
            comparison, problems = None, [f"the runs cannot be compared: {error}"]
        runs = [run for phase in (TUNING, JUDGING) for run in _runs(self.folder / phase)]
        extra = [run for phase in (VARIANCE, PREPARATIONS) for run in _runs(self.folder / phase)]
        finished = [run for run in (*runs, *extra) if run.status.get("state") == "FINISHED" and run.summary]
        return StudyResult(
            self.lock, [*problems, *find_departures(self.lock, self.folder, runs, searches)],
            self.open_arms(comparison), comparison, searches, self.horizons(), self._planned(comparison),
            self._pairing(comparison), self._variance(), len(finished), sum(_tokens(run) for run in finished),
            sum(map(_seconds, finished)),
        )  # fmt: skip

    def _planned(self, comparison: Comparison | None) -> PlannedPower:
        observed = {
            each.label: stdev(each.pairs.values())
            for each in (comparison.metrics[0].differences if comparison else ())
            if len(each.pairs) > 1
        }
        return plan_power(self.options, observed)

    def _pairing(self, comparison: Comparison | None) -> dict[str, PairingGain]:
        if comparison is None:
            return {}
        values = {group.label: group.values_by_seed for group in comparison.metrics[0].groups}
        base, found = values[self.options.baseline], {}
        for label in values.keys() - {self.options.baseline}:
            seeds = [seed for seed in base if seed in values[label]]
            if len(seeds) >= MIN_PAIRS_FOR_CORRELATION:
                found[label] = pairing_gain([base[s] for s in seeds], [values[label][s] for s in seeds])
        return {label: found[label] for label in values if label in found}

    def _variance(self) -> dict[str, Component]:
        """Return the variance of the baseline by its source, or nothing if a source has fewer than two values."""
        groups = {}
        for source in SOURCES:
            values = [self.value(run) for run in _runs(self.folder / VARIANCE / source.replace(" ", "-"))]
            groups[source] = [value for value in values if value is not None]
        return variance_components(groups) if all(len(values) > 1 for values in groups.values()) else {}


def has_curve(points: Sequence[HorizonPoint]) -> bool:
    """Return whether the end values of a run at several horizons are losses over increasing numbers of tokens."""
    return all(point.loss > 0 for point in points) and all(a.tokens < b.tokens for a, b in pairwise(points))


def plan_power(options: StudyOptions, observed: dict[str, float] | None = None) -> PlannedPower:
    """Return what a study can show with all its judging seeds, if its assumed deviation is true."""
    num_comparisons, looks = len(options.others), options.looks
    power = planned_power(options.effect / options.deviation, looks, num_comparisons)
    same = None
    if options.delta is not None:
        same = planned_equivalence_power(options.delta / options.deviation, looks, num_comparisons)
    seeds = len(options.judging_seeds)
    return PlannedPower(options.effect, options.deviation, power, same, seeds, num_comparisons, observed or {})


def num_reached(seeds: Sequence[int], ended: Iterable[int]) -> int:
    """Return the number of seeds at the beginning of a list that have all ended.

    >>> num_reached([3, 1, 2], {1, 3})
    2
    """
    found = set(ended)
    return next((number for number, seed in enumerate(seeds) if seed not in found), len(seeds))


def collect_study(folder: Path) -> StudyResult:
    """Return everything that the study in a folder has found so far.

    Raises:
        InputError: the folder contains no study, or a run does not measure the primary metric.
    """
    return StudyFolder(folder).result()


def is_study(folder: Path) -> bool:
    """Return whether a folder contains a study."""
    return (folder / FILE_NAME).exists()


def _runs(folder: Path) -> list[RunRecord]:
    """Return all runs below a folder. Folders of attempts that were started again are left out."""
    paths = sorted(path.parent for path in folder.rglob("status.json"))
    return [
        RunRecord(path)
        for path in paths
        if (path / "config.yaml").exists() and not any(".attempt-" in part for part in path.parts)
    ]


def _has_ended(run: RunRecord) -> bool:
    return run.status.get("state") == "FINISHED" or has_failed(run.status)


def _tokens(run: RunRecord) -> int:
    return int(run.summary.get("total_tokens") or 0) + pretrain_tokens(run)


def _seconds(run: RunRecord) -> float:
    """Return the time between the last start of a run and its end."""
    started, ended = run.status.get("started"), run.status.get("ended")
    if not started or not ended:
        return 0.0
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()
