"""Sums from which the validation metrics of the policy are computed."""

from jaxtyping import Bool, Float
from torch import Tensor

from wmtp.data.collate import Batch
from wmtp.ops.metric_sums import MetricSums
from wmtp.ops.targets import shift_to_heads


def head_sums(losses: Tensor, valid: Tensor) -> MetricSums:
    """Return the metric sums `head_1_loss`, `head_2_loss`, …, from which the mean loss of each head is computed.

    Args:
        losses: the cross-entropy in nats, or 0 where there is no target. The shape is [head, batch, position].
        valid: True where there is a target. The shape is [head, batch, position].
    """
    loss_sums, counts = losses.flatten(1).sum(dim=1), valid.flatten(1).sum(dim=1)
    return MetricSums({f"head_{k}_loss": (loss_sums[k - 1], counts[k - 1]) for k in range(1, len(valid) + 1)})


def canonical_sums(
    losses: Float[Tensor, "batch position"], valid: Bool[Tensor, "batch position"], batch: Batch
) -> MetricSums:
    """Return the metric sums `canonical_logprob` and `canonical_probability`, which are means over correct solutions.

    They are the sum of log p over the tokens of a solution, and the exponential of that sum, which is the probability
    that sampling writes exactly this solution. Noise tokens are left out if they are known, because their text is
    random. A batch without correct solutions has counts of 0.

    Args:
        losses: the cross-entropy of head 1 in nats.
        valid: True where head 1 has a target.
        batch: the validation batch.
    """
    counted = valid & batch.is_correct[:, None]
    if batch.harmful is not None:
        counted &= ~shift_to_heads(batch.harmful, 1, 0)[0]  # in correct solutions, these are the noise tokens
    solutions = counted.any(dim=1)
    logprobs, count = -losses.where(counted, 0.0).sum(dim=1), solutions.sum()
    probabilities = logprobs.exp().where(solutions, 0.0)
    return MetricSums(
        {"canonical_logprob": (logprobs.sum(), count), "canonical_probability": (probabilities.sum(), count)}
    )


def reference_sums(losses: Tensor, valid: Tensor, batch: Batch, column: int) -> MetricSums:
    """Return the metric sum `reference_better`.

    It is the share of clean tokens that the reference predicts better than the policy. Clean tokens are all tokens of
    correct solutions except noise.

    Args:
        losses: the cross-entropy of head 1 in nats. The shape is [batch, position].
        valid: True where head 1 has a target. The shape is [batch, position].
        batch: the batch. If it has no reference losses, as in `evaluate`, the result is empty.
        column: the index of the reference in `Batch.reference_losses`.
    """
    if batch.reference_losses is None:
        return MetricSums()
    reference = shift_to_heads(batch.reference_losses[..., column], 1, 0.0)[0]
    clean = valid & batch.is_correct[:, None]
    if batch.harmful is not None:
        clean &= ~shift_to_heads(batch.harmful, 1, True)[0]
    return MetricSums({"reference_better": (((reference < losses) & clean).sum(), clean.sum())})
