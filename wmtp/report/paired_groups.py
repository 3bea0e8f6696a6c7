"""Groups of finished runs, which are paired by seed with the runs of a baseline group."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from wmtp.errors import InputError
from wmtp.report.metrics import MetricValues
from wmtp.report.results import FailedRuns
from wmtp.report.run_record import RunRecord

RunsBySeed = dict[int, RunRecord]


@dataclass(frozen=True)
class PairedGroups:
    """Runs to compare, by group and by seed. The baseline group is the first group."""

    baseline: str
    groups: dict[str, RunsBySeed]
    failed: dict[str, set[int]]
    """For each group, the seeds that have a failed run but no finished run."""

    @property
    def others(self) -> list[str]:
        """Labels of the groups that are compared with the baseline."""
        return [label for label in self.groups if label != self.baseline]

    def pairs(self, label: str) -> dict[int, tuple[RunRecord, RunRecord]]:
        """Return the pair (run of the baseline, run of the group `label`) for each seed that both have in common."""
        base, group = self.groups[self.baseline], self.groups[label]
        return {seed: (base[seed], group[seed]) for seed in sorted(base.keys() & group.keys())}

    def failed_runs(self, label: str, metric: MetricValues, seeds: Collection[int] | None = None) -> FailedRuns:
        """Return how many runs of the group `label` have no value of the metric. None: runs with any seed."""
        group = {seed: run for seed, run in self.groups[label].items() if seeds is None or seed in seeds}
        failed = sum(1 for seed in self.failed.get(label, ()) if seeds is None or seed in seeds)
        return FailedRuns(failed + sum(run not in metric.values for run in group.values()), failed + len(group))


def finished_runs(runs: Sequence[RunRecord], notes: list[str]) -> list[RunRecord]:
    """Return the runs that finished, and add a note to `notes` for each run that did not finish.

    Raises:
        InputError: no run has finished.
    """
    done = [run for run in runs if run.status.get("state") == "FINISHED" and run.summary]
    for run in runs:
        if run not in done:
            state = str(run.status.get("state"))
            reason = "it has no summary.json" if state == "FINISHED" else f"it is {state}, not FINISHED"
            notes.append(f"{run.folder} is left out: {reason}")
    if not done:
        raise InputError(
            f"none of the {len(runs)} runs has finished; wait, or resume them: python -m wmtp.train resume=RUN"
        )
    return done


def pair_by_seed(
    members: Mapping[str, Sequence[RunRecord]], baseline: str, failed: Mapping[str, set[int]], notes: list[str]
) -> PairedGroups:
    """Return the baseline group and all groups that have a seed in common with it.

    Args:
        members: finished runs of each group.
        baseline: label of the baseline group, or a part of that label that no other label contains.
        failed: for each group, the seeds of its failed runs.
        notes: list to which notes on excluded runs and groups are added.

    Raises:
        InputError: there is only one group, the baseline is unknown, or no group has a seed in common with the
            baseline.
    """
    groups = {label: latest_run_per_seed(label, group, notes) for label, group in members.items()}
    if len(groups) < 2:
        raise InputError(
            f"finished runs: {sum(map(len, members.values()))}, but they form only one group, because their configs "
            "differ at most in the seed; add runs of another method or setting"
        )
    label = find_baseline(baseline, list(groups))
    base = groups.pop(label)
    kept = {label: base}
    for other, group in groups.items():
        if base.keys() & group.keys():
            kept[other] = group
            add_unpaired_notes(label, base, other, group, notes)
        else:
            notes.append(f"{other} is left out: it has no seed in common with {label}")
    if len(kept) < 2:
        seeds = [f"{name}: seeds {format_seeds(group)}" for name, group in {label: base, **groups}.items()]
        raise InputError("\n  ".join([
            f"no group has a seed in common with the baseline {label}; train with the same seeds", *seeds,
        ]))  # fmt: skip
    lost = {name: failed.get(name, set()) - group.keys() for name, group in kept.items()}
    return PairedGroups(label, kept, lost)


def latest_run_per_seed(label: str, runs: Sequence[RunRecord], notes: list[str]) -> RunsBySeed:
    """Return a dictionary from each seed to the run of the group with that seed.

    If several runs have the same seed, the run that started last is kept. A note is added for each of the others.
    """
    found: RunsBySeed = {}
    for run in sorted(runs, key=lambda run: str(run.status.get("started"))):
        if (before := found.get(run.seed)) is not None:
            notes.append(
                f"{before.folder} is left out: {run.folder} of {label} also has seed {run.seed}, and started later"
            )
        found[run.seed] = run
    return dict(sorted(found.items()))


def find_baseline(baseline: str, labels: Sequence[str]) -> str:
    """Return the group label that `baseline` refers to.

    A label that is equal to `baseline` has the highest priority. A label that has `baseline` as one of its
    comma-separated parts has the second priority, and a label that contains `baseline` anywhere has the third.

    Raises:
        InputError: no label matches, or several labels match with the same highest priority.
    """
    name = baseline.removeprefix("algo=")
    for matches in (
        lambda label: label == name,
        lambda label: name in label.split(", "),
        lambda label: name in label,
    ):
        found = [label for label in labels if matches(label)]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(
                f"baseline={baseline}: matches several groups; choose one of them: {format_baselines(found)}"
            )
    raise InputError(f"baseline={baseline}: there is no such group; the groups are {format_baselines(labels)}")


def format_baselines(labels: Sequence[str]) -> str:
    """Return the command-line override `baseline='LABEL'` for each label, separated by commas."""
    return ", ".join(f"baseline='{label}'" for label in labels)


def add_unpaired_notes(baseline: str, base: RunsBySeed, label: str, group: RunsBySeed, notes: list[str]) -> None:
    """Add a note on the seeds that only the baseline has, and a note on the seeds that only the other group has."""
    for one, seeds, other in (
        (baseline, base.keys() - group.keys(), label),
        (label, group.keys() - base.keys(), baseline),
    ):
        if seeds:
            notes.append(
                f"unpaired: {one} has seed {format_seeds(seeds)}, {other} does not; it is excluded from the difference"
            )


def format_seeds(seeds: Sequence[int] | Mapping[int, object] | set[int]) -> str:
    """Return sorted seeds, separated by commas."""
    return ", ".join(str(seed) for seed in sorted(seeds))
