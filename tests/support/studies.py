"""Example results of studies with data for every part of their page."""

import math
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev

from tests.support.fake_runs import fake_run
from wmtp.report.results import (
    Comparison,
    Difference,
    FailedRuns,
    GroupValues,
    MetricComparison,
    TokensToTarget,
    TokensToTargetPair,
    Verdict,
)
from wmtp.report.run_record import RunRecord
from wmtp.statistics.best_of_n import expected_best
from wmtp.statistics.token_factor import TokenFactor
from wmtp.statistics.variance import Component, PairingGain
from wmtp.studies.lock import StudyLock, complete_lock, new_lock
from wmtp.studies.options import Arm, StudyOptions
from wmtp.studies.results import ArmHorizons, ArmSearch, HorizonResult, PlannedPower, StudyResult, Trial

SEEDS, HORIZONS = list(range(8)), [200, 800, 3200]
NAMES = (
    "baseline", "critic", "oracle", "prior", "excess_loss", "implicit_reward", "implicit_reward_of_a_large_teacher",
    "class_conditional", "surprisal", "focal", "history", "contrast", "cleaning",
)  # fmt: skip
VERDICTS: tuple[Verdict, ...] = (
    "better", "undecided", "the same", "worse", "runs failed", "too few seeds", "better", "undecided",
)  # fmt: skip
FACTORS = (0.7, 1.04, 1.0, 1.5, 0.62, 0.85, 0.5, 0.95)
"""Factors of tokens of the arms after the baseline."""
DEPARTURES = [
    "study.effect was changed from 0.03 to 0.05 after 4 of 32 runs",
    "code: revision 1234567 instead of abcdef0 in 3 runs",
]


def example_study(folder: Path, num_arms: int, *, is_open: bool = True, departures: Sequence[str] = ()) -> StudyResult:
    """Return the result of a study with up to 13 arms, whose runs are in `folder`."""
    numbers, labels = random.Random(0), NAMES[:num_arms]
    options = study_options(labels)
    ends = {label: _ends(number, numbers, SEEDS[:5] if is_open else SEEDS) for number, label in enumerate(labels)}
    comparison = _comparison(folder, labels, ends, numbers)
    differences = comparison.metrics[0].differences
    open_arms = [each.label for each in differences if each.verdict in ("undecided", "too few seeds")]
    planned = PlannedPower(
        0.05, 0.02, 0.93, 0.81, len(SEEDS), num_arms - 1,
        {each.label: stdev(each.pairs.values()) for each in differences if len(each.pairs) > 1},
    )  # fmt: skip
    horizons = [
        ArmHorizons(label, ends[label], _factor(number) if number else None) for number, label in enumerate(labels)
    ]
    return StudyResult(
        study_lock(options), list(departures), open_arms if is_open else [], comparison,
        [_search(label, numbers) for label in labels], horizons, planned,
        {label: PairingGain(0.81, 0.19, 5.3) for label in labels[1:]},
        {"initialization": Component(2e-4, 0.5), "order of the data": Component(1.5e-4, 0.375),
         "choice of the data": Component(5e-5, 0.125)},
        num_runs=300, total_tokens=1_234_567_890, seconds=7_200.0,
    )  # fmt: skip


def study_options(labels: Sequence[str]) -> StudyOptions:
    """Return the options of a study with the given arms, of which the first is the baseline."""
    arms = {
        label: Arm(overrides=[f"algo={label}", "algo.scale=0.5"][: 1 + number % 2],
                   space={"algo.beta": "interval(0.5, 0.9)"} if number else {}, stage_1=0.25 if number == 1 else None)
        for number, label in enumerate(labels)
    }  # fmt: skip
    return StudyOptions(
        question="Does a weighting reach the baseline’s loss with fewer tokens when half of the solutions are wrong?",
        arms=arms, baseline=labels[0], overrides=["experiment=tasks", "tracking=none"],
        space={"optimizer.lr": "tag(log, interval(1e-3, 1e-2))"}, delta=0.01,
        preparations={}, metric="val/loss", at="last", sampler="random",
        search_seed=0, min_seeds=3, effect=0.05, deviation=0.02,
        horizons=HORIZONS, tuning_horizon=200, trials=16, tuning_seeds=[100, 101], judging_seeds=SEEDS, variance_runs=3,
    )  # fmt: skip


def study_lock(options: StudyOptions) -> StudyLock:
    """Return a lock with these options."""
    data = {label: {"train_fingerprint": "a" * 64, "validation_fingerprint": "b" * 64, "tokenizer": "bpe"}
            for label in options.arms}  # fmt: skip
    configs = {label: {"algo.name": label} for label in options.arms}
    return complete_lock(new_lock("tasks_noisy", options), data, configs, {})


