"""Tests of objectives against plain implementations with all logits and explicit sums."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.conftest import tiny_model
from wmtp.algorithms.base import Algorithm, Observations
from wmtp.algorithms.cleaning import Cleaning
from wmtp.algorithms.contrast import Contrast
from wmtp.algorithms.controls import Random, Shuffled
from wmtp.algorithms.critic import Critic
from wmtp.algorithms.dft import Dft
from wmtp.algorithms.entropy import Entropy
from wmtp.algorithms.excess_loss import ExcessLoss, TokenSkip
from wmtp.algorithms.focal import Focal
from wmtp.algorithms.prior import Prior
from wmtp.algorithms.reward import Reward
from wmtp.algorithms.uniform import Uniform
from wmtp.data.collate import IGNORED, Batch, collate
from wmtp.data.dataset import Dataset
from wmtp.distributed.process_group import Processes
from wmtp.errors import TrainingError
from wmtp.models.mtp import MtpModel
from wmtp.objectives.base import Objective
from wmtp.objectives.mtp import MtpObjective
from wmtp.objectives.value import ValueObjective
from wmtp.objectives.value_loss import Kind, ValueLoss
from wmtp.ops.metric_sums import MetricSums
from wmtp.ops.targets import target_shares, targets
from wmtp.training.stages import ValueStage

OBJECTIVE = MtpObjective(Uniform())
ALONE = Processes.single_process()


def gradients(model: MtpModel, batches: list[Batch], objective: Objective = OBJECTIVE, late: bool = True) -> Tensor:
    """Return the gradient of one update; with `late=False`, each micro-batch has its own denominators and weights."""
    model.zero_grad()
    for prepared in objective.prepare(model, batches, ALONE):
        if not late:
            (own,) = objective.prepare(model, [prepared.batch], ALONE)
            denominators = {name: total * len(batches) for name, total in own.denominators.items()}
            prepared = replace(own, denominators=denominators)
        objective.loss(model, prepared)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / one.norm())


def split(data: Dataset, size: int) -> list[Batch]:
    return data.micro_batches(epoch=0, update=0, batch_size=8, micro_batch_size=size)


@pytest.mark.parametrize("size", [4, 1])
def test_splitting_a_batch_changes_nothing(tiny_data: Dataset, size: int) -> None:
    model = tiny_model()
    one_batch, parts = gradients(model, split(tiny_data, 8)), gradients(model, split(tiny_data, size))
    assert difference(one_batch, parts) <= 1e-6

    naive = gradients(model, split(tiny_data, size), late=False)
    assert difference(one_batch, naive) > 1e-3


def test_the_loss_is_the_sum_over_positions_of_the_mean_over_their_heads(tiny_data: Dataset) -> None:
    model = tiny_model()
    (batch,) = split(tiny_data, 8)
    log_p = torch.log_softmax(model.unembedding(model(batch.tokens).states), dim=-1)
    total, positions = 0.0, 0
    for row in range(len(batch.labels)):
        for t in range(batch.labels.shape[1]):
            ahead = [batch.labels[row, t + k + 1] if t + k + 1 < batch.labels.shape[1] else -100 for k in range(4)]
            heads = [-log_p[k, row, t, label].item() for k, label in enumerate(ahead) if label != -100]
            total += sum(heads) / len(heads) if heads else 0.0
            positions += bool(heads)
    (prepared,) = OBJECTIVE.prepare(model, [batch])
    loss, sums = OBJECTIVE.loss(model, prepared)
    assert prepared.denominators["targets"] == positions
    assert loss.item() == pytest.approx(total / positions, rel=1e-5)
    assert OBJECTIVE.metrics(sums)["loss"] == pytest.approx(total / positions, rel=1e-5)


def evaluate(objective: Objective, model: MtpModel, batches: list[Batch]) -> dict[str, float]:
    sums = MetricSums()
    for batch in batches:
        sums.add(objective.evaluate(model, batch))
    return objective.metrics(sums)


def test_the_losses_of_heads_and_their_mean_do_not_depend_on_the_split(tiny_data: Dataset) -> None:
    model = tiny_model()
    one_batch = evaluate(OBJECTIVE, model, split(tiny_data, 8))
    assert set(one_batch) == {
        "loss", "mtp_loss", *(f"head_{k}_loss" for k in range(1, 5)), "canonical_logprob", "canonical_probability"
    }  # fmt: skip
    assert one_batch["mtp_loss"] == pytest.approx(sum(one_batch[f"head_{k}_loss"] for k in range(1, 5)) / 4)
    for name, value in evaluate(OBJECTIVE, model, split(tiny_data, 3)).items():
        assert value == pytest.approx(one_batch[name], rel=1e-5)


def test_training_reports_statistics_of_weights_and_the_share_of_targets(tiny_data: Dataset) -> None:
    model, (batch,) = tiny_model(), split(tiny_data, 8)
    _, sums = OBJECTIVE.loss(model, *OBJECTIVE.prepare(model, [batch]))
    values = OBJECTIVE.metrics(sums)
    assert (values["weight_mean"], values["weight_min"], values["weight_max"], values["weight_std"]) == (1, 1, 1, 0)
    assert 0 < values["valid_target_ratio"] < 1


# Weighted losses

RUNS = [(6, 12), (1, 7), (3, 4), (2, 9)]
"""Start and end of the solution in each row. In the first row, four heads predict nothing at the first positions."""


def ragged(runs: list[tuple[int, int]] = RUNS, seed: int = 0) -> Batch:
    """Return a batch with all inputs of any algorithm; a solution of length 0 gives a row without labels."""
    source = torch.Generator().manual_seed(seed)
    size, length = len(runs), 12
    tokens = torch.randint(2, 512, (size, length), generator=source)
    labels = torch.full_like(tokens, IGNORED)
    for row, (start, stop) in enumerate(runs):
        labels[row, start:stop] = tokens[row, start:stop]
    return Batch(
        tokens, labels, torch.rand(size, generator=source), torch.arange(size) % 2 == 0, torch.arange(size) // 2,
        tuple(str(row) for row in range(size)), size * length,
        reference_losses=8 * torch.rand(2, size, length, generator=source).movedim(0, -1),
    )  # fmt: skip


def rows(batch: Batch, *chosen: int) -> Batch:
    """Return the chosen rows of a batch."""
    kept = list(chosen)
    tensors = {name: value[kept] for name, value in vars(batch).items() if isinstance(value, Tensor)}
    return replace(batch, **tensors, record_ids=tuple(batch.record_ids[row] for row in kept))


def model_with_values(num_heads: int = 4, seed: int = 0) -> MtpModel:
    """Return a model whose value head has outputs other than zero."""
    model = tiny_model(num_heads, seed=seed)
    model.add_value_head()
    assert model.value_head is not None
    torch.nn.init.normal_(model.value_head.output.weight)
    return model


class ByTarget(Algorithm):
    """Weights that depend on the indices of the target only."""

    weight_min, weight_max = 0.1, 5.0

    def weights(self, observed: Observations) -> Tensor:
        heads, size, length = observed.valid.shape
        head, row, position = torch.meshgrid(*(torch.arange(n) for n in (heads, size, length)), indexing="ij")
        return 0.05 + 0.3 * head + 0.7 * row + 0.4 * (position % 5)


class SquaredLoss(Algorithm):
    """Weights equal to the square of the target's own loss."""

    uses_losses = "own"
    weight_min, weight_max = 0.5, 50.0

    def weights(self, observed: Observations) -> Tensor:
        assert observed.losses is not None
        return observed.losses.square()


