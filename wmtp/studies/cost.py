"""The cost of a study before it runs: numbers of runs, tokens and hours, and what it can show."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console

from wmtp.config.schema import CheckedConfig, ConfigError
from wmtp.report.tables import format_count, new_table
from wmtp.runtime.processes import num_cores
from wmtp.studies.collect import plan_power
from wmtp.studies.options import StudyOptions
from wmtp.studies.plan import Plan, StudyJob
from wmtp.studies.start import Compose, example_overrides, is_about_preparation

START_S = 12
"""Time in seconds from the start of a run's process to its first update, and from its last update to its end."""
MEASURED_UPDATES = 6


@dataclass(frozen=True)
class Speed:
    """The speed of training the baseline on this machine."""

    seconds_per_update: float
    tokens_per_update: float


@dataclass(frozen=True)
class PhaseCost:
    """The number of runs in a phase of a study, and the number of their updates."""

    name: str
    runs: int
    updates: int


def print_cost(options: StudyOptions, folder: Path, parallel: int, compose: Compose, console: Console) -> None:
    """Print how many runs, updates, tokens and hours a study takes, and what it can show.

    The speed is measured with a few updates of the baseline. If it needs a preparation that has not run, then the
    preparation is measured. Arms that need additional forward passes take longer.
    """
    plan = Plan(options, folder)
    measured, checked = _measurable_run(plan, compose)
    speed = measure_speed(checked, folder, max(1, num_cores() // parallel))
    at_most = [*phase_costs(plan, len(options.judging_seeds))]
    at_least = [*phase_costs(plan, options.looks[0])]
    title = f"{len(options.arms)} arms, {format_count(parallel, 'run')} at a time"
    table = new_table(title, "runs", "updates", "tokens", "hours")
    table.columns[0].header = "phase"
    for phase in at_most:
        table.add_row(phase.name, *_cells([phase], speed, parallel))
    table.add_row("all, at most", *_cells(at_most, speed, parallel), end_section=True)
    table.add_row("all, if decided at the first look", *_cells(at_least, speed, parallel))
    console.print(table)
    text = f"{speed.seconds_per_update:.2f} s and {speed.tokens_per_update:,.0f} tokens per update of {measured}"
    console.print(f"Measured: {text}; {START_S} s are added per run for its start and end.", highlight=False)
    console.print(describe_power(options), highlight=False)


def _measurable_run(plan: Plan, compose: Compose) -> tuple[str, CheckedConfig]:
    """Return what can be measured, with its config: the baseline, or the last preparation that can run now."""
    baseline = compose(example_overrides(plan, plan.options.baseline))
    if not any(is_about_preparation(issue, plan) for issue in baseline.issues):
        return "the baseline", baseline
    for job in reversed([job for job in plan.preparations() if job.command == "train"]):
        if not (checked := compose(job.overrides)).issues:
            return f"the preparation {job.folder.name}", checked
    return "the baseline", baseline


def describe_power(options: StudyOptions) -> str:
    """Return sentences about what a study can show with all its seeds, with a warning if this is too little."""
    planned = plan_power(options)
    text = (
        f"With {planned.num_seeds} seeds and {planned.num_comparisons} comparisons, a difference of "
        f"{planned.effect:g} is shown with a probability of {planned.power:.0%} if paired differences have a "
        f"deviation of {planned.deviation:g}."
    )
    if planned.equivalence_power is not None:
        text += f' "The same within {options.delta:g}" is shown with {planned.equivalence_power:.0%} if there is none.'
    if planned.power < 0.8:
        text += " WARNING: this is less than 80 %; add judging_seeds, or declare a larger effect."
    elif planned.equivalence_power is not None and planned.equivalence_power < 0.8:
        text += " Most arms without a difference will stay undecided; this would need more judging_seeds."
    return text


def phase_costs(plan: Plan, num_seeds: int) -> Iterable[PhaseCost]:
    """Yield the number of runs and updates of each phase, if all arms are judged with `num_seeds` seeds."""
    options = plan.options
    preparations = [job for job in plan.preparations() if job.command == "train"]
    if preparations:
        yield _phase("preparations", preparations)
    labels = list(options.arms)
    trials = [job for label in labels for n in range(options.trials) for job in plan.trial(label, n, {})]
    yield _phase(f"search, {options.trials} trials", trials)
    seeds = options.judging_seeds[:num_seeds]
    yield _phase(f"judged, {num_seeds} seeds", [job for label in labels for s in seeds
                                                for job in plan.judged(label, {}, s)])  # fmt: skip
    if variance := list(plan.variance({})):
        yield _phase("sources of variance", variance)


def _phase(name: str, jobs: list[StudyJob]) -> PhaseCost:
    return PhaseCost(name, len(jobs), sum(map(_num_updates, jobs)))


def _num_updates(job: StudyJob) -> int:
    """Return the number of updates of a run in both stages, as far as its overrides limit them."""
    limits = dict(override.partition("=")[::2] for override in job.overrides)
    return sum(int(limits[key]) for key in ("max_steps", "pretrain.max_steps") if key in limits)


def _cells(phases: list[PhaseCost], speed: Speed, parallel: int) -> list[str]:
    runs, updates = sum(phase.runs for phase in phases), sum(phase.updates for phase in phases)
    hours = (updates * speed.seconds_per_update + runs * START_S) / parallel / 3600
    return [f"{runs:,}", f"{updates:,}", f"{updates * speed.tokens_per_update / 1e6:,.1f} M", f"{hours:.1f}"]


def measure_speed(checked: CheckedConfig, folder: Path, num_threads: int) -> Speed:
    """Measure some updates of a run with the given number of threads.

    Raises:
        ConfigError: the config has issues, for example because it needs a preparation that does not exist yet.
    """
    import torch

    from wmtp.training.builders import build_objective, build_policy, build_sample_evaluation, build_trainer
    from wmtp.training.start import build_stage, read_components

    if checked.issues:
        raise ConfigError(checked.issues)
    config = checked.config
    torch.set_num_threads(num_threads)
    components = read_components(config, folder, checked.inputs)
    model = build_policy(config, components, None)
    objective = build_objective(config, components, components.data, build_stage(config, components))
    samples = build_sample_evaluation(config, folder, components)
    trainer = build_trainer(config, folder, components.hardware, components.data, model, objective, samples)
    times = []
    for _ in range(MEASURED_UPDATES):
        started = time.perf_counter()
        trainer.train_update()
        times.append(time.perf_counter() - started)
    return Speed(median(times), trainer.position.tokens / MEASURED_UPDATES)