def _ends(number: int, numbers: random.Random, used: list[int]) -> list[HorizonResult]:
    """Return the end values of an arm. An undecided arm has the seeds `used`; one arm has only one seed."""
    verdict = VERDICTS[(number - 1) % len(VERDICTS)] if number else None
    seeds = {"too few seeds": SEEDS[:1], "undecided": used}.get(verdict or "", SEEDS)
    found = []
    for updates in HORIZONS:
        tokens = updates * 4_000 * (1.25 if number == 1 else 1.0)
        level = 0.5 + 18 * (tokens / _true_factor(number)) ** -0.22
        shared = random.Random(updates)
        values = {seed: level + shared.gauss(0, 0.02) + numbers.gauss(0, 0.008) for seed in seeds}
        found.append(HorizonResult(updates, tokens, values))
    return found


def _true_factor(number: int) -> float:
    return FACTORS[(number - 1) % len(FACTORS)] if number else 1.0


def _factor(number: int) -> TokenFactor | None:
    factor = _true_factor(number)
    return TokenFactor(
        factor,
        0.85 * factor,
        1.2 * factor if factor < 1.5 else None,
        len(SEEDS),
        2 * (factor > 1),
        int(number % 4 == 2),
    )


def _search(label: str, numbers: random.Random) -> ArmSearch:
    trials = []
    for number in range(16):
        rate = 10 ** numbers.uniform(-3, -2)
        value = 1.7 + (math.log10(rate) + 2.5) ** 2 + numbers.gauss(0, 0.03) + (5.0 if number == 3 else 0.0)
        settings = {"optimizer.lr": repr(rate)} | ({} if label == "baseline" else {"algo.beta": repr(numbers.random())})
        is_failed = number == 7 and label == "critic"
        trials.append(Trial(number, settings, {100: value, 101: None if is_failed else value + 0.02}))
    known = [trial for trial in trials if trial.mean is not None]
    best = expected_best([trial.mean or 0.0 for trial in known], lower_is_better=True)
    return ArmSearch(label, trials, min(known, key=lambda trial: trial.mean or 0.0), best)


def _comparison(
    folder: Path, labels: Sequence[str], ends: dict[str, list[HorizonResult]], numbers: random.Random
) -> Comparison:
    groups: dict[str, list[RunRecord]] = {}
    for label in labels:
        for seed, end in ends[label][-1].values.items():
            run = folder / "judging" / label / f"updates-{HORIZONS[-1]}" / f"seed-{seed}"
            losses = [end + 3 * math.exp(-step / 3) for step in range(1, 13)]
            fake_run(run, algo=label, seed=seed, val_losses=losses, stage_tokens=3_000 if label == "critic" else None)
            (run / "report.html").write_text("<!doctype html><title>run</title>")
            groups.setdefault(label, []).append(RunRecord(run))
    values = {label: ends[label][-1].values for label in labels}
    rates = {label: {seed: 0.6 / value for seed, value in each.items()} for label, each in values.items()}
    metrics = [_metric("val/loss", True, values, 0.01), _metric("pass@1", False, rates, None)]
    pairs = [TokensToTargetPair(seed, 0.7, 150_000.0, 100_000.0 + 5_000 * seed, 0, 3_000) for seed in range(5)]
    reach = [TokensToTarget(label, "val/loss", pairs, 0, 0.75, True, 0.68, 0.8) for label in labels[1:]]
    return Comparison(labels[0], metrics, groups, "val/loss", reach, ["Seed 7 of critic has no partner."])


def _metric(
    name: str, lower_is_better: bool, values: dict[str, dict[int, float]], delta: float | None
) -> MetricComparison:
    base, *others = values
    groups = [
        GroupValues(label, each, mean(each.values()), stdev(each.values()) if len(each) > 1 else None, FailedRuns(0, 8))
        for label, each in values.items()
    ]
    differences = []
    for number, label in enumerate(others):
        pairs = {seed: value - values[base][seed] for seed, value in values[label].items()}
        spread = 3 * stdev(pairs.values()) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
        center, verdict = mean(pairs.values()), VERDICTS[number % len(VERDICTS)]
        failed = FailedRuns(1, 8) if verdict == "runs failed" else FailedRuns(0, 8)
        differences.append(Difference(
            label=label, pairs=pairs, mean=center, low=None if spread is None else center - spread,
            high=None if spread is None else center + spread, level=0.05 / len(others),
            p=0.01, p_holm=0.02, wilcoxon=0.0078, wilcoxon_holm=0.0156, wilcoxon_floor=0.0078, permutation=0.0078,
            mcnemar=None, verdict=verdict, is_within_delta=None if delta is None else verdict == "the same",
            seeds_needed=None if len(pairs) < 2 else 23, lost=failed, baseline_lost=FailedRuns(0, 8),
        ))  # fmt: skip
    return MetricComparison(name, lower_is_better, "last model", delta, groups, differences)
