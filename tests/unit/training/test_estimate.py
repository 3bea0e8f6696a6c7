"""Tests of the estimates of dry runs and presets against torch: saved tensors, allocations and operations."""

import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import TINY, Invoke, compose_config, tiny_model
from tests.unit.training.test_scaling import saved_tensors
from tests.unit.training.test_scaling import script as scaling
from wmtp.algorithms.contrast import Contrast
from wmtp.algorithms.critic import Critic
from wmtp.algorithms.excess_loss import ExcessLoss, TokenSkip
from wmtp.algorithms.uniform import Uniform
from wmtp.data.dataset import Dataset
from wmtp.data.tokenizer import task_tokenizer
from wmtp.models.architecture import Architecture
from wmtp.models.huggingface.adapters import HuggingFaceArchitecture
from wmtp.models.llama import LlamaArchitecture
from wmtp.models.lora import Lora
from wmtp.models.mtp import MtpModel, empty_model
from wmtp.models.shapes import ModelShape, model_shape
from wmtp.models.value_heads import ValueKind
from wmtp.ops import cross_entropy as losses
from wmtp.training.absent_hardware import describe_estimate, planned_shape
from wmtp.training.dry_run import format_memory, moments_per_parameter
from wmtp.training.estimate.memory import (
    Machine,
    ParallelSetting,
    activation_bytes,
    all_logits_bytes,
    block_bytes,
    loss_bytes,
    memory,
    product_bytes,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "presets.md"
SAMPLES, POSITIONS, VOCABULARY = 4, 64, 96
OURS = {
    "vocab_size": VOCABULARY, "dim": 128, "num_layers": 4, "num_heads": 3, "num_attention_heads": 8, "num_kv_heads": 4,
    "hidden_dim": 344,
}  # fmt: skip
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "intermediate_size": 344, "tie_word_embeddings": True, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip


def gpt2(dropout: float) -> transformers.GPT2Config:
    drops = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), dropout)
    sizes = {"n_embd": 128, "n_layer": 4, "n_head": 8, "n_positions": POSITIONS, "bos_token_id": 0, "eos_token_id": 1}
    return transformers.GPT2Config(vocab_size=VOCABULARY, **sizes, **drops)


def architectures() -> dict[str, Architecture]:
    llama, qwen3 = transformers.LlamaConfig(**SIZES), transformers.Qwen3Config(**SIZES, head_dim=32)
    return {
        "ours": LlamaArchitecture(**OURS),  # type: ignore[arg-type]
        "ours, bf16": LlamaArchitecture(**OURS, dtype="bf16"),  # type: ignore[arg-type]
        "ours, dropout": LlamaArchitecture(**OURS, dropout=0.1),  # type: ignore[arg-type]
        "llama": HuggingFaceArchitecture(llama, 3),
        "llama, bf16": HuggingFaceArchitecture(llama, 3, "transformer", torch.bfloat16),
        "llama, medusa": HuggingFaceArchitecture(llama, 3, "medusa"),
        "qwen3": HuggingFaceArchitecture(qwen3, 3),
        "gpt2": HuggingFaceArchitecture(gpt2(0.0), 3),
        "gpt2, dropout": HuggingFaceArchitecture(gpt2(0.1), 3),
    }


KINDS = tuple(architectures())
CPU = Machine(1, sequence=POSITIONS, batch_size=SAMPLES, device="cpu")
TOKENS = torch.zeros(SAMPLES, POSITIONS, dtype=torch.long)


def single_process(
    precision: str = "fp32", activation_checkpointing: bool = False, micro_batch_size: int = SAMPLES
) -> ParallelSetting:
    """Return the parallel setting of one process."""
    return ParallelSetting("single", activation_checkpointing, False, micro_batch_size, precision)


def create_model(kind: str, rank: int | None = None) -> MtpModel:
    torch.manual_seed(0)
    return MtpModel(architectures()[kind], lora=None if rank is None else Lora(rank=rank)).train()


def total_loss(model: MtpModel, tokens: Tensor) -> Tensor:
    """Return the chunked loss of all heads, plus a loss of the values if there is a value head."""
    outputs = model(tokens)
    targets = tokens.expand(len(outputs.states), *tokens.shape)
    total, _, _ = losses.weighted_cross_entropy(
        outputs.states, model.unembedding_weight, targets, lambda chunk: torch.ones_like(chunk.losses)
    )
    return total if outputs.values is None else total + outputs.values.square().sum()


def autocast(precision: str) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_equal_those_of_the_model_and_of_the_formula(kind: str) -> None:
    model = empty_model(architectures()[kind])
    shape = model_shape(model)
    assert shape.counts is not None
    assert shape.counts.parameters == shape.counts.trained == model.num_parameters
    assert shape.counts.parameter_bytes == model.num_parameters * (2 if "bf16" in kind else 4)
    positions = POSITIONS * shape.dim if "gpt2" in kind else 0  # learned positions are not in the formula
    assert shape.parameters + positions == model.num_parameters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [None, 8])
