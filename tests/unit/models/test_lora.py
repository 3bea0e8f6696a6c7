"""Tests of adapters: trained and saved parameters, resumed runs, merged models."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import Invoke
from tests.support.families import write_family
from wmtp.data.tokenizer import Tokenizer
from wmtp.generation.decoding import Request, generate
from wmtp.generation.settings import Decoding
from wmtp.models.huggingface.pretrained import Pretrained
from wmtp.models.llama import LlamaArchitecture
from wmtp.models.lora import ADAPTER_SUBSTRING, Lora, effective_weight, merge_adapters
from wmtp.models.mtp import MtpModel, unsharded_copy

pytestmark = pytest.mark.slow
QUICK = [
    "data.num_train=40", "data.num_validation=8", "data.num_test=8", "num_samples=0", "optimizer.lr=0.01",
    "early_stopping=none", "report=false",
]  # fmt: skip
OWN = LlamaArchitecture(
    vocab_size=512, dim=32, num_layers=3, num_heads=3, num_attention_heads=4, num_kv_heads=2, hidden_dim=48
)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Path:
    """Return the folder of a tiny Llama."""
    return write_family(tmp_path_factory.mktemp("lora") / "llama", "llama", tokenizer)


def overrides(path: Path, rank: int | None = 2, *more: str) -> list[str]:
    """Return overrides of a run with adapters."""
    rank_of = [] if rank is None else [f"model.lora.rank={rank}"]
    return ["model=huggingface", f"model.path={path}", "model.num_heads=2", *rank_of, *QUICK, *more]


def with_random_adapters(model: MtpModel, seed: int = 0) -> MtpModel:
    """Set the adapters to random values, so that they change the model."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ADAPTER_SUBSTRING in name:
            parameter.data = 0.3 * torch.randn_like(parameter)
    return model.eval()


def logits_of(model: MtpModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).states @ model.unembedding_weight.T


def own_model(tokens: Tensor) -> tuple[MtpModel, Tensor]:
    """Return a model of wmtp's own blocks with adapters, and the logits of its base."""
    torch.manual_seed(1)
    plain = MtpModel(OWN)
    base = logits_of(plain, tokens)
    return MtpModel(OWN, plain.top_modules(), lora=Lora(rank=2)), base


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(3, 512, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_new_adapters_do_not_change_the_model(
    family: str, tmp_path: Path, tokenizer: Tokenizer, tokens: Tensor
) -> None:
    path = write_family(tmp_path / family, family, tokenizer)
    plain = Pretrained(tokenizer=tokenizer, path=path, num_heads=2, lora=Lora()).create().eval()
    model = Pretrained(tokenizer=tokenizer, path=path, num_heads=2, lora=Lora(rank=3)).create().eval()
    torch.testing.assert_close(logits_of(model, tokens), logits_of(plain, tokens))
    changed = logits_of(with_random_adapters(model), tokens)
    assert (changed - logits_of(plain, tokens)).abs().max() > 0.1, (
        "the control: random adapters do not change the model"
    )


def test_only_adapters_heads_and_value_head_train(folder: Path, tokenizer: Tokenizer) -> None:
    model = Pretrained(tokenizer=tokenizer, path=folder, num_heads=2, lora=Lora(rank=2)).create()
    model.add_value_head()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {
        n for n, _ in model.named_parameters() if n.startswith(("heads.", "value_head.")) or ADAPTER_SUBSTRING in n
    }
    assert trained and trained == set(model.checkpoint_tensors()), (
        "trained parameters differ from those in a checkpoint"
    )
    assert "embedding.weight" in model.base_names and "norm.weight" in model.base_names


def test_a_run_keeps_the_base_unchanged_and_saves_all_other_tensors(
    folder: Path, invoke: Invoke, tmp_path: Path
) -> None:
    before = (folder / "model.safetensors").read_bytes()
    assert invoke(*overrides(folder, 2, "max_steps=2", "hydra.run.dir=run"), tiny=False).code == 0
    assert invoke(*overrides(folder, None, "max_steps=2", "hydra.run.dir=full"), tiny=False).code == 0
    assert (folder / "model.safetensors").read_bytes() == before
    names = {}
    for run in ("run", "full"):
        with safe_open(f"{run}/checkpoints/step_00000002/model.safetensors", framework="pt") as file:
            names[run] = set(file.keys())
    assert names["run"] and all(name.startswith("heads.") or ADAPTER_SUBSTRING in name for name in names["run"])
    assert {"embedding.weight", "norm.weight"} <= names["full"], "the control"
    stored, original = (
        load_file("run/checkpoints/step_00000002/model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    last = "model.layers.2.self_attn.q_proj.weight"
    assert not torch.equal(stored["heads.0.layer.self_attn.q_proj.weight"], original[last]), (
        "a tensor of head 1 was not saved"
    )


def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, invoke: Invoke) -> None:
    common = overrides(folder, 2, "model.lora.dropout=0.1", "save_interval=2", "max_steps=4")
    for run in ("uninterrupted", "resumed"):
        assert invoke(*common, f"hydra.run.dir={run}", tiny=False).code == 0
    shutil.rmtree("resumed/checkpoints/step_00000004")
    outcome = invoke("resume=resumed", tiny=False)
    assert outcome.code == 0, outcome.err
    last = "checkpoints/step_00000004/model.safetensors"
    assert Path("resumed", last).read_bytes() == Path("uninterrupted", last).read_bytes()


def test_another_base_model_is_refused_by_resume_and_generate(folder: Path, invoke: Invoke, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "base"))
    assert invoke(*overrides(path, 2, "max_steps=2", "hydra.run.dir=run"), tiny=False).code == 0
    answer = ["checkpoint=run", "prompt=Write f(x).", "generation.max_new_tokens=4"]
    assert invoke(*answer, command="generate").code == 0
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] += 1
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    for outcome in (invoke("resume=run", "max_steps=4", tiny=False), invoke(*answer, command="generate")):
        assert outcome.code == 2 and "base" in outcome.err


