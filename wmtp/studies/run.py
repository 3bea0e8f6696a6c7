"""Execution of a study: preparations, lock, search, and judged runs until every verdict is reached."""

from pathlib import Path

from wmtp.errors import InputError
from wmtp.report.tables import format_count
from wmtp.runtime.console import Console
from wmtp.studies.collect import StudyFolder
from wmtp.studies.jobs import JobRunner, job_state
from wmtp.studies.lock import StudyLock
from wmtp.studies.plan import Plan
from wmtp.studies.results import StudyResult
from wmtp.studies.search import Search
from wmtp.studies.start import Compose, finish_lock


class StudyRun:
    """The run of a study in its folder. Everything that was done before is kept, so it can be started again."""

    def __init__(self, folder: Path, lock: StudyLock, parallel: int, console: Console) -> None:
        self.folder, self.lock, self.options = folder, lock, lock.options
        self.plan, self.console = Plan(lock.options, folder), console
        self.jobs = JobRunner(folder, parallel, console)

    def run(self, compose: Compose) -> StudyResult:
        """Run the study to its end, and return its result.

        Raises:
            InputError: a run was refused, or a preparation or all trials of an arm failed.
            ProcessFailed: a run was killed.
            InterruptedRun: a signal was received.
        """
        for job in self.plan.preparations():  # one after the other, because a job may need an earlier one
            self.jobs.run([job], "Preparation")
            if job_state(job) == "FAILED":
                log = self.jobs.console_file(job)
                raise InputError(f"{job.folder}: the preparation failed; see {log}; to repeat it, delete its folder")
        self.lock = finish_lock(self.folder, self.lock, self.plan, compose)
        self.results = StudyFolder(self.folder)
        settings = self._search()
        self._judge(settings)
        self.jobs.run(self.plan.variance(settings[self.options.baseline]), "Sources of variance")
        return self.results.result()

    def _search(self) -> dict[str, dict[str, object]]:
        """Run the trials of all arms, and return the best settings of each arm.

        All arms make a trial at the same time, and then the next one, so that a sampler knows all earlier values.
        """
        search = Search(self.folder, self.options, lower_is_better=self.results.lower_is_better)
        for number in range(self.options.trials):
            settings = {label: search.settings(label, number) for label in self.options.arms}
            jobs = [job for label, chosen in settings.items() for job in self.plan.trial(label, number, chosen)]
            self.jobs.run(jobs, f"Search, trial {number + 1} of {self.options.trials}")
            for label in self.options.arms:
                trials = {trial.number: trial for trial in self.results.search(label).trials}
                search.record(label, number, trials[number].mean if number in trials else None)
        best = {label: self.results.search(label).chosen for label in self.options.arms}
        if failed := [label for label, trial in best.items() if trial is None]:
            remedy = "look at the logs in its folder, and choose another space in a new study"
            raise InputError(f"all trials of {', '.join(failed)} failed; {remedy}")
        return {label: search.settings(label, trial.number) for label, trial in best.items() if trial is not None}

    def _judge(self, settings: dict[str, dict[str, object]]) -> None:
        """Run judged seeds one after the other, until every arm has a final verdict or no seed is left.

        An arm with a final verdict gets no further seeds.
        """
        seeds, open_arms = self.options.judging_seeds, self.options.others
        for look, size in enumerate(self.options.looks, 1):
            self._run_seeds(settings, [self.options.baseline, *open_arms], seeds[:size], look)
            comparison = self.results.comparison(size)
            before, open_arms = open_arms, self.results.open_arms(comparison, size)
            differences = comparison.metrics[0].differences if comparison else []
            verdicts = {each.label: each.verdict for each in differences}
            decided = [label for label in before if label not in open_arms]
            text = ", ".join(f"{label} {verdicts.get(label, 'failed')}" for label in decided) or "no new verdict"
            text = f"Look {look} at {size} seeds: {text}; still open: {format_count(len(open_arms), 'arm')}"
            self.console.print(text, highlight=False, soft_wrap=True)
            if not open_arms:
                return

    def _run_seeds(self, settings: dict[str, dict[str, object]], arms: list[str], seeds: list[int], look: int) -> None:
        """Run the judged runs of some arms with all horizons and the given seeds."""
        jobs = [job for seed in seeds for label in arms for job in self.plan.judged(label, settings[label], seed)]
        self.jobs.run(jobs, f"Judged runs, look {look} of {len(self.options.looks)}")