def test_activations_equal_what_autograd_saves(kind: str, precision: str, rank: int | None) -> None:
    model = create_model(kind, rank)
    with autocast(precision), saved_tensors(model) as saved_by_autograd:
        model(TOKENS)
    shape, setting = model_shape(model), single_process(precision)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved_by_autograd.values()) / TOKENS.numel()
    if product_bytes(shape, setting) < shape.number_bytes:  # bf16 copies of the matrices are counted as work memory
        copies = shape.num_blocks * shape.block_matrices + shape.residual_parameters
        measured -= 2 * copies / TOKENS.numel()
    expected = activation_bytes(shape, CPU, setting)
    assert expected == pytest.approx(measured, rel=0.12 if "dropout" in kind or rank else 0.03)
    without_heads = expected - shape.num_head_blocks * block_bytes(shape, CPU, setting)  # the control
    assert without_heads < 0.8 * measured


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["ours", "ours, bf16", "llama", "llama, bf16", "gpt2"])
@pytest.mark.parametrize(
    ("value", "hidden_dim"), [("state", None), ("state", 64), ("action", None), ("block", None), ("block", 64)]
)
def test_activations_of_value_heads_equal_what_autograd_saves(
    kind: str, precision: str, value: ValueKind, hidden_dim: int | None
) -> None:
    """The difference that the value head makes, in training all parameters and in training the value head only."""

    def saved(model: MtpModel, num_heads: int | None) -> float:
        with autocast(precision), saved_tensors(model) as saved_by_autograd:
            model(TOKENS, num_heads=num_heads)
        return sum(tensor.untyped_storage().nbytes() for tensor in saved_by_autograd.values()) / TOKENS.numel()

    model, setting = create_model(kind), single_process(precision)
    without, expected_without = saved(model, None), activation_bytes(model_shape(model), CPU, setting)
    model.value_head_dim = hidden_dim
    model.add_value_head(value)
    shape = model_shape(model)
    expected = activation_bytes(shape, CPU, setting) - expected_without
    measured = saved(model, None) - without
    copies = 0.0
    if value == "block" and precision == "bf16":
        copies = 2 * shape.block_matrices / TOKENS.numel()  # bf16 copies of the matrices are counted as work memory
    assert expected == pytest.approx(measured - copies, rel=0.1)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("value_head."))
    alone = activation_bytes(model_shape(model), CPU, setting)
    assert alone == pytest.approx(saved(model, 0) - copies, rel=0.1)


@pytest.mark.parametrize("kind", ["ours", "llama", "llama, bf16", "gpt2"])
def test_activation_checkpointing_saves_the_inputs_of_blocks(kind: str) -> None:
    model = create_model(kind)
    model.activation_checkpointing = True
    with saved_tensors(model) as saved_by_autograd:
        model(TOKENS)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved_by_autograd.values()) / TOKENS.numel()
    expected = activation_bytes(model_shape(model), CPU, single_process(activation_checkpointing=True))
    assert expected == pytest.approx(measured, rel=0.03)


def test_unfused_attention_saves_all_pairs_of_positions() -> None:
    model, on_mps = create_model("llama"), Machine(1, sequence=POSITIONS, batch_size=SAMPLES, device="mps")
    with sdpa_kernel(SDPBackend.MATH), saved_tensors(model) as saved_by_autograd:
        model(TOKENS)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in saved_by_autograd.values()) / TOKENS.numel()
    assert activation_bytes(model_shape(model), on_mps, single_process()) == pytest.approx(measured, rel=0.08)
    assert activation_bytes(model_shape(model), CPU, single_process()) < 0.85 * measured