@pytest.mark.parametrize("invalid", ["model.lora.targets=[q_proj,nowhere]", "model.lora.rank=0", "model.lora.rang=3"])
def test_wrong_adapters_are_refused_before_weights_are_loaded(
    invalid: str, folder: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Pretrained, "_load", lambda self: pytest.fail("weights were loaded"))
    outcome = invoke(*overrides(folder, 2, invalid, "hydra.run.dir=run"), tiny=False)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    if "nowhere" in invalid:
        assert (
            "model.lora.targets=nowhere: the trunk has no such matrix; it has down_proj, gate_proj, k_proj"
            in outcome.err
        )
    assert not Path("run").exists()


def test_lora_targets_select_the_matrices(folder: Path, tokenizer: Tokenizer) -> None:
    lora = Lora(rank=2, targets=("q_proj", "v_proj"))
    model = Pretrained(tokenizer=tokenizer, path=folder, num_heads=2, lora=lora).create()
    names = {
        name.split(f".{ADAPTER_SUBSTRING}")[0].rpartition(".")[2]
        for name in model.checkpoint_tensors()
        if ADAPTER_SUBSTRING in name
    }
    assert names == {"q_proj", "v_proj"}


@pytest.mark.parametrize("kind", ["own", "llama", "gpt2"])
def test_merging_gives_the_same_model_without_adapters(
    kind: str, tmp_path: Path, tokenizer: Tokenizer, tokens: Tensor
) -> None:
    if kind == "own":
        model, base = own_model(tokens)
    else:
        path = write_family(tmp_path / kind, kind, tokenizer)
        model = Pretrained(tokenizer=tokenizer, path=path, num_heads=2, lora=Lora(rank=2)).create().eval()
        base = logits_of(model, tokens)
    expected = logits_of(with_random_adapters(model), tokens)
    assert (expected - base).abs().max() > 0.1, "the control: the adapters do not change the model"
    merge_adapters(model.trunk)
    assert not any(ADAPTER_SUBSTRING in name for name in model.state_dict())
    torch.testing.assert_close(logits_of(model, tokens), expected, rtol=1e-4, atol=1e-4)


def test_decoding_with_our_own_blocks_includes_the_adapters(tokens: Tensor, tokenizer: Tokenizer) -> None:
    """Decoding fuses blocks into large matrices, which must include the adapters."""
    model = with_random_adapters(own_model(tokens)[0])
    prompt = tokens[0].tolist()
    ((_, answer),) = generate(model, tokenizer, [Request(prompt)], Decoding(max_new_tokens=12), 64)
    written = list(prompt)
    for token in answer.tokens:
        assert int(logits_of(model, torch.tensor([written]))[0, 0, -1].argmax()) == token
        written.append(token)
    layer = model.trunk[0].attention.query
    assert not torch.equal(effective_weight(layer), layer.get_base_layer().weight), "the control"


def test_an_unsharded_copy_has_the_adapters(
    tokens: Tensor, monkeypatch: pytest.MonkeyPatch, folder: Path, tokenizer: Tokenizer
) -> None:
    model = with_random_adapters(Pretrained(tokenizer=tokenizer, path=folder, num_heads=2, lora=Lora(rank=2)).create())
    for parameter in model.parameters():
        parameter.full_tensor = None  # type: ignore[attr-defined]  # as if the model were sharded over processes
    monkeypatch.setattr("wmtp.models.mtp.full_tensor", lambda tensor: tensor)
    copy = unsharded_copy(model, keep=True)
    assert copy is not None and copy is not model
    torch.testing.assert_close(logits_of(copy.eval(), tokens), logits_of(model, tokens))


@pytest.mark.slow
def test_stage_1_of_the_critic_trains_the_value_head_and_stage_2_adapters_and_heads(
    folder: Path, invoke: Invoke, compose: Callable[..., object]
) -> None:
    critic = ["algo=critic", "pretrain.trains=head", "max_steps=2", "hydra.run.dir=run"]
    outcome = invoke(*overrides(folder, 2, *critic), tiny=False)
    assert outcome.code == 0, outcome.err
    stage = load_file("run/pretrain/checkpoints/step_00000002/model.safetensors")
    last = load_file("run/checkpoints/step_00000002/model.safetensors")
    assert stage.keys() == last.keys() and any(name.startswith("value_head.") for name in stage)
    moved = {name for name in stage if not torch.equal(stage[name], last[name])}
    assert any(ADAPTER_SUBSTRING in name for name in moved) and any(name.startswith("heads.") for name in moved)
    starts = [x for name, x in stage.items() if "lora_B" in name]
    assert starts and not any(x.any() for x in starts), "an adapter changed in stage 1"
