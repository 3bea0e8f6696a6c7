"""docs/scaling.md: its formulas against torch on small models, and its tables against the script that prints them."""

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

from wmtp.distributed.parallelize import parallelize
from wmtp.models.llama import LlamaArchitecture, create_llama
from wmtp.models.mtp import MtpModel
from wmtp.models.shapes import ModelShape
from wmtp.ops import cross_entropy as losses
from wmtp.training import estimate
from wmtp.training.estimate import Machine, ParallelSetting

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "scaling.md"
SAMPLES, POSITIONS = 4, 64
SMALL = {"dim": 256, "num_layers": 4, "num_heads": 3, "num_attention_heads": 4, "hidden_dim": 688, "vocab_size": 96}


def loaded() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("estimate_scaling", ROOT / "scripts" / "estimate_scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = loaded()
GPUS = Machine(4)


def setting(activation_checkpointing: bool, micro_batch_size: int = SAMPLES) -> ParallelSetting:
    """As the page recommends it."""
    return ParallelSetting("fsdp", activation_checkpointing, True, micro_batch_size)


def built(**sizes: int) -> MtpModel:
    """wmtp's model of a shape."""
    return create_llama(LlamaArchitecture(num_kv_heads=sizes["num_attention_heads"], **sizes))  # type: ignore[arg-type]


class NormOfGpu(torch.autograd.Function):
    """What CUDA's kernel keeps of an RMSNorm: its input and a statistic; under autocast in fp32, as its result."""

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
        result: Tensor = NormOfGpu.apply(x.float(), norm.weight.float(), norm.eps)  # type: ignore[no-untyped-call]
        return result

    monkeypatch.setattr(nn.RMSNorm, "forward", forward)


def gathered_in_bf16(model: MtpModel) -> MtpModel:
    """A model whose blocks have bf16 parameters, as they do while FSDP has gathered them."""
    for block in [*model.trunk, *model.heads]:
        block.to(torch.bfloat16)
    return model


@contextmanager
def saved(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Every storage that autograd keeps, once, besides the parameters."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in own:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def saved_per_token(model: MtpModel) -> float:
    """Bytes that autograd keeps of a forward under bf16 autocast, for each token."""
    tokens = torch.zeros(SAMPLES, POSITIONS, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16), saved(model) as kept:
        outputs = model(tokens)
    assert outputs.states.dtype == torch.float32
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / tokens.numel()


def test_parameters_are_those_of_the_model() -> None:
    with torch.device("meta"):
        large = built(**{name: getattr(ModelShape(), name) for name in script.SIZES})
    assert large.num_parameters == ModelShape().parameters == 6_738_415_616
    assert len(large.state_dict()) == 291
    shape = ModelShape(**SMALL)
    assert built(**SMALL).num_parameters == shape.parameters
    assert shape.block_parameters == sum(parameter.numel() for parameter in built(**SMALL).trunk[0].parameters())


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_activations_are_those_that_autograd_keeps(gpu_norms: None, activation_checkpointing: bool) -> None:
    model = gathered_in_bf16(built(**SMALL))
    model.activation_checkpointing = activation_checkpointing
    measured = saved_per_token(model)
    shape = ModelShape(**SMALL)
    expected = estimate.activation_bytes(shape, GPUS, setting(activation_checkpointing))
    assert measured == pytest.approx(expected, rel=0.02)

    one_cast = 2 * 2 * shape.dim  # the control: a normed state that all its readers share
    if not activation_checkpointing:
        naive = measured - shape.num_blocks * (5 * 2 * shape.dim - one_cast)
        assert naive < 0.9 * expected
    else:
        unshared = shape.num_blocks * 4 * shape.dim + 4 * shape.num_heads * shape.dim
        assert unshared > 1.1 * measured  # as if every head had an input of its own


def test_without_sharding_autocast_also_keeps_a_bf16_copy_of_each_matrix(gpu_norms: None) -> None:
    shape = ModelShape(**SMALL)
    copies = 2 * shape.num_blocks * shape.block_matrices / (SAMPLES * POSITIONS)
    expected = estimate.activation_bytes(shape, GPUS, setting(False))
    assert saved_per_token(built(**SMALL)) == pytest.approx(expected + copies, rel=0.02)
    assert copies > 0.1 * expected


def weighted_loss(model: MtpModel) -> Tensor:
    """The loss of all heads at every position."""
    tokens = torch.zeros(SAMPLES, POSITIONS, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        states = model(tokens).states
        targets = torch.zeros(states.shape[:3], dtype=torch.long)
        loss, _, _ = losses.weighted_cross_entropy(
            states, model.unembedding.weight, targets, lambda values, rows: torch.ones_like(values)
        )
    return loss


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_operations_are_those_that_torch_counts(activation_checkpointing: bool) -> None:
    model = built(**SMALL)
    model.activation_checkpointing = activation_checkpointing
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        weighted_loss(model).backward()  # type: ignore[no-untyped-call]
    shape = ModelShape(**SMALL)
    model_flops, again = estimate.flops_per_token(shape, POSITIONS)
    wanted = model_flops + (again if activation_checkpointing else 0)
    assert counter.get_total_flops() / (SAMPLES * POSITIONS) == pytest.approx(wanted, rel=0.001)
    rule_of_thumb = (8 if activation_checkpointing else 6) * shape.parameters
    assert abs(rule_of_thumb - wanted) > 0.01 * wanted


class Traffic(TorchDispatchMode):
    """Bytes that collectives gather and reduce, whole, not only this rank's part."""

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
    """A process group that sends nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield 4
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_bytes_are_those_that_fsdp_sends(group_of_four: int, activation_checkpointing: bool) -> None:
    model = built(**SMALL)
    model.activation_checkpointing = activation_checkpointing
    parallelize(model, [*model.trunk, *model.heads], "fsdp", "bf16")
    with Traffic() as counted:
        weighted_loss(model).backward()  # type: ignore[no-untyped-call]
    share = (group_of_four - 1) / group_of_four
    shape = ModelShape(**SMALL)
    gathered, reduced = estimate.traffic(shape, group_of_four, setting(activation_checkpointing), micro_batches=1)
    assert (share * counted.gathered, share * counted.reduced) == (gathered, reduced)
    blocks = shape.num_blocks * shape.block_parameters
    assert gathered > 1.4 * share * (2 * blocks + 4 * (shape.parameters - blocks))  # the control: for the forward only


def test_memory_is_sharded() -> None:
    shape = ModelShape()
    each = estimate.memory(shape, GPUS, setting(True, 2))
    once = estimate.memory(shape, GPUS, setting(True, 2)._replace(reduce_each_micro_batch=False))
    state = each["parameters"] + each["gradients"] + each["optimizer"]
    assert state == 16 * shape.parameters / 4
    assert once["gradients"] == 4 * shape.parameters  # accumulated without reducing: one GPU holds them all


def blocks_of_tables(text: str) -> list[str]:
    """The tables of a Markdown text."""
    return re.findall(r"(?:^\|.*\n?)+", text, flags=re.MULTILINE)


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The output of the script."""
    monkeypatch.setattr(sys, "argv", ["estimate_scaling.py", *arguments])
    script.main()
    return capsys.readouterr().out


def test_the_pages_tables_are_what_the_script_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def tables() -> list[str]:
        return [table.strip() for table in blocks_of_tables(printed(monkeypatch, capsys))]

    on_page = [table.strip() for table in blocks_of_tables(PAGE.read_text())]
    computed = [table for table in on_page if not table.startswith("| machine")]
    assert len(computed) == 4
    assert computed == tables()
    monkeypatch.setattr(estimate, "RING_BANDWIDTH", 210e9)
    assert computed != tables()


def recommended() -> list[list[str]]:
    """The overrides of every training command of the page."""
    text = PAGE.read_text().replace("\\\n", " ")
    lines = re.findall(r"-m wmtp\.train (.*)", text)
    return [[word for word in line.split() if "=" in word] for line in lines]


def test_the_page_recommends_what_fits_and_is_fastest() -> None:
    machines = [Machine(4, 40), Machine(4, 80), Machine(64, 80)]
    assert len(recommended()) == len(machines)
    for machine, overrides in zip(machines, recommended(), strict=True):
        said = dict(override.split("=", 1) for override in overrides)
        recommendation = ParallelSetting(
            "fsdp",  # of hardware=a100x4
            said.get("hardware.activation_checkpointing") == "true",
            said.get("hardware.reduce_each_micro_batch") == "true" or machine.processes == 64,
            int(said["micro_batch_size"]),
        )
        assert said["hardware"] == "a100x4"
        assert int(said.get("hardware.num_processes", "4")) == machine.processes
        assert int(said["batch_size"]) == machine.batch_size
        assert recommendation == script.best(ModelShape(), machine)


def test_the_page_expects_what_was_computed() -> None:
    rows = re.findall(r"^\| (\d+) × A100 (\d+) GB \|.*\| ([\d,]+) – ([\d,]+) tokens/s", PAGE.read_text(), re.MULTILINE)
    assert [(int(row[0]), int(row[1])) for row in rows] == [(4, 40), (4, 80), (64, 80)]
    for gpus, memory, *rates in rows:
        machine = Machine(int(gpus), int(memory))
        found = estimate.speed(ModelShape(), machine, script.best(ModelShape(), machine))
        said = [int(rate.replace(",", "")) for rate in rates]
        assert said == pytest.approx([found.slow, found.fast], rel=0.05)


@pytest.mark.parametrize("number", range(3))
def test_the_pages_overrides_compose(compose: Callable[..., DictConfig], number: int) -> None:
    assert compose(*recommended()[number]).hardware.strategy == "fsdp"


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
def test_page_shows_the_results_of_its_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: str, expected: str
) -> None:
    assert f"`{options}`" in PAGE.read_text() and expected in PAGE.read_text()
    found = re.search(r"\*\*([\d,]+) – ([\d,]+)\*\*", printed(monkeypatch, capsys, *options.split()))
    assert found is not None
    said = [int(rate.replace(",", "")) for rate in expected.split(" – ")]
    assert said == pytest.approx([int(rate.replace(",", "")) for rate in found.groups()], rel=0.05)


def test_options_select_one_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(monkeypatch, capsys, "--gpus", "8", "--memory", "40", "--sequence", "1024", "--ring", "150")
    assert "| 8 × 40 GB | fsdp |" in text
    assert "| 4 ×" not in text and "network of a node" not in text