def peak(function: Callable[[], object]) -> int:
    """Return the peak bytes of tensors that `function` allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events: Any = profiled.profiler
    changes = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(changes, key=lambda each: each.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize(("kind", "forwards"), [("ours", 1), ("ours", 2), ("llama", 2), ("gpt2", 1)])
def test_update_needs_at_most_the_estimated_memory(kind: str, forwards: int) -> None:
    model = create_model(kind)

    def update() -> None:
        for tokens in TOKENS.chunk(forwards):
            total_loss(model, tokens).backward()  # type: ignore[no-untyped-call]

    update()  # the first update also allocates memory that later updates reuse
    model.zero_grad()
    measured, shape = peak(update), model_shape(model)
    estimated = memory(shape, CPU, single_process(micro_batch_size=SAMPLES // forwards))
    assert estimated["total"] - estimated["parameters"] - estimated["optimizer"] == pytest.approx(measured, rel=0.2)
    assert estimated["activations"] + estimated["loss"] < (1.1 if forwards == 1 else 0.75) * measured


def test_the_loss_takes_less_than_all_logits() -> None:
    shape, tokens = ModelShape(), 2 * 2048
    chunked = loss_bytes(shape, Machine(4), ParallelSetting("fsdp", False, True, 2), tokens)
    assert chunked < all_logits_bytes(shape, tokens) / 2
    assert all_logits_bytes(shape, tokens) == 2 * 4 * 4 * 32000 * tokens
    tiny = ModelShape(dim=8, num_attention_heads=1, vocab_size=10)  # all logits fit in one chunk
    assert loss_bytes(tiny, CPU, single_process(), 3) == (2 * 4 * 4 * 8 + 4 * 4 * 10) * 3 + 4 * 10 * 8
    # in bf16: the unembedding's gradient in fp32, and that of one chunk in bf16
    in_bf16 = replace(tiny, number_bytes=2)
    assert loss_bytes(in_bf16, CPU, single_process(), 3) == (2 * 2 * 4 * 8 + 2.5 * 4 * 4 * 10) * 3 + (4 + 2) * 10 * 8


def test_scaling_heads_in_one_pass_takes_a_gradient_of_the_unembedding_for_each() -> None:
    model, one_pass = create_model("ours"), single_process()._replace(scales_heads_in_one_pass=True)
    shape = model_shape(model)

    def stored(by_head: bool) -> int:
        outputs = model(TOKENS)
        targets = TOKENS.expand(len(outputs.states), *TOKENS.shape)
        sums, _, _ = losses.weighted_cross_entropy(
            outputs.states, model.unembedding_weight, targets, lambda chunk: torch.ones_like(chunk.losses),
            by_head=by_head,
        )  # fmt: skip
        return sum(gradient.nbytes for gradient in sums.grad_fn.gradients)  # type: ignore[union-attr]

    more = loss_bytes(shape, CPU, one_pass, TOKENS.numel()) - loss_bytes(shape, CPU, single_process(), TOKENS.numel())
    assert more == stored(by_head=True) - stored(by_head=False) > 0
    halves = one_pass._replace(micro_batch_size=SAMPLES // 2)
    assert loss_bytes(shape, CPU, halves, 9) == loss_bytes(shape, CPU, single_process(), 9)
    assert ExcessLoss().scales_heads_in_one_pass and not ExcessLoss(rescale=False).scales_heads_in_one_pass
    assert not TokenSkip().scales_heads_in_one_pass and not Contrast().scales_heads_in_one_pass


@pytest.mark.parametrize(("kind", "rank"), [("llama", None), ("llama, medusa", None), ("gpt2", None), ("ours", 8)])
def test_operations_equal_those_that_torch_counts(kind: str, rank: int | None) -> None:
    model = create_model(kind, rank)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        total_loss(model, TOKENS).backward()  # type: ignore[no-untyped-call]
    counted = counter.get_total_flops() / TOKENS.numel()
    adapters = 0
    if rank:  # the estimate omits adapters, which are cheap compared with wide matrices
        adapters = 6 * sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert scaling.flops_per_token(model_shape(model), POSITIONS)[0] + adapters == pytest.approx(counted, rel=0.02)


def test_frozen_parameters_have_no_gradient_and_no_moments() -> None:
    model = create_model("llama", rank=4)
    shape = model_shape(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    estimated = memory(shape, CPU, single_process())
    assert (estimated["gradients"], estimated["optimizer"]) == (4 * trained, 8 * trained)
    assert estimated["parameters"] == 4 * model.num_parameters > 4 * trained
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("value_head."))
    model.add_value_head()
    values_only = memory(model_shape(model), CPU, single_process())
    assert values_only["loss"] == values_only["work"] == 0
    assert values_only["activations"] < 0.05 * estimated["activations"]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (torch.optim.AdamW, 2),
        (torch.optim.SGD, 0),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), 1),
    ],
)
def test_moments_of_the_optimizer_are_counted(optimizer: Callable[..., torch.optim.Optimizer], expected: int) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 2))
    instance = optimizer([parameter])
    parameter.sum().backward()  # type: ignore[no-untyped-call]
    instance.step()
    assert moments_per_parameter(instance) == expected


def test_memory_is_printed_with_its_unit_and_uses() -> None:
    sizes = memory(ModelShape(), Machine(4), ParallelSetting("fsdp", False, True, 2))
    text = format_memory(sizes, Machine(4), ParallelSetting("fsdp", False, True, 2))
    assert f"about {sizes['total'] / 1e9:.1f} GB a process with 2 x 2,048 tokens: parameters" in text
    small = format_memory({"gradients": 2e6, "work": 1e3, "total": 2e6}, Machine(4, batch_size=4), single_process())
    assert small.endswith("about 2.0 MB a process with 4 x 2,048 tokens: gradients 2.0 (reuse activations)")


def test_dry_run_prints_memory_and_time_of_each_stage(invoke: Invoke) -> None:
    outcome = invoke("dry_run=true", "algo=critic", "pretrain.trains=head")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    memory_lines = [i for i, line in enumerate(lines) if line.startswith("memory: about ")]
    times = [line for line in lines if line.startswith("time: up to ")]
    assert len(memory_lines) == len(times) == 2
    assert "activations" in lines[memory_lines[1]] + lines[memory_lines[1] + 1]
    assert all(re.search(r"for \d+ updates; the first took [\d.]+ s, at [\d,]+ tokens/s", line) for line in times)
    assert max(len(line) for line in [*times, *(lines[i + j] for i in memory_lines for j in (0, 1))]) <= 80


GPUS = ["hardware=a100x4", "algo=critic", "model.num_layers=3"]
"""Overrides of a run that needs GPUs."""


@pytest.mark.skipif(torch.cuda.device_count() >= 4, reason="the hardware is here")
def test_a_dry_run_estimates_for_hardware_that_is_not_here(invoke: Invoke, cache: Path) -> None:
    """The two estimates are those of the model with a value head; the command itself and other faults are refused."""
    outcome = invoke(*GPUS, "dry_run=true")
    assert outcome.code == 0, outcome.err
    assert "WARNING: hardware.device=cuda: this machine has no cuda device" in outcome.err
    config = compose_config(*TINY, *GPUS)
    shape = planned_shape(config, task_tokenizer(cache), Critic(value="action"))
    assert outcome.out.count(f"{shape.counted.parameters:,} parameters, 4 heads, on cuda, 4 processes (fsdp)") == 2
    sequence = int(re.findall(r"a process with 4 x (\d+) tokens", outcome.out)[1])
    sizes = memory(shape, Machine(4, sequence, 16), ParallelSetting("fsdp", False, False, 4))
    assert outcome.out.count(f"memory: about {sizes['total'] / 1e6:.1f} MB a process") == 2
    assert "no update ran" in outcome.out and "train/loss" not in outcome.out
    refused = invoke(*GPUS)
    assert refused.code == 2 and "this machine has no cuda device" in refused.err
    also_wrong = invoke(*GPUS, "dry_run=true", "hardware.strategy=single")
    assert also_wrong.code == 2 and "several processes need ddp or fsdp" in also_wrong.err
    assert "no cuda device" not in also_wrong.err


def test_the_time_is_estimated_for_models_that_keep_gpus_busy(tiny_data: Dataset) -> None:
    """The lowest estimate is above that of 6 FLOPs for each parameter and token at the peak speed of four A100s."""
    config = compose_config("hardware=a100x4")
    text = describe_estimate(config, tiny_data, ModelShape(), Uniform())
    found = re.search(r"time: ([\d.]+) s to ([\d.]+) s for 9 updates", text)
    assert found is not None, text
    least, most = map(float, found.groups())
    tokens = 3 * float(tiny_data.train.samples.lengths.sum())
    assert 6 * ModelShape().parameters * tokens / 4 / 312e12 < least <= most < 20 * least
    assert "too small" in describe_estimate(config, tiny_data, model_shape(tiny_model()), Uniform()), "the control"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """Return the script that prints the tables of docs/presets.md."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import estimate_presets
    finally:
        sys.path.pop(0)
    return estimate_presets


def test_the_page_contains_every_preset_and_the_output_of_a_dry_run(script: ModuleType) -> None:
    text = PAGE.read_text()
    assert all(f"`{preset}`" in text for preset in script.presets())
    assert re.search(r"^memory: about .* a process with 16 x \d+ tokens", text, re.MULTILINE)
    assert re.search(r"^time: up to .* for 20 updates; the first took", text, re.MULTILINE)


@pytest.mark.parametrize("preset", ["meta_7b/baseline", "meta_7b/critic", "meta_7b/rho1", "meta_7b/rho1_token_skip"])
def test_presets_of_the_7b_model_have_the_right_algorithm(compose: Callable[..., DictConfig], preset: str) -> None:
    config = compose(f"experiment={preset}")
    assert "MetaCheckpoint" in config.model._target_ and config.hardware.num_processes == 4
    assert (config.pretrain is None) == (preset == "meta_7b/baseline")
    assert (config.batch_size, config.micro_batch_size, config.optimizer.lr) == (64, 2, 1e-5)
    assert config.data.correct_ratio == 0.5 and config.num_samples == config.num_validation_samples == 0
