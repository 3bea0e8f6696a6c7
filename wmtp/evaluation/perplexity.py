"""Metrics that describe how well a model predicts the tokens of solutions: losses, perplexity and accuracies."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wmtp.algorithms.uniform import Uniform
from wmtp.data.collate import IGNORED, collate
from wmtp.data.sampler import batches_by_length
from wmtp.data.split import TokenizedSplit
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import Hardware
from wmtp.models.mtp import MtpModel
from wmtp.objectives.mtp import MtpObjective
from wmtp.ops.metric_sums import MetricSums
from wmtp.ops.targets import targets

ROWS_AT_ONCE = 2_048
"""Number of positions whose logits are computed at the same time. It bounds the memory that the logits need."""


@torch.inference_mode()
def prediction_metrics(
    model: MtpModel, split: TokenizedSplit, tokenizer: Tokenizer, hardware: Hardware, batch_size: int
) -> dict[str, float]:
    """Return the losses, the perplexity and the accuracies of a model on the solutions of a split.

    For each head k, `head_k_loss` and `head_k_accuracy` are means over the tokens that this head predicts. `mtp_loss`
    is the mean of `head_k_loss` over the heads. For `loss`, the losses of all heads are first averaged at each
    position, and the results are then averaged over the positions. `perplexity` is exp(`head_1_loss`). Losses are in
    nats. `canonical_logprob` and `canonical_probability` are means over the correct solutions of the split. If the
    split has no samples, the result is empty.
    """
    objective, sums = MtpObjective(Uniform()), MetricSums()
    model.eval()
    for indices in batches_by_length(split.samples.lengths, batch_size):
        batch = collate(split, indices, tokenizer.padding).to(hardware.device)
        with hardware.autocast():
            outputs = model(batch.tokens)
            sums.add(objective.evaluate_outputs(outputs, model, batch))
            sums.add(accuracy_sums(outputs.states, model.unembedding_weight, targets(batch.labels, model.num_heads)))
    if not sums.means:
        return {}
    values = sums.results()
    losses = [value for name, value in values.items() if name.startswith("head_") and name.endswith("_loss")]
    return values | {"mtp_loss": sum(losses) / len(losses), "perplexity": math.exp(values["head_1_loss"])}


def accuracy_sums(
    states: Float[Tensor, "head batch position dim"],
    unembedding: Float[Tensor, "vocabulary dim"],
    target: Int[Tensor, "head batch position"],
) -> MetricSums:
    """Return the sums for `head_k_accuracy`: the number of correct predictions and the number of targets of each head.

    The prediction of head k is the token to which it gives the highest probability.
    """
    sums = MetricSums()
    for k, (head_states, head_target) in enumerate(zip(states, target, strict=True), 1):
        valid = head_target != IGNORED
        rows, labels = head_states[valid], head_target[valid]
        hits = torch.zeros((), device=states.device)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            predicted = (rows[start : start + ROWS_AT_ONCE] @ unembedding.to(rows.dtype).T).argmax(dim=-1)
            hits += (predicted == labels[start : start + ROWS_AT_ONCE]).sum()
        sums.means[f"head_{k}_accuracy"] = (hits, valid.sum())
    return sums
