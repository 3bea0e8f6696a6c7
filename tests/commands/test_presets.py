"""Tests of presets of conf/experiment together with another option of a config group."""

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from tests.conftest import Invoke
from wmtp.cli import resolve
from wmtp.cli.resolve import compose
from wmtp.config.flatten import flatten
from wmtp.train import COMMAND

LORA = ["experiment=smollm2/lora", "data.path=."]
CRITIC_7B = ["experiment=meta_7b/critic", "model.path=.", "data.path=.", "hardware=cpu"]


def values(*overrides: str) -> tuple[dict[str, Any], str]:
    """Return a composed config with dotted keys, and the messages about the preset."""
    job = compose(COMMAND, list(overrides))
    config = OmegaConf.to_container(job.checked.config, resolve=False)
    assert isinstance(config, dict)
    return flatten(config), "\n".join(job.notes)


@pytest.fixture
def records(tmp_path: Path) -> Path:
    """Return a JSONL file with sixty records."""
    path = tmp_path / "records.jsonl"
    rows = [{"task_id": f"t/{i}", "prompt": f"Say {i}.", "solution": f"print({i})\n"} for i in range(60)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_a_preset_works_with_other_data(invoke: Invoke, records: Path) -> None:
    options = ["max_steps=1", "num_samples=0", "num_validation_samples=0", "report=false"]
    outcome = invoke("experiment=smoke", "data=jsonl", f"data.path={records}", *options, tiny=False)
    assert outcome.code == 0, outcome.err
    assert (
        "experiment=smoke sets data.num_train, data.num_validation, data.num_test for data=tasks; "
        "these are not used with data=jsonl\n" in outcome.err
    )


def test_control_without_the_removal_keys_that_nobody_typed_are_errors(
    invoke: Invoke, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve, "drop_preset_values", lambda *arguments: [])
    outcome = invoke("experiment=smoke", "data=jsonl", f"data.path={records}", tiny=False)
    assert outcome.code == 2 and "data.num_train=200: unknown key" in outcome.err


def test_a_typed_key_of_another_option_stays_an_error(invoke: Invoke, records: Path) -> None:
    outcome = invoke("experiment=smoke", "data=jsonl", f"data.path={records}", "data.num_train=5", tiny=False)
    assert outcome.code == 2
    assert "data.num_train=5: unknown key" in outcome.err and "data.num_test=" not in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "expected", "dropped"),
    [
        (["experiment=smoke", "data=tasks"], {"data.num_train": 200}, ""),
        (["experiment=one_head", "model=nano"], {"model.num_heads": 1, "model.dim": 64}, ""),
        (["experiment=sweep/arms", "model=small"], {"model.dim": 512, "model.num_layers": 6}, "model.dim, "),
        (["experiment=sweep/arms", "model=small", "model.dim=256"], {"model.dim": 256}, "sets model.num_l"),
        ([*LORA, "model=nano"], {"model.lora.rank": None, "data.max_length": 512}, "sets model.lora for model=smollm2"),
        ([*LORA, "model=huggingface", "model.path=."], {"model.lora.rank": 16}, ""),
        ([*LORA, "data=codecontests"], {"data.max_length": 2048}, "sets data.max_length for data=mbpp; this is"),
        ([*CRITIC_7B, "algo=baseline"], {"pretrain": None, "data.group_tasks": True}, "pretrain.trains, "),
        ([*CRITIC_7B, "algo=shuffled"], {"pretrain.trains": "head", "pretrain.optimizer.lr": 1e-4}, ""),
        ([*CRITIC_7B, "algo=rho1"], {"pretrain.trains": None, "pretrain.optimizer.lr": None}, "with pretrain=rho1"),
        ([*CRITIC_7B, "pretrain=none"], {"pretrain": None}, "not used with pretrain=none"),
    ],
)  # fmt: skip
def test_values_that_the_chosen_option_sets_otherwise_are_dropped(
    overrides: list[str], expected: dict[str, Any], dropped: str
) -> None:
    config, notes = values(*overrides)
    assert {key: config.get(key) for key in expected} == expected
    assert dropped in notes and (dropped or not notes), notes


@pytest.mark.slow
def test_a_sweep_says_it_once(invoke: Invoke, records: Path) -> None:
    arguments = ["experiment=smoke", "data=jsonl", f"data.path={records}", "seed=-1,-2"]
    outcome = invoke("-m", *arguments, tiny=False)
    assert outcome.code == 2 and outcome.err.count("these are not used with data=jsonl") == 1
