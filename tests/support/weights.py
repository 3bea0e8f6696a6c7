"""The weights with which an objective trains, and slow computations of the inputs of algorithms."""

import copy
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import tiny_model
from wmtp.algorithms.base import Algorithm
from wmtp.data.collate import IGNORED, Batch
from wmtp.models.mtp import MtpModel
from wmtp.objectives.mtp import MtpObjective
from wmtp.ops.targets import targets


def sharp_model(sharpness: float = 3.0) -> MtpModel:
    """Return a model whose probabilities differ much more than those of an untrained model."""
    model = tiny_model()
    with torch.no_grad():
        model.norm.weight.mul_(sharpness)
    return model


def with_probable_labels(model: MtpModel, batch: Batch) -> Batch:
    """Return a batch in which every second label is the token that head 1 finds most probable."""
    best = plain_logits(model, batch)[0].argmax(dim=-1).roll(1, dims=1)  # at the position of the predicted token
    is_replaced = (batch.labels != IGNORED) & (torch.arange(batch.labels.shape[1]) % 2 == 0)
    return replace(batch, labels=best.where(is_replaced, batch.labels))


def trained_weights(algorithm: Algorithm, model: MtpModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the weights of all targets, shape [head, batch, position], in updates of one and of two micro-batches."""
    objective, target = MtpObjective(copy.deepcopy(algorithm)), targets(batch.labels, model.num_heads)
    (prepared,) = objective.prepare(model, [batch])
    shares = (target != IGNORED).float()
    _, _, alone = objective._weighted_sum(model(batch.tokens), model, prepared, target, shares)
    empty = replace(batch, labels=torch.full_like(batch.labels, IGNORED), number=1)
    first, _ = MtpObjective(copy.deepcopy(algorithm)).prepare(model, [batch, empty])
    assert first.weights is not None
    return alone.detach(), first.weights


def plain_logits(model: MtpModel, batch: Batch) -> Tensor:
    """Return the logits of all heads in double precision, shape [head, batch, position, token]."""
    states = model(batch.tokens).states.detach().double()
    return states @ model.unembedding_weight.detach().double().T


def plain_losses(model: MtpModel, batch: Batch) -> Tensor:
    """Return the cross-entropy of all targets in double precision, and 0 where there is no target."""
    logits, target = plain_logits(model, batch), targets(batch.labels, model.num_heads)
    return F.cross_entropy(logits.movedim(-1, 1), target, reduction="none", ignore_index=IGNORED)
