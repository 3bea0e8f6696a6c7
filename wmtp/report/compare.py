"""From runs to a comparison: which runs count, which seeds pair, what the differences show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from wmtp.errors import InputError
from wmtp.report.comparability import common_loss, require_comparable, require_same_data
from wmtp.report.grouping import grouped
from wmtp.report.metrics import Measured, measured, pass_rates
from wmtp.report.results import (
    At,
    Comparison,
    Difference,
    GroupValues,
    Lost,
    McNemar,
    MetricComparison,
    Reach,
    Verdict,
)
from wmtp.report.run_record import RunRecord
from wmtp.report.statistics import (
    LEVEL,
    MIN_PAIRS,
    estimated,
    holm,
    mcnemar_p,
    seeds_needed,
    smallest_wilcoxon_p,
    wilcoxon_p,
)
from wmtp.report.tokens_to_target import reach

ALSO = "pass@1"
"""What is compared besides the metric that was asked for, where all runs have it."""
Seeded = dict[int, RunRecord]


@dataclass(frozen=True)
class Study:
    """Groups of runs by seed, the baseline's first."""

    baseline: str
    groups: dict[str, Seeded]
    failed: dict[str, set[int]]
    """Seeds of which a group has none but failed runs."""

    @property
    def others(self) -> list[str]:
        """The groups that are compared with the baseline."""
        return [label for label in self.groups if label != self.baseline]

    def pairs(self, label: str) -> dict[int, tuple[RunRecord, RunRecord]]:
        """The baseline's run and the group's of each seed that both have."""
        base, group = self.groups[self.baseline], self.groups[label]
        return {seed: (base[seed], group[seed]) for seed in sorted(base.keys() & group.keys())}

    def lost(self, label: str, found: Measured) -> Lost:
        """How many of a group's runs have no value."""
        group, failed = self.groups[label], len(self.failed.get(label, ()))
        return Lost(failed + sum(run not in found.values for run in group.values()), failed + len(group))


def compare(
    runs: Sequence[RunRecord], *, baseline: str = "baseline", metric: str = "val/loss", at: At = "best"
) -> Comparison:
    """Compare groups of runs with the baseline group, seed by seed.

    Raises:
        InputError: there are no groups with seeds in common, the baseline or the metric is unknown, or the runs'
            data, tokenizers or heads forbid it.
    """
    notes: list[str] = []
    done = finished(runs, notes)
    notes += require_same_data(done)
    require_comparable(metric, done)
    failed = [run for run in runs if run.status.get("state") == "FAILED"]
    study = paired(done, failed, baseline, notes)
    compared = [run for group in study.groups.values() for run in group.values()]
    asked = measured(metric, compared, at)
    also = pass_rates(1, compared) if metric != ALSO else None
    metrics = [metric_comparison(study, found, notes) for found in (asked, also) if found is not None]
    loss = common_loss(compared, metric)
    return Comparison(
        study.baseline, metrics, {label: list(group.values()) for label, group in study.groups.items()}, loss,
        reaches(study, loss, notes), list(dict.fromkeys(notes)),
    )  # fmt: skip


def finished(runs: Sequence[RunRecord], notes: list[str]) -> list[RunRecord]:
    """The runs that ended well; of the others it is noted that they are left out.

    Raises:
        InputError: none did.
    """
    done = [run for run in runs if run.status.get("state") == "FINISHED" and run.summary]
    for run in runs:
        if run not in done:
            state = str(run.status.get("state"))
            why = "it has no summary.json" if state == "FINISHED" else f"it is {state}, not FINISHED"
            notes.append(f"{run.folder} is left out: {why}")
    if not done:
        raise InputError(f"none of the {len(runs)} runs has finished; wait for them, or go on with them: resume=RUN")
    return done