def naive_advantages(values: list[float], start: int, stop: int, reward: float) -> dict[int, float]:
    """Return the advantage of each token of one solution, with γ = 1 and λ = 0.95."""
    found, following = {}, 0.0
    for i in reversed(range(start, stop)):
        gained = reward if i == stop - 1 else values[i]
        following = gained - values[i - 1] + 0.95 * following
        found[i] = following
    return found


def plain_critic(batch: Batch, values: Tensor, losses: Tensor, excess: Tensor) -> Tensor:
    found = [naive_advantages(values[row].tolist(), *run, batch.rewards[row].item()) for row, run in enumerate(RUNS)]
    pooled = [advantage for solution in found for advantage in solution.values()]
    mean, deviation = np.mean(pooled), np.std(pooled)
    weights = torch.ones_like(losses)
    for k in range(1, len(losses) + 1):
        for row, solution in enumerate(found):
            for i, advantage in solution.items():
                if i - k >= 0:
                    weights[k - 1, row, i - k] = math.exp((advantage - mean) / deviation / 0.9)
    return weights.clamp(0.1, 5.0)


def plain_contrast(batch: Batch, values: Tensor, losses: Tensor, excess: Tensor) -> Tensor:
    assert batch.reference_losses is not None
    by_token = torch.exp(batch.reference_losses[..., 1] - batch.reference_losses[..., 0]).clamp(0.1, 5.0)
    weights = torch.ones_like(losses)
    for k in range(1, len(losses) + 1):
        weights[k - 1, :, :-k] = by_token[:, k:]
    return weights


def prepared_reward() -> Reward:
    """Return the algorithm with a mean reward of 0.4."""
    algorithm = Reward(beta=0.3)
    algorithm.mean_reward = 0.4
    return algorithm


def plain_reward(batch: Batch, values: Tensor, losses: Tensor, excess: Tensor) -> Tensor:
    by_row = [min(max(math.exp((reward - 0.4) / 0.3), 0.1), 5.0) for reward in batch.rewards.tolist()]
    return torch.tensor(by_row)[None, :, None].expand(losses.shape)


def plain_token_skip(batch: Batch, values: Tensor, losses: Tensor, excess: Tensor) -> Tensor:
    kept = torch.ones_like(losses)
    valid = losses > 0
    for head in range(1, len(losses)):
        ordered = excess[head][valid[head]].sort(descending=True).values
        kept[head] = (excess[head] >= ordered[math.ceil(0.6 * len(ordered)) - 1]).float()
    return kept


Raw = Callable[[Batch, Tensor, Tensor, Tensor], Tensor]
"""A function from the batch, the values, the losses of all targets and their excess to clipped weights."""

WEIGHTINGS: dict[str, tuple[Algorithm, Raw | None]] = {
    "uniform": (Uniform(), lambda batch, values, losses, excess: torch.ones_like(losses)),
    "critic": (Critic(), plain_critic),
    "excess loss": (ExcessLoss(), lambda batch, values, losses, excess: excess.exp().clamp(0.1, 5.0)),
    "token skip": (TokenSkip(), plain_token_skip),
    "dft": (Dft(), lambda batch, values, losses, excess: torch.exp(-losses)),
    # large powers, because the untrained model finds all targets improbable, and is uncertain for all of them
    "focal": (Focal(gamma=500.0), lambda batch, values, losses, excess: (1 - torch.exp(-losses)) ** 500),
    "by target": (
        ByTarget(),
        lambda batch, values, losses, excess: ByTarget().weights(observations_of(losses)).clamp(0.1, 5.0),
    ),
    "by loss": (SquaredLoss(), lambda batch, values, losses, excess: losses.square().clamp(0.5, 50.0)),
    "entropy": (Entropy(power=60.0), None),
    "prior": (Prior(), lambda batch, values, losses, excess: torch.exp(excess - losses).where(losses > 0, 1.0)),
    "reward": (prepared_reward(), plain_reward),
    "cleaning": (Cleaning(level="sample"), None),
    "contrast": (Contrast(), plain_contrast),
    "shuffled": (Shuffled(of=Critic()), None),
    "shuffled token skip": (Shuffled(of=TokenSkip()), None),
    "shuffled entropy": (Shuffled(of=Entropy(power=60.0)), None),
    "random": (Random(of=ExcessLoss()), None),
}


