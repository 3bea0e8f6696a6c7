"""Tests of docs/scaling.md: its formulas against torch on small models, its recommendations against the script."""

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from wmtp.algorithms.base import AdditionalPass, Algorithm
from wmtp.algorithms.critic import Critic
from wmtp.algorithms.excess_loss import ExcessLoss
from wmtp.algorithms.uniform import Uniform
from wmtp.data.collate import Batch
from wmtp.distributed.parallelize import parallelize
from wmtp.models.llama import LlamaArchitecture, create_llama
from wmtp.models.mtp import MtpModel
from wmtp.models.shapes import ModelShape
from wmtp.objectives.mtp import MtpObjective
from wmtp.ops import cross_entropy as losses
from wmtp.training.estimate import memory as estimate
from wmtp.training.estimate.memory import Machine, ParallelSetting
from wmtp.training.estimate.speed import additional_flops_per_token

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "scaling.md"
SAMPLES, POSITIONS = 4, 64
SMALL = {"dim": 256, "num_layers": 4, "num_heads": 3, "num_attention_heads": 4, "hidden_dim": 688, "vocab_size": 96}


def load_script() -> ModuleType:
    """Return the script as a module."""
    spec = importlib.util.spec_from_file_location("estimate_scaling", ROOT / "scripts" / "estimate_scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


script = load_script()
GPUS = Machine(4)


def setting(activation_checkpointing: bool, micro_batch_size: int = SAMPLES) -> ParallelSetting:
    """Return the parallel setting that the page recommends."""
    return ParallelSetting("fsdp", activation_checkpointing, True, micro_batch_size)


def create_model(**sizes: int) -> MtpModel:
    """Return a model of wmtp with the given sizes."""
    return create_llama(LlamaArchitecture(num_kv_heads=sizes["num_attention_heads"], **sizes))  # type: ignore[arg-type]


class GpuNorm(torch.autograd.Function):
    """RMSNorm that, like CUDA's kernel, saves its input and a statistic; under autocast, in and output are fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return x * scale * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] * ctx.saved_tensors[2], None, None


@pytest.fixture
def gpu_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(norm: nn.RMSNorm, x: Tensor) -> Tensor:
        result: Tensor = GpuNorm.apply(x.float(), norm.weight.float(), norm.eps)  # type: ignore[no-untyped-call]
        return result

    monkeypatch.setattr(nn.RMSNorm, "forward", forward)


def with_bf16_blocks(model: MtpModel) -> MtpModel:
    """Return the model with bf16 parameters in its blocks, like those that FSDP gathers."""
    for block in [*model.trunk, *model.heads]:
        block.to(torch.bfloat16)
    return model


@contextmanager
def saved_tensors(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Collect one tensor of each storage that autograd saves, except parameters."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved_by_autograd: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            saved_by_autograd[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved_by_autograd


def saved_per_token(model: MtpModel) -> float:
    """Return the bytes per token that autograd saves in a forward under bf16 autocast."""
    tokens = torch.zeros(SAMPLES, POSITIONS, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16), saved_tensors(model) as saved_by_autograd:
        outputs = model(tokens)
    assert outputs.states.dtype == torch.float32
    return sum(tensor.untyped_storage().nbytes() for tensor in saved_by_autograd.values()) / tokens.numel()


def test_parameters_equal_those_of_the_model() -> None:
    with torch.device("meta"):
        large = create_model(**{name: getattr(ModelShape(), name) for name in script.SIZES})
    assert large.num_parameters == ModelShape().parameters == 6_738_415_616
    assert len(large.state_dict()) == 291
    shape = ModelShape(**SMALL)
    assert create_model(**SMALL).num_parameters == shape.parameters
    assert shape.block_parameters == sum(parameter.numel() for parameter in create_model(**SMALL).trunk[0].parameters())


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_activations_equal_what_autograd_saves(gpu_norms: None, activation_checkpointing: bool) -> None:
    model = with_bf16_blocks(create_model(**SMALL))
    model.activation_checkpointing = activation_checkpointing
    measured = saved_per_token(model)
    shape = ModelShape(**SMALL)
    expected = estimate.activation_bytes(shape, GPUS, setting(activation_checkpointing))
    assert measured == pytest.approx(expected, rel=0.02)

    one_cast = 2 * 2 * shape.dim  # the control: one bf16 copy of a normalized state instead of one per consumer
    if not activation_checkpointing:
        naive = measured - shape.num_blocks * (5 * 2 * shape.dim - one_cast)
        assert naive < 0.9 * expected
    else:
        unshared = shape.num_blocks * 4 * shape.dim + 4 * shape.num_heads * shape.dim
        assert unshared > 1.1 * measured  # as if every head had its own input


def test_without_sharding_autocast_also_saves_a_bf16_copy_of_each_matrix(gpu_norms: None) -> None:
    shape = ModelShape(**SMALL)
    copies = 2 * shape.num_blocks * shape.block_matrices / (SAMPLES * POSITIONS)
    expected = estimate.activation_bytes(shape, GPUS, setting(False))
    assert saved_per_token(create_model(**SMALL)) == pytest.approx(expected + copies, rel=0.02)
    assert copies > 0.1 * expected


def weighted_loss(model: MtpModel) -> Tensor:
    """Return the loss of all heads at every position."""
    tokens = torch.zeros(SAMPLES, POSITIONS, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        states = model(tokens).states
        targets = torch.zeros(states.shape[:3], dtype=torch.long)
        loss, _, _ = losses.weighted_cross_entropy(
            states, model.unembedding.weight, targets, lambda chunk: torch.ones_like(chunk.losses)
        )
    return loss


@pytest.mark.slow
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_operations_equal_those_that_torch_counts(activation_checkpointing: bool) -> None:
    model = create_model(**SMALL)
    model.activation_checkpointing = activation_checkpointing
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        weighted_loss(model).backward()  # type: ignore[no-untyped-call]
    shape = ModelShape(**SMALL)
    model_flops, recomputed = script.flops_per_token(shape, POSITIONS)
    expected = model_flops + (recomputed if activation_checkpointing else 0)
    assert counter.get_total_flops() / (SAMPLES * POSITIONS) == pytest.approx(expected, rel=0.001)
    rule_of_thumb = (8 if activation_checkpointing else 6) * shape.parameters
    assert abs(rule_of_thumb - expected) > 0.01 * expected


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [Uniform(), Critic(), ExcessLoss()], ids=lambda each: each.additional_pass)
def test_operations_of_the_additional_pass_equal_those_that_torch_counts(algorithm: Algorithm) -> None:
    model = create_model(**SMALL)
    if algorithm.needs_values:
        model.add_value_head("state")
    tokens = torch.zeros(SAMPLES, POSITIONS, dtype=torch.long)
    batch = Batch(
        tokens, tokens, torch.ones(SAMPLES), torch.ones(SAMPLES).bool(), torch.arange(SAMPLES),
        tuple("abcd"), tokens.numel(), reference_losses=torch.zeros(*tokens.shape, 1),
    )  # fmt: skip
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        MtpObjective(algorithm).prepare(model, [batch, batch])
    expected = additional_flops_per_token(ModelShape(**SMALL), POSITIONS, algorithm.additional_pass)
    assert counter.get_total_flops() / (2 * SAMPLES * POSITIONS) == pytest.approx(expected, rel=0.001)


class Traffic(TorchDispatchMode):
    """Mode that counts the total bytes that collectives gather and reduce, not only this rank's part."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered, self.reduced = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "allgather" in str(function):
            self.gathered += args[0].nbytes
        if "reduce_scatter" in str(function):
            self.reduced += args[1].nbytes
        return function(*args, **(kwargs or {}))


@pytest.fixture
def group_of_four() -> Iterator[int]:
    """Create a fake process group of four ranks, and return its size."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield 4
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_traffic_equals_the_bytes_that_fsdp_sends(group_of_four: int, activation_checkpointing: bool) -> None:
    model = create_model(**SMALL)
    model.activation_checkpointing = activation_checkpointing
    parallelize(model, [*model.trunk, *model.heads], "fsdp", "bf16")
    with Traffic() as counted:
        weighted_loss(model).backward()  # type: ignore[no-untyped-call]
    share = (group_of_four - 1) / group_of_four
    shape = ModelShape(**SMALL)
    gathered, reduced = script.traffic(shape, group_of_four, setting(activation_checkpointing), micro_batches=1)
    assert (share * counted.gathered, share * counted.reduced) == (gathered, reduced)
    blocks = shape.num_blocks * shape.block_parameters
    assert gathered > 1.4 * share * (
        2 * blocks + 4 * (shape.parameters - blocks)
    )  # the control: parameters gathered in the forward only


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("part", ["trunk", "heads"])
def test_traffic_includes_the_additional_pass_of_an_update_with_several_micro_batches(
    group_of_four: int, part: AdditionalPass
) -> None:
    model, share = create_model(**SMALL), (group_of_four - 1) / group_of_four
    parallelize(model, [*model.trunk, *model.heads], "fsdp", "bf16")
    with Traffic() as counted:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for _ in range(2):
                weighted_loss(model) if part == "heads" else model(torch.zeros(1, POSITIONS).long(), num_heads=0)
        for _ in range(2):
            weighted_loss(model).backward()  # type: ignore[no-untyped-call]
    plain = setting(False)
    gathered, reduced = script.traffic(
        ModelShape(**SMALL), group_of_four, plain._replace(additional_pass=part), micro_batches=2
    )
    assert (share * counted.gathered, share * counted.reduced) == (gathered, reduced)
    control, _ = script.traffic(ModelShape(**SMALL), group_of_four, plain, micro_batches=2)
    assert gathered > 1.15 * control


def test_memory_is_sharded() -> None:
    shape = ModelShape()
    per_gpu = estimate.memory(shape, GPUS, setting(True, 2))
    accumulated = estimate.memory(shape, GPUS, setting(True, 2)._replace(reduce_each_micro_batch=False))
    state = per_gpu["parameters"] + per_gpu["gradients"] + per_gpu["optimizer"]
    assert state == 16 * shape.parameters / 4
    assert accumulated["gradients"] == 4 * shape.parameters  # accumulated without reducing: each GPU has all gradients


def script_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the output of the script."""
    monkeypatch.setattr(sys, "argv", ["estimate_scaling.py", *arguments])
    script.main()
    return capsys.readouterr().out


def recommended_overrides() -> list[list[str]]:
    """Return the overrides of every training command of the page."""
    text = PAGE.read_text().replace("\\\n", " ")
    lines = re.findall(r"-m wmtp\.train (.*)", text)
    return [[word for word in line.split() if "=" in word] for line in lines]


def test_the_page_recommends_the_fastest_setting_that_fits() -> None:
    machines = [script.Cluster(gpus, memory=memory) for gpus, memory in script.MACHINES]
    assert len(recommended_overrides()) == len(machines)
    for machine, overrides in zip(machines, recommended_overrides(), strict=True):
        page_values = dict(override.split("=", 1) for override in overrides)
        recommendation = ParallelSetting(
            "fsdp",  # the strategy of hardware=a100x4
            page_values.get("hardware.activation_checkpointing") == "true",
            page_values.get("hardware.reduce_each_micro_batch") == "true" or machine.processes == 64,
            int(page_values["micro_batch_size"]),
        )
        assert page_values["hardware"] == "a100x4"
        assert int(page_values.get("hardware.num_processes", "4")) == machine.processes
        assert int(page_values["batch_size"]) == machine.batch_size
        assert recommendation == script.best(ModelShape(), machine)


def test_the_rates_on_the_page_equal_those_computed() -> None:
    rows = re.findall(r"^\| (\d+) × A100 (\d+) GB \|.*\| ([\d,]+) – ([\d,]+) tokens/s", PAGE.read_text(), re.MULTILINE)
    assert [(int(row[0]), int(row[1])) for row in rows] == [(4, 40), (4, 80), (64, 80)]
    for gpus, memory, *rates in rows:
        machine = script.Cluster(int(gpus), memory=int(memory))
        found = script.speed(ModelShape(), machine, script.best(ModelShape(), machine))
        page_values = [int(rate.replace(",", "")) for rate in rates]
        assert page_values == pytest.approx([found.slow, found.fast], rel=0.05)


@pytest.mark.parametrize("number", range(3))
def test_the_overrides_of_the_page_compose(compose: Callable[..., DictConfig], number: int) -> None:
    assert compose(*recommended_overrides()[number]).hardware.strategy == "fsdp"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--gpus 8 --num-heads 1 --num-layers 32", "21,000 – 38,000"),
        (
            "--gpus 1 --dim 2048 --num-layers 21 --num-attention-heads 16 --hidden-dim 5504 --batch-size 16",
            "12,000 – 19,200",
        ),
    ],
)
def test_the_page_has_the_results_of_the_options_that_it_mentions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, expected: str
) -> None:
    assert f"`{options}`" in PAGE.read_text() and expected in PAGE.read_text()
    found = re.search(r"\*\*([\d,]+) – ([\d,]+)\*\*", script_output(monkeypatch, capsys, *options.split()))
    assert found is not None
    page_values = [int(rate.replace(",", "")) for rate in expected.split(" – ")]
    assert page_values == pytest.approx([int(rate.replace(",", "")) for rate in found.groups()], rel=0.05)


def test_options_select_one_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = script_output(monkeypatch, capsys, "--gpus", "8", "--memory", "40", "--sequence", "1024", "--ring", "150")
    assert "| 8 × 40 GB | fsdp |" in text
    assert "| 4 ×" not in text and "network of a node" not in text
