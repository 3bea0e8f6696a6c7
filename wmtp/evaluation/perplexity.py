"""How well a model predicts the solutions: loss, perplexity, and how often each head's first choice is right."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from wmtp.algorithms.uniform import Uniform
from wmtp.data.collate import IGNORED, collate
from wmtp.data.sampler import by_length
from wmtp.data.split import TokenizedSplit
from wmtp.data.tokenizer import Tokenizer
from wmtp.distributed.device import Hardware
from wmtp.models.mtp import MtpModel
from wmtp.objectives.mtp import MtpObjective
from wmtp.ops.metric_sums import Sums
from wmtp.ops.targets import targets

ROWS_AT_ONCE = 2_048
"""Bounds the memory of the logits."""


@torch.inference_mode()
def prediction_metrics(
    model: MtpModel, split: TokenizedSplit, tokenizer: Tokenizer, hardware: Hardware, batch_size: int
) -> dict[str, float]:
    """`loss`, `mtp_loss`, each `head_k_loss` and `head_k_accuracy`, and `perplexity` = exp(head 1's loss).

    Measured over the tokens of the solutions, weights 1; without samples there is nothing.
    """
    objective, sums = MtpObjective(Uniform()), Sums()
    model.eval()
    for chosen in by_length(split.samples.lengths, batch_size):
        batch = collate(split, chosen, tokenizer.padding).to(hardware.device)
        with hardware.autocast():
            outputs = model(batch.tokens)
            sums.add(objective.evaluation_of(outputs, model, batch))
            sums.add(accuracy_sums(outputs.states, model.unembedding_weight, targets(batch.labels, model.num_heads)))
    if not sums.means:
        return {}
    values = sums.results()
    losses = [value for name, value in values.items() if name.endswith("_loss")]
    return values | {"mtp_loss": sum(losses) / len(losses), "perplexity": math.exp(values["head_1_loss"])}


def accuracy_sums(
    states: Float[Tensor, "head batch position dim"],
    unembedding: Float[Tensor, "vocabulary dim"],
    target: Int[Tensor, "head batch position"],
) -> Sums:
    """How many targets are each head's most likely token, and how many there are: `head_1_accuracy`, …"""
    sums = Sums()
    for k, (head_states, head_target) in enumerate(zip(states, target, strict=True), 1):
        valid = head_target != IGNORED
        rows, wanted = head_states[valid], head_target[valid]
        hits = torch.zeros((), device=states.device)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            chosen = (rows[start : start + ROWS_AT_ONCE] @ unembedding.to(rows.dtype).T).argmax(dim=-1)
            hits += (chosen == wanted[start : start + ROWS_AT_ONCE]).sum()
        sums.means[f"head_{k}_accuracy"] = (hits, valid.sum())
    return sums
