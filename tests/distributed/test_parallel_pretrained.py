"""Tests that training pretrained models in two processes gives the results of training in one process."""

from pathlib import Path

import pytest
import torch

from tests.distributed.test_parallel import worst_loss
from tests.support.families import write_family
from tests.support.ranks import Ranks
from tests.support.training import STRATEGIES, train_run
from wmtp.data.tokenizer import Tokenizer

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.slow]
CASES = {
    "tied": ("llama-tied", []),
    "learned positions, medusa heads": ("gpt2", ["model.head_kind=medusa", "checkpoint=sharded"]),
    "bf16, with a value head": (
        "qwen2",
        ["model.dtype=bf16", "hardware.precision=bf16", "algo=critic", "pretrain=none", "data.correct_ratio=0.5"],
    ),
    "adapters": ("qwen3", ["model.lora.rank=2", "algo=critic", "pretrain.trains=head", "pretrain.max_steps=2"]),
    "bf16, with a block as value head": (
        "qwen2",
        [
            "model.dtype=bf16",
            "hardware.precision=bf16",
            "algo=critic",
            "algo.value=block",
            "pretrain=none",
            "data.correct_ratio=0.5",
        ],
    ),
    "contrast with adapters": ("llama", ["model.lora.rank=2", "algo=contrast", "pretrain.max_steps=2"]),
    "implicit_reward with adapters": ("qwen2", ["model.lora.rank=2", "algo=implicit_reward", "pretrain.max_steps=2"]),
}
DEEP = list(CASES)[-3:]


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.deep) if case in DEEP else case for case in CASES]
)
def test_two_processes_train_like_one_process(case: str, ranks: Ranks, tokenizer: Tokenizer, tmp_path: Path) -> None:
    family, options = CASES[case]
    path = write_family(tmp_path / "model", family, tokenizer)
    dropouts = ["attn_pdrop", "embd_pdrop", "resid_pdrop"] if family == "gpt2" else []
    config = path / "config.json"
    for name in dropouts:  # disabled, because each rank draws its own dropout masks
        config.write_text(config.read_text().replace(f'"{name}": 0.1', f'"{name}": 0.0'))
    overrides = ["model=huggingface", f"model.path={path}", "model.num_heads=2", "max_steps=4", *options]
    overrides += ["num_validation_samples=2", "optimizer.lr=1e-3"]
    alone = train_run(tmp_path / "alone", *overrides)
    for strategy in STRATEGIES:
        first, second = ranks(train_run, tmp_path / strategy, *overrides, *STRATEGIES[strategy], timeout=60)
        assert first == second
        assert worst_loss(alone, first) <= (0.02 if "model.dtype=bf16" in options else 1e-5), strategy
    other_seed = train_run(tmp_path / "other", *overrides, "seed=1")
    assert worst_loss(alone, other_seed) > (0.02 if "model.dtype=bf16" in options else 1e-3), "control: another seed"
    assert torch.isfinite(torch.tensor([line["train/loss"] for line in alone if "train/loss" in line])).all()
