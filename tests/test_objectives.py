import pytest
import torch

from tests.conftest import tiny_model
from wmtp.algorithms.uniform import Uniform
from wmtp.data.collate import Batch
from wmtp.data.dataset import Dataset
from wmtp.metrics import Sums
from wmtp.models.mtp import MtpModel
from wmtp.objectives.mtp import MtpObjective

OBJECTIVE = MtpObjective(Uniform())


def gradients(model: MtpModel, batches: list[Batch], divide_late: bool = True) -> torch.Tensor:
    """The gradient of one update over micro-batches; divided once at the end, or (wrongly) in each."""
    model.zero_grad()
    totals = torch.stack([OBJECTIVE.totals(model, batch) for batch in batches]).sum(dim=0)
    for batch in batches:
        divisors = totals if divide_late else OBJECTIVE.totals(model, batch) * len(batches)
        OBJECTIVE.loss(model, batch, divisors)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def split(data: Dataset, size: int) -> list[Batch]:
    return data.micro_batches(epoch=0, update=0, batch_size=8, micro_batch_size=size)


@pytest.mark.parametrize("size", [4, 1])
def test_splitting_a_batch_changes_nothing(tiny_data: Dataset, size: int) -> None:
    model = tiny_model()
    whole, parts = gradients(model, split(tiny_data, 8)), gradients(model, split(tiny_data, size))
    assert (whole - parts).norm() / whole.norm() <= 1e-6

    naive = gradients(model, split(tiny_data, size), divide_late=False)
    assert (whole - naive).norm() / whole.norm() > 1e-3


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
    totals = OBJECTIVE.totals(model, batch)
    loss, sums = OBJECTIVE.loss(model, batch, totals)
    assert totals[0] == positions
    assert loss.item() == pytest.approx(total / positions, rel=1e-5)
    assert OBJECTIVE.metrics(sums)["loss"] == pytest.approx(total / positions, rel=1e-5)


def test_every_head_and_their_mean_are_measured_the_same_over_any_split(tiny_data: Dataset) -> None:
    model = tiny_model()

    def measured(size: int) -> dict[str, float]:
        sums = Sums()
        for batch in split(tiny_data, size):
            sums.add(OBJECTIVE.evaluate(model, batch))
        return OBJECTIVE.metrics(sums)

    whole = measured(8)
    assert set(whole) == {"loss", "mtp_loss", *(f"head_{k}_loss" for k in range(1, 5))}
    assert whole["mtp_loss"] == pytest.approx(sum(whole[f"head_{k}_loss"] for k in range(1, 5)) / 4)
    for name, value in measured(3).items():
        assert value == pytest.approx(whole[name], rel=1e-5)


def test_training_measures_weights_and_the_share_of_targets(tiny_data: Dataset) -> None:
    model, (batch,) = tiny_model(), split(tiny_data, 8)
    _, sums = OBJECTIVE.loss(model, batch, OBJECTIVE.totals(model, batch))
    values = OBJECTIVE.metrics(sums)
    assert (values["weight_mean"], values["weight_min"], values["weight_max"], values["weight_std"]) == (1, 1, 1, 0)
    assert 0 < values["valid_target_ratio"] < 1