def paired(runs: Sequence[RunRecord], failed: Sequence[RunRecord], baseline: str, notes: list[str]) -> Study:
    """The groups that share seeds with the baseline's; which of their seeds failed is counted.

    Raises:
        InputError: there is one group only, no such baseline, or no common seed.
    """
    groups = {label: once_per_seed(label, group, notes) for label, group in grouped(runs).items()}
    if len(groups) < 2:
        raise InputError(
            f"the {len(runs)} finished runs differ in nothing but their seed, if in that, so there is nothing to "
            "compare; name runs of another method or setting, too"
        )
    label = named(baseline, list(groups))
    base = groups.pop(label)
    kept = {label: base}
    for other, group in groups.items():
        if base.keys() & group.keys():
            kept[other] = group
            note_unpaired(label, base, other, group, notes)
        else:
            notes.append(f"{other} is left out: it has no seed in common with {label}")
    if len(kept) < 2:
        seeds = [f"{name}: seeds {listed(group)}" for name, group in {label: base, **groups}.items()]
        raise InputError("\n  ".join([
            f"no group has a seed in common with the baseline {label}; train with the same seeds", *seeds,
        ]))  # fmt: skip
    return Study(label, kept, failed_seeds(kept, failed, notes))


def failed_seeds(groups: Mapping[str, Seeded], failed: Sequence[RunRecord], notes: list[str]) -> dict[str, set[int]]:
    """The seeds of each group whose runs all failed; a group of which nothing is left is noted."""
    labels = {run: label for label, group in groups.items() for run in group.values()}
    found: dict[str, set[int]] = {}
    for name, together in grouped([*labels, *failed]).items():
        seeds = {run.seed for run in together if run not in labels}
        if label := next((labels[run] for run in together if run in labels), None):
            found[label] = seeds - groups[label].keys()
        else:
            notes.append(f"{name} is left out: {Lost(len(seeds), len(seeds))}")
    return found


def once_per_seed(label: str, runs: Sequence[RunRecord], notes: list[str]) -> Seeded:
    """A group's runs by their seeds; of several with one seed the one that was started last counts."""
    found: Seeded = {}
    for run in sorted(runs, key=lambda run: str(run.status.get("started"))):
        if (before := found.get(run.seed)) is not None:
            notes.append(f"{before.folder} is left out: {run.folder} is of {label} and seed {run.seed}, too, and later")
        found[run.seed] = run
    return dict(sorted(found.items()))


def named(baseline: str, labels: Sequence[str]) -> str:
    """The label that a user means: the whole of it, one of its parts, or anything else that only it holds.

    Raises:
        InputError: there is none, or several.
    """
    name = baseline.removeprefix("algo=")
    for fits in (
        lambda label: label == name,
        lambda label: name in label.split(", "),
        lambda label: name in label,
    ):
        found = [label for label in labels if fits(label)]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"baseline={baseline}: fits several groups; name one of them: {quoted(found)}")
    raise InputError(f"baseline={baseline}: there is no such group; the groups are {quoted(labels)}")


def quoted(labels: Sequence[str]) -> str:
    """Labels in a sentence, as they may be typed."""
    return ", ".join(f"baseline='{label}'" for label in labels)


def note_unpaired(baseline: str, base: Seeded, label: str, group: Seeded, notes: list[str]) -> None:
    """Note which seeds have no partner."""
    for one, seeds, other in (
        (baseline, base.keys() - group.keys(), label),
        (label, group.keys() - base.keys(), baseline),
    ):
        if seeds:
            notes.append(f"unpaired: {one} has seed {listed(seeds)}, {other} has not; the difference leaves it out")


def listed(seeds: Sequence[int] | Mapping[int, object] | set[int]) -> str:
    """Seeds in a sentence."""
    return ", ".join(str(seed) for seed in sorted(seeds))