def observations_of(losses: Tensor) -> Observations:
    return Observations(losses > 0, losses[0] > 0)


def plain_loss(model: MtpModel, algorithm: Algorithm, raw: Raw | None, batch: Batch, scale: bool = True) -> Tensor:
    """Return L = Σ v·w·CE / Σ v (+ value_coef · the mean cross-entropy of R) from all logits at once, for autograd.

    Weights without a formula here, for example random ones, are computed by a copy of the algorithm from its inputs.
    """
    outputs = model(batch.tokens)
    size, length = batch.tokens.shape
    target = torch.full((model.num_heads, size, length), IGNORED)
    references = torch.zeros(2, *target.shape)
    assert batch.reference_losses is not None
    for k in range(1, model.num_heads + 1):
        target[k - 1, :, : length - k] = batch.labels[:, k:]
        references[:, k - 1, :, : length - k] = batch.reference_losses[:, k:].movedim(-1, 0)
    valid = target != IGNORED
    logits = model.unembedding(outputs.states)
    losses = F.cross_entropy(logits.movedim(-1, 1), target, reduction="none", ignore_index=IGNORED)
    known = losses.detach()
    if raw is None:
        values = outputs.values.detach().sigmoid() if algorithm.needs_values else None
        top = logits.detach().topk(20, dim=-1).values.log_softmax(dim=-1)
        observed = Observations(
            valid, batch.response, losses=known, entropies=-(top.exp() * top).sum(dim=-1),
            reference_losses=references, values=values, rewards=batch.rewards, samples=batch.samples,
        )  # fmt: skip
        weights = copy.deepcopy(algorithm).weights(observed).clamp(algorithm.weight_min, algorithm.weight_max)
    else:
        weights = raw(batch, outputs.values.sigmoid(), known, (known - references[0]).where(valid, -torch.inf))
    shares = valid.double() / valid.sum(dim=0).clamp(min=1)
    weights = weights.detach().double()
    if scale:
        heads = (1, 2) if algorithm.uses_losses != "none" else (0, 1, 2)  # weights from losses: each head by itself
        weights = weights * shares.sum(heads, keepdim=True) / (shares * weights).sum(heads, keepdim=True)
    loss = (shares * weights * losses).sum() / shares.sum()
    if algorithm.value_coef:
        errors = [
            F.binary_cross_entropy_with_logits(outputs.values[row, t], batch.rewards[row])
            for row, (start, stop) in enumerate(RUNS)
            for t in range(start - 1, stop)
        ]
        loss = loss + algorithm.value_coef * sum(errors) / len(errors)
    return loss


