"""A check of whether the reference model can show the policy which tokens are worth learning."""

import logging

from wmtp.training.trainer import Trainer

log = logging.getLogger(__name__)

METRIC = "reference_better"
"""The share of clean validation tokens that the reference predicts better than the policy (`reference_sums`)."""


def warn_of_weak_reference(share: float | None, when: str) -> None:
    """Log a warning if the reference predicts less than half of the clean validation tokens better than the policy.

    `share` is None if it was not measured. `when` is the time of the measurement, for the message.
    """
    if share is None or share >= 0.5:
        return
    log.warning(
        "%s, the reference predicts only %.0f %% of the clean validation tokens better than the policy, so its losses "
        "do not show which tokens are worth learning; train it longer or on more data (pretrain.num_epochs, "
        "pretrain.data), or name a better one: algo.reference=PATH",
        when, 100 * share,
    )  # fmt: skip


def measure_reference(trainer: Trainer) -> float | None:
    """Return the metric `METRIC` of the policy before training, or None if there are no validation data.

    All ranks must call this function.
    """
    measured = trainer.measure_validation()
    return None if measured is None else measured.get(METRIC)
