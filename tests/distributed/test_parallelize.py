"""Tests of gradients under torch's data-parallel wrappers in one process: the hooks of the wrappers must still run."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import tiny_model
from wmtp.algorithms.base import Algorithm
from wmtp.algorithms.excess_loss import ExcessLoss, TokenSkip
from wmtp.algorithms.uniform import Uniform
from wmtp.data.collate import Batch
from wmtp.data.dataset import Dataset
from wmtp.distributed.parallelize import Strategy, full_tensor, parallelize, synchronize_gradients
from wmtp.models.mtp import MtpModel
from wmtp.objectives.mtp import MtpObjective


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Create a process group that contains only this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    gc.collect()  # parallelized models refer to the group in cycles; a child forked later must not free them
    dist.destroy_process_group()


@pytest.fixture
def batch(tiny_data: Dataset) -> Batch:
    """Return a batch with random reference losses."""
    (batch,) = tiny_data.micro_batches(epoch=0, update=0, batch_size=8, micro_batch_size=8)
    object.__setattr__(batch, "reference_losses", torch.rand(*batch.tokens.shape, 1))
    return batch


def gradients(model: MtpModel, algorithm: Algorithm, batch: Batch, forward: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradient of every parameter, computed through the wrapper `forward`."""
    objective = MtpObjective(algorithm)
    (prepared,) = objective.prepare(model, [batch])
    loss, _ = objective.loss_from_outputs(forward(batch.tokens), model, prepared)
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
    return found


@pytest.mark.parametrize("algorithm", [Uniform(), ExcessLoss(), TokenSkip()], ids=lambda algorithm: algorithm.name)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_are_equal_with_and_without_a_wrapper(
    process_group: None, batch: Batch, algorithm: Algorithm, wrapper: str
) -> None:
    plain = tiny_model()
    expected = gradients(plain, algorithm, batch, plain)
    model = tiny_model()
    reduced_gradients = []
    if wrapper == "ddp":
        forward: torch.nn.Module = DistributedDataParallel(model)
        model.unembedding.weight.register_post_accumulate_grad_hook(
            lambda parameter: reduced_gradients.append(parameter)
        )
    else:
        fully_shard(model, reshard_after_forward=True)
        forward = model
        with pytest.raises(RuntimeError, match="DTensor"):  # control: a sharded matrix cannot be multiplied
            model.unembedding.weight @ torch.randn(64)
    for name, gradient in gradients(model, algorithm, batch, forward).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    assert wrapper == "fsdp" or len(reduced_gradients) == 1


def test_fsdp_sums_the_gradients_of_bf16_parameters_in_fp32(process_group: None) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64, dtype=torch.bfloat16)
    inputs = torch.randn(32, 8, 64, dtype=torch.bfloat16)
    exact = torch.zeros(64, 64, dtype=torch.double)
    for x in inputs.double():
        exact += 2 * (x @ weight.double().T).T @ x

    def relative_error(strategy: Strategy) -> float:
        model = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False, dtype=torch.bfloat16))
        torch.nn.init.zeros_(model[0].weight).data += weight
        parallelize(model, [model[0]], strategy, "fp32")
        for number, x in enumerate(inputs, 1):
            synchronize_gradients(model, number == len(inputs))
            model(x).float().square().sum().backward()
        gradient = full_tensor(model[0].weight.grad)
        assert gradient.dtype == torch.bfloat16
        return float((gradient.double() - exact).norm() / exact.norm())

    assert relative_error("fsdp") < 0.0025
    assert relative_error("single") > 0.004  # the control: torch adds micro-batches in the parameter's dtype


class TwoLayers(torch.nn.Module):
    """A model of which one layer is frozen and takes no part in the forward pass."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.used, self.unused = (torch.nn.Linear(4, 4, dtype=dtype) for _ in range(2))
        self.unused.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fsdp_accumulates_gradients_while_a_frozen_module_does_not_run(process_group: None, dtype: torch.dtype) -> None:
    model = TwoLayers(dtype)
    parallelize(model, [model.used, model.unused], "fsdp", "fp32")
    for now in (False, True):
        synchronize_gradients(model, now)
        model(torch.ones(2, 4, dtype=dtype)).sum().backward()
    torch.testing.assert_close(full_tensor(model.used.bias.grad), torch.full((4,), 4.0, dtype=dtype))