def metric_comparison(study: Study, found: Measured, notes: list[str]) -> MetricComparison:
    """One metric in every group, and what the differences from the baseline show."""
    notes += found.notes
    lost = {label: study.lost(label, found) for label in study.groups}
    values = [group_values(label, group, found, lost[label]) for label, group in study.groups.items()]
    raw = {label: differences(study, label, found) for label in study.others}
    estimates = {label: estimated(list(pairs.values())) for label, pairs in raw.items() if pairs}
    if not estimates:
        raise InputError(f"metric={found.metric}: no pair of runs has a finite value; choose another metric")
    labels = list(estimates)
    signed_ranks = [wilcoxon_p(list(raw[label].values())) for label in labels]
    problems = [mcnemar(study, label, found) for label in labels]
    corrected = holm([estimates[label].p for label in labels])
    signed_ranks_corrected = holm(signed_ranks)
    problems_corrected = holm([None if test is None else test.p for test in problems])
    result = list[Difference]()
    for number, label in enumerate(labels):
        estimate, pairs = estimates[label], raw[label]
        middle = round(estimate.mean, 12) + 0.0  # what rounding leaves is no difference, and has no sign
        spread = stdev(pairs.values()) if len(pairs) > 1 else 0.0
        result.append(Difference(
            label, pairs, middle, estimate.low, estimate.high, estimate.p, corrected[number],
            signed_ranks[number], signed_ranks_corrected[number], smallest_wilcoxon_p(len(pairs)), problems[number],
            problems_corrected[number],
            verdict(raw[label], corrected[number], found.lower_is_better, lost[label], lost[study.baseline]),
            None if estimate.p is None else seeds_needed(middle, spread, len(labels)), lost[label],
            lost[study.baseline],
        ))  # fmt: skip
        note_limits(found.metric, result[-1], notes)
    notes += [
        f"{label}: {each}; {found.metric} is of those that are left" for label, each in lost.items() if each.failed
    ]
    return MetricComparison(found.metric, found.lower_is_better, found.at, values, result)


def group_values(label: str, group: Seeded, found: Measured, lost: Lost) -> GroupValues:
    """The values of a group's runs, in the order of their seeds.

    Raises:
        InputError: none of them is finite.
    """
    values = {seed: found.values[run] for seed, run in group.items() if run in found.values}
    if not values:
        raise InputError(f"metric={found.metric}: is finite in no run of {label}; choose another metric")
    deviation = stdev(values.values()) if len(values) > 1 else None
    return GroupValues(label, values, mean(values.values()), deviation, lost)


def differences(study: Study, label: str, found: Measured) -> dict[int, float]:
    """The group's value less the baseline's, for each seed for which both have one."""
    return {
        seed: found.values[run] - found.values[base]
        for seed, (base, run) in study.pairs(label).items()
        if base in found.values and run in found.values
    }


def mcnemar(study: Study, label: str, found: Measured) -> McNemar | None:
    """McNemar's test over the problems that were judged in all paired runs; None where there are none."""
    pairs = [(found.solved.get(base), found.solved.get(run)) for base, run in study.pairs(label).values()]
    known = [(base, run) for base, run in pairs if base and run]
    if not known or len(known) < len(pairs):
        return None
    common = set.intersection(*(base.keys() & run.keys() for base, run in known))
    gains = [round(sum(run[task] - base[task] for base, run in known), 9) for task in sorted(common)]
    won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    return McNemar(won, lost, len(gains) - won - lost, mcnemar_p(won, lost))


def verdict(
    pairs: Mapping[int, float], p_holm: float | None, lower_is_better: bool, lost: Lost, baseline_lost: Lost
) -> Verdict:
    """What a difference shows at the 5 % level; nothing in favour of a side that lost runs to failure."""
    if len(pairs) < MIN_PAIRS:
        return "too few seeds"
    if p_holm is None or p_holm >= LEVEL:
        return "no difference shown"
    is_better = (sum(pairs.values()) < 0) == lower_is_better
    if (lost if is_better else baseline_lost).failed:
        return "runs failed"
    return "better" if is_better else "worse"


def note_limits(metric: str, difference: Difference, notes: list[str]) -> None:
    """Note what so few pairs, or pairs that are all alike, cannot show."""
    num = len(difference.pairs)
    if num < MIN_PAIRS:
        pairs = f"{num} pair{'s' if num > 1 else ''}"
        notes.append(f"{difference.label}: {pairs} of runs say nothing of chance; train at least {MIN_PAIRS} seeds")
    elif difference.p is None:
        notes.append(f"{difference.label}: {metric} differs by the same in every seed, so chance cannot be judged")
    if num >= MIN_PAIRS and difference.wilcoxon_floor > LEVEL:
        floor = f"{difference.wilcoxon_floor:.4g}"
        notes.append(f"of {num} pairs the signed-rank test gives no p below {floor}: by itself it can show nothing")


def reaches(study: Study, metric: str, notes: list[str]) -> list[Reach]:
    """Tokens to the baseline's best loss for each other group; none where they were not recorded."""
    found = [reach(label, study.pairs(label), metric) for label in study.others]
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        notes.append(
            f"tokens to reach the baseline's best {metric} are left out: some metrics.jsonl does not record them"
        )
        return []
    return known