def gradient_of(loss: Tensor, model: MtpModel) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_gradients_equal_those_of_all_logits_with_constant_weights(name: str, num_heads: int) -> None:
    algorithm, raw = WEIGHTINGS[name]
    algorithm, model, batch = copy.deepcopy(algorithm), model_with_values(num_heads), ragged()
    expected = plain_loss(model, algorithm, raw, batch)
    expected_gradient = gradient_of(expected, model)
    unscaled = gradient_of(plain_loss(model, algorithm, raw, batch, scale=False), model)
    unweighted = gradient_of(plain_loss(model, algorithm, WEIGHTINGS["uniform"][1], batch), model)

    objective = MtpObjective(algorithm)
    loss, sums = objective.loss(model, *objective.prepare(model, [batch]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert difference(expected_gradient, gradient_of(loss, model)) <= 1e-5
    values = objective.metrics(sums)
    assert values["weight_mean"] == pytest.approx(1.0, abs=1e-5)
    weights_are_one = name == "uniform" or (num_heads == 1 and "token skip" in name)  # head 1 skips nothing
    if not weights_are_one:
        assert difference(expected_gradient, unscaled) > 1e-3
        assert difference(expected_gradient, unweighted) > 1e-2
        assert values["weight_std"] > 0.1


def test_no_gradient_reaches_the_value_head_through_the_weights() -> None:
    model, batch = model_with_values(), ragged()
    objective = MtpObjective(Critic(value_coef=0.0))
    loss, _ = objective.loss(model, *objective.prepare(model, [batch]))
    assert model.value_head is not None
    found = torch.autograd.grad(loss, list(model.value_head.parameters()))
    assert all(not gradient.any() for gradient in found)

    target = torch.stack([F.pad(batch.labels[:, k:], (0, k), value=IGNORED) for k in range(1, 5)])
    outputs = model(batch.tokens)
    weights = Critic().weights(
        Observations(target != IGNORED, batch.response, values=outputs.values, rewards=batch.rewards)
    )
    losses = F.cross_entropy(
        model.unembedding(outputs.states).movedim(-1, 1), target, reduction="none", ignore_index=IGNORED
    )
    leaking = torch.autograd.grad((weights * losses).sum(), list(model.value_head.parameters()))
    assert any(gradient.any() for gradient in leaking)  # the control: the weights are not detached


def test_splitting_changes_nothing_if_all_parts_have_the_same_weights() -> None:
    class ByPosition(Algorithm):
        weight_min, weight_max = 0.1, 5.0

        def weights(self, observed: Observations) -> Tensor:
            return 0.2 + (torch.arange(observed.valid.shape[2]) % 3).expand(observed.valid.shape).float()

    model, batch, objective = tiny_model(), ragged([(3, 10)] * 4), MtpObjective(ByPosition())
    one_batch = gradients(model, [batch], objective)
    for parts in ([(0, 1), (2, 3)], [(0, 1, 2), (3,)], [(0,), (1,), (2,), (3,)]):
        assert difference(one_batch, gradients(model, [rows(batch, *part) for part in parts], objective)) <= 1e-6
    uneven = [rows(batch, 0, 1, 2), rows(batch, 3)]
    assert difference(one_batch, gradients(model, uneven, objective, late=False)) > 1e-3


PARTS = [[(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)], [(2,), (0, 1, 3)]]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", [name for name in WEIGHTINGS if name != "by target"])  # it depends on the row
def test_splitting_an_update_changes_nothing_for_any_weighting(name: str, parts: list[tuple[int, ...]]) -> None:
    model, batch = model_with_values(), ragged()

    def split_gradients(parts: list[tuple[int, ...]], late: bool = True) -> Tensor:
        batches = [replace(rows(batch, *part), number=number) for number, part in enumerate(parts)]
        return gradients(model, batches, MtpObjective(copy.deepcopy(WEIGHTINGS[name][0])), late)

    one_batch = split_gradients([(0, 1, 2, 3)])
    assert difference(one_batch, split_gradients(parts)) <= 1e-5
    assert difference(one_batch, split_gradients(parts, late=False)) > 1e-2, "the control: weights of each micro-batch"


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_have_mean_one_over_the_update(name: str) -> None:
    algorithm, model, batch = copy.deepcopy(WEIGHTINGS[name][0]), model_with_values(), ragged()
    objective, sums, means = MtpObjective(algorithm), MetricSums(), []
    parts = [rows(batch, 0, 1), rows(batch, 2), rows(batch, 3)]
    for prepared in objective.prepare(model, parts):
        _, part_sums = objective.loss(model, prepared)
        means.append(objective.metrics(part_sums)["weight_mean"])
        sums.add(part_sums)
        assert prepared.weights is not None
    assert objective.metrics(sums)["weight_mean"] == pytest.approx(1.0, abs=1e-5)
    if name != "uniform":
        assert max(abs(mean - 1) for mean in means) > 0.01, "the control: each micro-batch has mean 1"


@pytest.mark.parametrize(
    "name", ["excess loss", "by loss", "token skip", "dft", "entropy", "shuffled token skip", "random"]
)
def test_weights_from_losses_have_mean_one_for_each_head(name: str) -> None:
    model, batch = model_with_values(), ragged()
    with torch.no_grad():
        for head, block in enumerate(model.heads):  # heads of different quality
            for parameter in block.parameters():
                parameter.mul_(1 + head)
    objective = MtpObjective(copy.deepcopy(WEIGHTINGS[name][0]))
    valid = targets(batch.labels, 4) != IGNORED
    shares, parts = target_shares(valid), [rows(batch, 0, 1), rows(batch, 2, 3)]
    weights = torch.cat([part.weights for part in objective.prepare(model, parts) if part.weights is not None], dim=1)

    def means(weights: Tensor) -> list[float]:
        return ((shares * weights).sum(dim=(1, 2)) / shares.sum(dim=(1, 2))).tolist()

    assert means(weights) == pytest.approx([1.0] * 4, abs=1e-5)
    together = weights * torch.tensor([2.0, 0.5, 0.5, 0.5])[:, None, None]
    assert means(together * shares.sum() / (shares * together).sum()) != pytest.approx([1.0] * 4, abs=0.1)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_without_rescaling_weights_are_only_clipped(name: str) -> None:
    algorithm, raw = WEIGHTINGS[name]
    model, batch = model_with_values(), ragged()
    algorithm = copy.deepcopy(algorithm)
    algorithm.rescale = False
    objective = MtpObjective(algorithm)
    loss, sums = objective.loss(model, *objective.prepare(model, [batch]))
    expected = plain_loss(model, algorithm, raw, batch, scale=False)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert difference(gradient_of(expected, model), gradient_of(loss, model)) <= 1e-5
    if name != "uniform":
        assert objective.metrics(sums)["weight_mean"] != pytest.approx(1.0, abs=1e-3)


def test_every_target_has_the_same_share_if_shares_is_target() -> None:
    model, batch = tiny_model(), ragged()
    objective = MtpObjective(Uniform(), shares="target")
    target = targets(batch.labels, 4)
    logits = model.unembedding(model(batch.tokens).states)
    expected = F.cross_entropy(logits.flatten(0, 2), target.flatten(), ignore_index=IGNORED)  # the mean over targets
    loss, _ = objective.loss(model, *objective.prepare(model, [batch]))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert OBJECTIVE.loss(model, *OBJECTIVE.prepare(model, [batch]))[0].item() != pytest.approx(loss.item(), rel=1e-3)
    parts = [rows(batch, 0), rows(batch, 1, 2, 3)]
    assert difference(gradients(model, [batch], objective), gradients(model, parts, objective)) <= 1e-6
    assert evaluate(objective, model, [batch]) == evaluate(OBJECTIVE, model, [batch])
    assert objective.name != OBJECTIVE.name


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_an_update_without_labels_is_refused_but_a_micro_batch_without_labels_is_not(name: str) -> None:
    model = model_with_values()
    algorithm = WEIGHTINGS[name][0]
    full, empty = ragged(), replace(ragged([(0, 0)] * 4, seed=1), number=1)
    alone, mixed = MtpObjective(copy.deepcopy(algorithm)), MtpObjective(copy.deepcopy(algorithm))
    with pytest.raises(TrainingError, match="every label is masked"):
        alone.prepare(model, [empty, empty])
    with_empty = gradients(model, [full, empty], mixed)
    assert torch.isfinite(with_empty).all()
    assert difference(with_empty, gradients(model, [full], MtpObjective(copy.deepcopy(algorithm)))) <= 1e-6
    sums = MetricSums()
    for prepared in mixed.prepare(model, [empty, full]):
        sums.add(mixed.loss(model, prepared)[1])
    assert all(math.isfinite(value) for value in mixed.metrics(sums).values())


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_validation_does_not_depend_on_the_algorithm(name: str) -> None:
    algorithm, model, batch = copy.deepcopy(WEIGHTINGS[name][0]), model_with_values(), ragged()
    objective, before = MtpObjective(algorithm), copy.deepcopy(algorithm.state_dict())
    measured = evaluate(objective, model, [batch])
    assert ("reference_better" in measured) == algorithm.needs_better_reference
    measured.pop("reference_better", None)
    assert measured == evaluate(OBJECTIVE, model, [batch])
    assert algorithm.state_dict() == before
    if name != "uniform":  # the control: the training loss does
        _, sums = objective.loss(model, *objective.prepare(model, [batch]))
        assert objective.metrics(sums)["loss"] != pytest.approx(evaluate(OBJECTIVE, model, [batch])["loss"], rel=1e-6)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_training_reports_the_unweighted_loss_of_every_head(name: str) -> None:
    objective, model, batch = MtpObjective(copy.deepcopy(WEIGHTINGS[name][0])), model_with_values(), ragged()
    _, sums = objective.loss(model, *objective.prepare(model, [batch]))
    trained, expected = objective.metrics(sums), evaluate(OBJECTIVE, model, [batch])
    for measure in ("mtp_loss", *(f"head_{k}_loss" for k in range(1, 5))):
        assert trained[measure] == pytest.approx(expected[measure], rel=1e-5), measure


def test_a_tokens_weight_is_the_mean_over_the_heads_that_predict_it() -> None:
    model, batch = tiny_model(), ragged()
    objective = MtpObjective(ByTarget())
    raw = ByTarget().weights(Observations(torch.zeros(4, *batch.labels.shape) > 0, batch.response)).clamp(0.1, 5.0)
    got, loss, value, _ = objective.token_metrics(model, batch).unbind(dim=-1)
    expected = torch.full(got.shape, torch.nan)
    for row, (start, stop) in enumerate(RUNS):
        for i in range(max(start, 1), stop):
            heads = [raw[k - 1, row, i - k] for k in range(1, 5) if i - k >= 0]
            expected[row, i] = torch.stack(heads).mean()
    assert torch.equal(got.isnan(), expected.isnan())
    has_weight = ~got.isnan()
    ratios = got[has_weight] / expected[has_weight]
    torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-5, atol=0)
    assert value.isnan().all() and torch.equal(loss.isnan(), got.isnan())


def test_a_tokens_loss_is_that_of_head_1_and_its_value_is_that_after_the_token() -> None:
    model, batch = model_with_values(), ragged()
    _, loss, value, _ = MtpObjective(Uniform()).token_metrics(model, batch).unbind(dim=-1)
    outputs = model(batch.tokens)
    assert outputs.values is not None
    log_probabilities = (outputs.states[0] @ model.unembedding_weight.T).log_softmax(dim=-1)
    for row, (start, stop) in enumerate(RUNS):
        for i in range(max(start, 1), stop):
            expected = -log_probabilities[row, i - 1, batch.tokens[row, i]].item()
            assert loss[row, i].item() == pytest.approx(expected, abs=1e-4)
            assert value[row, i].item() == pytest.approx(outputs.values[row, i].sigmoid().item(), abs=1e-6)
    inside = (value == value).sum()
    assert inside == batch.response.sum()


def test_clean_loss_excludes_incorrect_solutions_and_harmful_tokens() -> None:
    """If one token is not harmful, the clean loss is its mean loss over heads, weighted by their shares."""
    model, batch = tiny_model(), ragged()
    assert "clean_loss" not in evaluate(OBJECTIVE, model, [batch])
    harmful = torch.ones_like(batch.response)
    row, last = 0, RUNS[0][1] - 1
    harmful[row, last] = False
    harmful[1, RUNS[1][1] - 1] = False  # a token of an incorrect solution
    is_correct = torch.zeros_like(batch.is_correct)
    is_correct[row] = True
    known = replace(batch, harmful=harmful, is_correct=is_correct)
    values = evaluate(OBJECTIVE, model, [known])
    states = model(batch.tokens).states
    target = targets(batch.labels, 4)
    shares = target_shares(target != IGNORED)
    total = weight = 0.0
    for k in range(1, 5):
        losses = (states[k - 1, row, last - k] @ model.unembedding_weight.T).log_softmax(dim=-1)
        share = shares[k - 1, row, last - k].item()
        total, weight = total - share * losses[batch.tokens[row, last]].item(), weight + share
    assert values["clean_loss"] == pytest.approx(total / weight, rel=1e-4)
    assert values["loss"] == evaluate(OBJECTIVE, model, [batch])["loss"]
    all_clean = replace(known, harmful=torch.zeros_like(harmful), is_correct=torch.ones_like(is_correct))
    assert evaluate(OBJECTIVE, model, [all_clean])["clean_loss"] == pytest.approx(values["loss"], rel=1e-5)


def logprobs_by_loop(model: MtpModel, batch: Batch, excluded: Tensor) -> list[float]:
    """Return the sum of log p over the tokens of each solution, except the excluded ones and the first of the row."""
    log_p = model.unembedding(model(batch.tokens).states[0]).log_softmax(dim=-1)
    return [
        sum(
            log_p[row, i - 1, batch.tokens[row, i]].item()
            for i in range(1, batch.labels.shape[1])
            if batch.labels[row, i] != IGNORED and not excluded[row, i]
        )
        for row in range(len(batch.labels))
    ]


def test_the_probability_of_correct_solutions_leaves_out_noise_and_wrong_solutions() -> None:
    model, batch = tiny_model(num_heads=2), ragged()
    harmful = torch.zeros_like(batch.response)
    harmful[1, 2:4] = harmful[0, 8:] = True  # noise in two correct solutions
    is_correct = torch.tensor([True, True, False, True])
    known = replace(batch, harmful=harmful, is_correct=is_correct)
    of_rows = logprobs_by_loop(model, batch, harmful)
    logprobs = [of_rows[row] for row in (0, 1, 3)]
    got = evaluate(OBJECTIVE, model, [known])
    assert got["canonical_logprob"] == pytest.approx(sum(logprobs) / 3, rel=1e-5)
    assert got["canonical_probability"] == pytest.approx(sum(map(math.exp, logprobs)) / 3, rel=1e-4)
    assert got["canonical_logprob"] != pytest.approx(sum(of_rows) / 4, rel=1e-2), "the control: wrong ones count"

    unlabelled = evaluate(OBJECTIVE, model, [replace(known, harmful=None)])
    of_rows = logprobs_by_loop(model, batch, torch.zeros_like(harmful))
    assert unlabelled["canonical_logprob"] == pytest.approx((of_rows[0] + of_rows[1] + of_rows[3]) / 3, rel=1e-5)
    assert unlabelled["canonical_logprob"] < got["canonical_logprob"] - 1, "the control: noise counts"
    wrong = evaluate(OBJECTIVE, model, [replace(known, is_correct=torch.zeros(4, dtype=torch.bool))])
    assert wrong.keys() == got.keys() - {"canonical_logprob", "canonical_probability", "clean_loss"}


def test_the_probability_of_correct_solutions_does_not_depend_on_the_split(tiny_data: Dataset) -> None:
    """Also with an empty batch, which a process without samples gets and which has a correct solution of no token."""
    model = tiny_model()
    one_batch, empty = evaluate(OBJECTIVE, model, split(tiny_data, 8)), collate(tiny_data.train, None, 0)
    parts = evaluate(OBJECTIVE, model, [empty, *split(tiny_data, 3), empty])
    assert empty.is_correct.any()
    for name in ("canonical_logprob", "canonical_probability"):
        assert parts[name] == pytest.approx(one_batch[name], rel=1e-5)
    means = [evaluate(OBJECTIVE, model, [part])["canonical_logprob"] for part in split(tiny_data, 3)]
    assert sum(means) / 3 != pytest.approx(one_batch["canonical_logprob"], rel=1e-5), "the control: a mean of means"


@pytest.mark.parametrize("trains", ["all", "head"])
def test_only_objectives_that_train_prediction_heads_measure_the_probability(trains: str) -> None:
    stage, model, batch = ValueStage(trains=trains), tiny_model(), ragged()  # type: ignore[arg-type]
    model.add_value_head()
    measured = evaluate(stage.objective("position"), model, [batch])
    names = {name for name in stage.metric_names(4) if "canonical" in name}
    assert {f"val/{name}" for name in measured if "canonical" in name} == names
    assert bool(names) == (trains == "all")


# Values


class UniformWithValues(Uniform):
    """Uniform weights with a value head that trains together with the policy."""

    needs_values, value_coef = True, 0.5


def value_positions_of(batch: Batch) -> list[tuple[int, int]]:
    return [
        (row, t)
        for row in range(len(batch.labels))
        for t in range(batch.labels.shape[1])
        if batch.response[row, t] or (t + 1 < batch.labels.shape[1] and batch.response[row, t + 1])
    ]


def test_the_value_loss_has_its_own_denominator() -> None:
    model, batch = model_with_values(), ragged()
    objective = MtpObjective(UniformWithValues(), ValueLoss("reward"))
    (prepared,) = objective.prepare(model, [batch])
    loss, _ = objective.loss(model, prepared)
    policy, _ = OBJECTIVE.loss_from_outputs(model(batch.tokens), model, prepared)
    values = model(batch.tokens).values
    assert values is not None
    errors = [(values[row, t].item() - batch.rewards[row].item()) ** 2 for row, t in value_positions_of(batch)]
    num_targets, num_values = (float(prepared.denominators[name]) for name in ("targets", "values"))
    assert num_values == len(errors) and num_values != num_targets
    assert loss.item() == pytest.approx(policy.item() + 0.5 * sum(errors) / len(errors), rel=1e-5)
    assert loss.item() != pytest.approx(policy.item() + 0.5 * sum(errors) / num_targets, rel=1e-5)


@pytest.mark.parametrize("parts", [[(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)], [(2,), (0, 1, 3)]])
@pytest.mark.parametrize(
    "stage",
    [
        "with policy",
        "with policy, ranking",
        "cross_entropy",
        "reward",
        "lambda_return",
        "ranking",
        "with language model",
    ],
)
def test_splitting_does_not_change_the_value_loss(stage: str, parts: list[tuple[int, ...]]) -> None:
    kinds: dict[str, Objective] = {
        "with policy": MtpObjective(UniformWithValues()),
        "with policy, ranking": MtpObjective(UniformWithValues(), ValueLoss("ranking")),
        "with language model": ValueObjective(ValueLoss(), 0.7),
    }
    objective = kinds[stage] if stage in kinds else ValueObjective(ValueLoss(stage))
    model, batch = model_with_values(), ragged()
    if "ranking" in stage:  # a task's solutions stay in one micro-batch
        parts, batch = [(0, 1), (2, 3, 4, 5)], ragged([*RUNS, (2, 5), (4, 11)])
        batch = replace(batch, tasks=torch.tensor([0, 0, 1, 1, 1, 1]))
    one_batch = gradients(model, [batch], objective)
    batches = [rows(batch, *part) for part in parts]
    assert difference(one_batch, gradients(model, batches, objective)) <= 1e-5
    assert difference(one_batch, gradients(model, batches, objective, late=False)) > 1e-3


@pytest.mark.parametrize("parts", [[(0, 1, 2, 3)], [(0, 1), (2, 3)], [(3,), (0,), (1, 2)]])
def test_value_metrics_are_those_of_the_pooled_data_for_any_split(parts: list[tuple[int, ...]]) -> None:
    model, batch = model_with_values(), ragged()
    values = model(batch.tokens).values
    assert values is not None
    places = value_positions_of(batch)
    value = np.array([values[row, t].item() for row, t in places])
    reward = np.array([batch.rewards[row].item() for row, _ in places])
    expected = {
        "value_loss": np.mean((value - reward) ** 2),
        "value_mean": value.mean(),
        "value_variance": value.var(),
        "value_explained_variance": 1 - np.var(reward - value) / np.var(reward),
    }
    for objective in (MtpObjective(UniformWithValues(), ValueLoss("reward")), ValueObjective(ValueLoss("reward"))):
        got = evaluate(objective, model, [rows(batch, *part) for part in parts])
        assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        trained = MetricSums()
        for prepared in objective.prepare(model, [rows(batch, *part) for part in parts]):
            trained.add(objective.loss(model, prepared)[1])
        assert {name: objective.metrics(trained)[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    of_batches = np.mean([np.var(value[[row in part for row, _ in places]]) for part in parts])
    assert len(parts) == 1 or of_batches != pytest.approx(expected["value_variance"], rel=1e-3)  # the control


def plain_value_loss(kind: Kind, batch: Batch, values: Tensor) -> float:
    """Return the value loss by explicit sums, with γ = 0.9 and λ = 0.5."""
    rewards = batch.rewards.tolist()
    if kind == "ranking":
        scores = [values[row, start:stop].mean().item() for row, (start, stop) in enumerate(RUNS)]  # all tokens differ
        pairs = [(0, 1), (2, 3)]  # correct and incorrect solutions of the same task
        return sum(math.log1p(math.exp(scores[wrong] - scores[is_correct])) for is_correct, wrong in pairs) / len(pairs)
    errors = []
    for row, (start, stop) in enumerate(RUNS):
        v, target = values[row].tolist(), rewards[row]
        if kind == "cross_entropy":
            probabilities = [1 / (1 + math.exp(-logit)) for logit in v[start - 1 : stop]]
            errors += [-target * math.log(p) - (1 - target) * math.log(1 - p) for p in probabilities]
            continue
        errors.append((v[stop - 1] - target) ** 2)
        for t in reversed(range(start - 1, stop - 1)):
            if kind == "lambda_return":
                target = rewards[row] if t + 1 == stop - 1 else 0.9 * (0.5 * v[t + 1] + 0.5 * target)
            errors.append((v[t] - target) ** 2)
    return sum(errors) / len(errors)


@pytest.mark.parametrize("kind", ["cross_entropy", "reward", "lambda_return", "ranking"])
def test_the_value_loss_of_stage_1_equals_that_computed_by_hand(kind: Kind) -> None:
    model, batch = model_with_values(), ragged()
    objective = ValueObjective(ValueLoss(kind, discount=0.9, trace_decay=0.5))
    values = model(batch.tokens).values
    assert values is not None
    expected = plain_value_loss(kind, batch, values)
    loss, sums = objective.loss(model, *objective.prepare(model, [batch]))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert objective.metrics(sums)["loss"] == pytest.approx(expected, rel=1e-5)
    assert evaluate(objective, model, [batch])["loss"] == pytest.approx(expected, rel=1e-5)
    others: list[Kind] = ["cross_entropy", "reward", "lambda_return", "ranking"]
    assert all(plain_value_loss(o, batch, values) != pytest.approx(expected, rel=1e-3) for o in others if o != kind)


KINDS: tuple[Kind, ...] = ("cross_entropy", "reward", "lambda_return", "ranking")


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_stand_for_values_of_the_kind(kind: Kind) -> None:
    """Only for the cross-entropy, an output is a logit; only for the ranking, a value is no estimate of the reward."""
    loss, batch = ValueLoss(kind), ragged()
    outputs = torch.linspace(-3, 3, 48).reshape(4, 12)
    expected = [[1 / (1 + math.exp(-x)) for x in row] for row in outputs.tolist()]
    values = loss.values(outputs)
    torch.testing.assert_close(values, torch.tensor(expected) if kind == "cross_entropy" else outputs)
    final = [values[row, stop - 1].item() for row, (_, stop) in enumerate(RUNS)]
    rewards = batch.rewards.tolist()
    assert final != pytest.approx(rewards, abs=0.1), "the control"
    assert loss.final_values(values, batch).tolist() == pytest.approx(final if kind == "ranking" else rewards)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_begins_with_the_mean_reward(kind: Kind) -> None:
    """A ranking begins with 0, because only differences of its values have a meaning."""
    loss = ValueLoss(kind)
    for mean in (0.5, 0.2, 0.9):
        output = loss.first_output(mean)
        value = loss.values(torch.tensor([[output]])).item()
        assert value == pytest.approx(0.0 if kind == "ranking" else mean)
        assert (output == pytest.approx(mean)) is (kind in ("reward", "lambda_return"))
    assert ValueLoss("cross_entropy").first_output(0.2) == pytest.approx(math.log(0.2 / 0.8))
    for mean, logit in ((0.0, -math.log(999)), (1.0, math.log(999))):  # finite, although the logit of 0 or 1 is not
        assert ValueLoss("cross_entropy").first_output(mean) == pytest.approx(logit)


@pytest.mark.parametrize("mean", [0.2, 0.5, 0.7])
def test_the_first_output_has_the_lowest_loss_of_all_constants(mean: float) -> None:
    batch = replace(ragged(), rewards=torch.full((4,), mean))
    for kind in KINDS[:3]:
        loss = ValueLoss(kind)
        first = loss.first_output(mean)
        of_constants = [loss.sum(torch.full((4, 12), first + step), batch)[0].item() for step in (-0.05, 0.0, 0.05)]
        assert of_constants[1] < min(of_constants[0], of_constants[2])


def test_stage_1_loss_is_value_loss_plus_language_model_loss(tiny_data: Dataset) -> None:
    model, batch = model_with_values(), ragged()
    objective = ValueObjective(ValueLoss(), language_model_coef=0.3)
    (prepared,) = objective.prepare(model, [batch])
    value, _ = ValueObjective(ValueLoss()).loss(model, prepared)
    language, _ = OBJECTIVE.loss(tiny_model(), *OBJECTIVE.prepare(model, [batch]))
    loss, sums = objective.loss(model, *objective.prepare(model, [batch]))
    assert loss.item() == pytest.approx(value.item() + 0.3 * language.item(), rel=1e-5)
    for values in (objective.metrics(sums), evaluate(objective, model, [batch])):
        assert values["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert values["language_model_loss"] == pytest.approx(language.item(), rel=1e-5)
        assert values["value_loss"] == pytest.approx(value.item(), rel=1e-5)


def test_an_update_without_pairs_to_rank_has_zero_loss() -> None:
    model, batch = model_with_values(), replace(ragged(), tasks=torch.arange(4))
    objective = ValueObjective(ValueLoss("ranking"))
    loss, sums = objective.loss(model, *objective.prepare(model, [batch]))
    loss.backward()
    assert loss.item() == objective.metrics(sums)["loss"] == 0.0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["cross_entropy", "reward", "lambda_return", "ranking"])
def test_hidden_states_of_the_batch_replace_the_trunk(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, objective = model_with_values(), ragged(), ValueObjective(ValueLoss(kind))
    ValueStage(trains="head", loss=kind).freeze(model)
    with torch.no_grad():
        cached = replace(batch, hidden_states=model.trunk_states(batch.tokens))
    through_trunk = gradients(model, [batch], objective)
    expected = evaluate(objective, model, [batch])

    def fail_if_called(*arguments: object, **options: object) -> None:
        raise AssertionError("the trunk ran")

    monkeypatch.setattr(model, "trunk_states", fail_if_called)
    assert difference(through_trunk, gradients(model, [cached], objective)) <= 1e-6
    assert evaluate(objective, model, [cached]) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(AssertionError, match="the trunk ran"):
        gradients(model, [batch], objective)


def test_without_a_language_model_loss_no_head_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_with_values(), ragged()
    expected = evaluate(ValueObjective(ValueLoss()), model, [batch])
    for head in model.heads:
        head.register_forward_hook(lambda *arguments: pytest.fail("a head ran"))
    assert evaluate(ValueObjective(ValueLoss()), model, [batch]) == expected


def test_with_a_frozen_trunk_only_the_value_head_gets_a_gradient() -> None:
    model, batch = model_with_values(), ragged()
    stage = ValueStage(trains="head")
    gradients(model, [batch], stage.objective("position"))
    assert model.embedding.weight.grad is not None  # the control: without freezing, it gets a gradient
    model = model_with_values()
    stage.freeze(model)
    gradients(model, [batch], stage.objective("position"))
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is name.startswith("value_head."), name


def test_stage_1_with_trains_all_updates_trunk_heads_and_value_head() -> None:
    model, batch, stage = model_with_values(), ragged(), ValueStage(trains="all")
    stage.freeze(model)
    gradients(model, [batch], stage.objective("position"))
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_an_update_of_stage_2_without_pairs_to_rank_has_only_the_loss_of_the_policy() -> None:
    model, batch = model_with_values(), replace(ragged(), tasks=torch.arange(4))
    objective = MtpObjective(UniformWithValues(), ValueLoss("ranking"))
    (prepared,) = objective.prepare(model, [batch])
    assert prepared.denominators["values"] == 0, "the control: the divisor is 0"
    policy, _ = OBJECTIVE.loss_from_outputs(model(batch.tokens), model, prepared)
    assert objective.loss(model, prepared)[0].item() == policy.item()


def test_an_update_without_a_chosen_token_has_no_gradient() -> None:
    model, batch = tiny_model(), ragged()
    algorithm = Cleaning(level="global")
    algorithm.threshold = 1e9
    objective = MtpObjective(algorithm)
    loss, _ = objective.loss(model, *objective.prepare(model, [batch]))
    assert loss.item() == 0.0 and not gradient_of(loss, model).any()


# References


def test_the_share_of_clean_tokens_that_the_reference_predicts_better() -> None:
    model, batch = tiny_model(), ragged()
    objective = MtpObjective(Cleaning(level="sample"))
    log_p = (model(batch.tokens).states[0] @ model.unembedding_weight.T).log_softmax(dim=-1)
    harmful = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    assert batch.reference_losses is not None

    def by_hand(is_clean: Callable[[int, int], bool], column: int = 0) -> float:
        wins = []
        for row, (start, stop) in enumerate(RUNS):
            for i in range(max(start, 1), stop):
                loss = -log_p[row, i - 1, batch.tokens[row, i]].item()
                if is_clean(row, i):
                    wins.append(batch.reference_losses[row, i, column].item() < loss)  # type: ignore[index]
        return sum(wins) / len(wins)

    def right(row: int) -> bool:
        return bool(batch.is_correct[row])

    known = replace(batch, harmful=harmful)
    expected = by_hand(lambda row, i: right(row) and not harmful[row, i])
    assert evaluate(objective, model, [known])["reference_better"] == pytest.approx(expected)
    parts = [rows(known, 0, 3), rows(known, 1, 2)]
    assert evaluate(objective, model, parts)["reference_better"] == pytest.approx(expected)
    unlabelled = by_hand(lambda row, i: right(row))
    assert evaluate(objective, model, [batch])["reference_better"] == pytest.approx(unlabelled)
    others = [by_hand(lambda row, i: True), by_hand(lambda row, i: right(row), column=1)]
    assert all(other != pytest.approx(unlabelled) for other in others), "the controls"
    assert "reference_better" not in evaluate(OBJECTIVE, model, [batch])
    assert "reference_better" not in evaluate(objective, model, [replace(batch, reference_losses=None)])
