"""The search for the settings of each arm, with Optuna. Its trials are in a journal file in the study's folder."""

import hashlib
from pathlib import Path
from typing import Literal

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from wmtp.studies.options import StudyOptions
from wmtp.studies.space import parse_space

FILE_NAME = "search.log"
"""Name of the journal file. `optuna-dashboard` shows it."""
RANDOM_TRIALS = 3
"""Number of an arm's first trials that TPE draws at random, because a model of the values needs some of them."""


class Search:
    """The trials of all arms of a study.

    The settings of a trial depend on the search seed, the number of the trial and, for TPE, on the values of the arm's
    earlier trials. So an interrupted search continues with the same trials as one that was not interrupted. In random
    trials, all arms get the same values of the settings that they share: otherwise, with few trials, an arm could win
    because its random learning rates are better.
    """

    def __init__(self, folder: Path, options: StudyOptions, *, lower_is_better: bool) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._options = options
        self._direction: Literal["minimize", "maximize"] = "minimize" if lower_is_better else "maximize"
        self._storage = JournalStorage(JournalFileBackend(str(folder / FILE_NAME)))

    def settings(self, label: str, number: int) -> dict[str, object]:
        """Return the settings of a trial of an arm. All earlier trials of the arm must have been recorded."""
        study = self._study(label, number)
        known = study.get_trials(deepcopy=False)
        if number < len(known):
            return dict(known[number].params)
        assert number == len(known), "trials are asked for in order"
        copy = optuna.create_study(sampler=self._sampler(number), direction=self._direction)
        copy.add_trials(known)
        asked = copy.ask(parse_space(self._options.space_of(label)))
        # in one entry of the journal, so that a process that is killed leaves no trial without settings
        trial = optuna.trial.create_trial(
            state=TrialState.RUNNING, params=asked.params, distributions=asked.distributions
        )
        study.add_trial(trial)
        return dict(asked.params)

    def record(self, label: str, number: int, value: float | None) -> None:
        """Record the value of a trial. None means that it failed. A trial that was recorded before is not changed."""
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
        self._study(label, number).tell(number, value, state=state, skip_if_finished=True)

    def _study(self, label: str, number: int) -> optuna.Study:
        return optuna.create_study(
            storage=self._storage, sampler=self._sampler(number), study_name=label,
            direction=self._direction, load_if_exists=True,
        )  # fmt: skip

    def _sampler(self, number: int) -> BaseSampler:
        """Return a new sampler for a trial. One sampler for all trials would lose its state at an interruption."""
        seed = trial_seed(self._options.search_seed, number)
        if self._options.sampler == "random":
            return RandomSampler(seed=seed)
        return TPESampler(seed=seed, n_startup_trials=RANDOM_TRIALS)


def trial_seed(search_seed: int, number: int) -> int:
    """Return the seed of the sampler for the trials with a number. It is the same for all arms."""
    digest = hashlib.sha256(f"{search_seed}\n{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
