import hashlib
import json
import math
import pickle
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import Invoke, tiny_model
from wmtp.data.tokenizer import END, PADDING, Tokenizer, pretrained_tokenizer
from wmtp.distributed.device import Hardware
from wmtp.errors import InputError
from wmtp.models.llama import LlamaArchitecture, create_llama
from wmtp.models.loading import load_trained
from wmtp.models.lora import Lora
from wmtp.models.meta import MetaCheckpoint, write_meta
from wmtp.models.meta_format import (
    MetaParams,
    formula_keys,
    hidden_dim,
    map_tensors,
    meta_names,
    read_meta,
    read_params,
)
from wmtp.models.mtp import MtpModel, empty_model

VOCABULARY = 512
SIZES = {
    "dim": 32, "n_layers": 6, "n_heads": 4, "n_kv_heads": 2, "vocab_size": VOCABULARY, "norm_eps": 1e-3,
    "rope_theta": 500.0, "n_future_tokens": 4, "multiple_of": 16,
}  # fmt: skip
CONFIGS = {
    "4 heads, grouped": {},
    "4 heads": {"n_kv_heads": 4},
    "1 head, grouped": {"n_future_tokens": 1, "n_layers": 3},
    "1 head": {"n_future_tokens": 1, "n_layers": 3, "n_kv_heads": None, "ffn_dim_multiplier": 1.3},
    "no trunk": {"n_layers": 4},
}
PTH, META = "consolidated.pth", "metadata.json"
Tensors = dict[str, Tensor]


def block_shapes(prefix: str, dim: int, key_dim: int, width: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a block in the published files."""
    return {
        f"{prefix}.attention.wq.weight": (dim, dim),
        f"{prefix}.attention.wk.weight": (key_dim, dim),
        f"{prefix}.attention.wv.weight": (key_dim, dim),
        f"{prefix}.attention.wo.weight": (dim, dim),
        f"{prefix}.feed_forward.w1.weight": (width, dim),
        f"{prefix}.feed_forward.w3.weight": (width, dim),
        f"{prefix}.feed_forward.w2.weight": (dim, width),
        f"{prefix}.attention_norm.weight": (dim,),
        f"{prefix}.ffn_norm.weight": (dim,),
    }


def published_shapes(params: dict[str, Any], width: int) -> dict[str, tuple[int, ...]]:
    dim, layers, heads = params["dim"], params["n_layers"], params.get("n_future_tokens", 1)
    key_dim = dim // params["n_heads"] * (params.get("n_kv_heads") or params["n_heads"])
    rows = params["vocab_size"] if params["vocab_size"] != -1 else VOCABULARY
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings.weight": (rows, dim)}
    for i in range(layers - heads + 1):
        shapes |= block_shapes(f"layers.{i}", dim, key_dim, width)
    shapes |= {"norm.weight": (dim,), "output.weight": (rows, dim)}
    for i in range(heads - 1):
        shapes |= block_shapes(f"extra_heads.{i}", dim, key_dim, width)
    return shapes


def random_tensors(params: dict[str, Any], width: int = 96, dtype: torch.dtype = torch.float32) -> Tensors:
    """Return random weights with the published names and shapes."""
    generator = torch.Generator().manual_seed(0)

    def tensor(shape: tuple[int, ...]) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return (1 + 0.3 * values if len(shape) == 1 else values / math.sqrt(shape[1])).to(dtype)

    return {name: tensor(shape) for name, shape in published_shapes(params, width).items()}


def with_tokenizer(folder: Path, tokenizer: Tokenizer) -> Path:
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "pad_token": PADDING}))
    return folder


def write_folder(folder: Path, params: object, tensors: object, metadata: dict[str, Any] | None = None) -> Path:
    """Write a folder in Meta's own layout, or with `metadata` in the layout with safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    if metadata is None:
        torch.save(tensors, folder / PTH)
    else:
        assert isinstance(tensors, dict)
        (folder / META).write_text(json.dumps(metadata))
        save_file(tensors, folder / "model.safetensors")
    return folder


def source(folder: Path, tokenizer: Tokenizer | None, **options: Any) -> MetaCheckpoint:
    return MetaCheckpoint(**({"tokenizer": tokenizer, "path": folder, "lora": Lora()} | options))


def load_error(folder: Path, tokenizer: Tokenizer) -> str:
    """Return the error of loading a folder, and check that validation reports the same issues."""
    with pytest.raises(InputError) as refused:
        source(folder, tokenizer).load_base()
    problems = [*source(folder, None).issues()]
    assert "\n".join(f"model.{key}={value}: {problem}" for key, value, problem in problems) == str(refused.value)
    assert problems
    assert refused.value.exit_code == 2
    return str(refused.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a valid folder with four heads."""
    return write_folder(tmp_path / "meta", SIZES, random_tensors(SIZES))


def by_complex_numbers(x: Tensor, theta: float) -> Tensor:
    """Apply Meta's rotary embedding: each interleaved pair is a complex number."""
    length, head_dim = x.shape[1], x.shape[-1]
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angles = torch.outer(torch.arange(length).float(), frequencies)
    rotated = (
        torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones_like(angles), angles)[:, None]
    )
    return torch.view_as_real(rotated).flatten(-2)


def by_halves(x: Tensor, theta: float) -> Tensor:
    """Apply Hugging Face's rotary embedding: dimension i is paired with i + head_dim / 2."""
    halves = torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)
    first, second = by_complex_numbers(halves, theta).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat((first, second), dim=-1)


def published_block(
    x: Tensor, weights: Tensors, prefix: str, params: dict[str, Any], rotary: Callable[[Tensor, float], Tensor]
) -> Tensor:
    """Compute a block as in Meta's model.py."""
    w = {name.removeprefix(f"{prefix}."): value for name, value in weights.items() if name.startswith(f"{prefix}.")}
    heads, kv_heads = params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    batch, length, dim = x.shape
    head_dim = dim // heads

    def norm(x: Tensor, scale: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * scale

    normed = norm(x, w["attention_norm.weight"])
    queries = (normed @ w["attention.wq.weight"].T).view(batch, length, heads, head_dim)
    keys = (normed @ w["attention.wk.weight"].T).view(batch, length, kv_heads, head_dim)
    values = (normed @ w["attention.wv.weight"].T).view(batch, length, kv_heads, head_dim)
    queries, keys = rotary(queries, params["rope_theta"]), rotary(keys, params["rope_theta"])
    keys, values = (part.repeat_interleave(heads // kv_heads, dim=2).transpose(1, 2) for part in (keys, values))
    scores = queries.transpose(1, 2) @ keys.transpose(2, 3) / math.sqrt(head_dim)
    scores = scores + torch.full((length, length), float("-inf")).triu(1)
    attended = (scores.softmax(-1) @ values).transpose(1, 2).reshape(batch, length, dim)
    x = x + attended @ w["attention.wo.weight"].T
    normed = norm(x, w["ffn_norm.weight"])
    gated = F.silu(normed @ w["feed_forward.w1.weight"].T) * (normed @ w["feed_forward.w3.weight"].T)
    return x + gated @ w["feed_forward.w2.weight"].T


def published_logits(
    weights: Tensors,
    params: dict[str, Any],
    tokens: Tensor,
    rotary: Callable[[Tensor, float], Tensor] = by_complex_numbers,
    from_trunk: bool = True,
) -> Tensor:
    """Return logits [batch, position, head, token] by the published description; `from_trunk`: all heads read it."""
    layers = params["n_layers"] - params.get("n_future_tokens", 1) + 1
    x = weights["tok_embeddings.weight"][tokens]
    for i in range(layers - 1):
        x = published_block(x, weights, f"layers.{i}", params, rotary)
    states = []
    for prefix in (f"layers.{layers - 1}", *(f"extra_heads.{i}" for i in range(params.get("n_future_tokens", 1) - 1))):
        states.append(published_block(x, weights, prefix, params, rotary))
        x = x if from_trunk else states[-1]
    stacked = torch.stack(states, dim=-2)
    normed = stacked * torch.rsqrt(stacked.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * weights["norm.weight"]
    return normed @ weights["output.weight"].T


def logits(model: MtpModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(tokens).states.permute(1, 2, 0, 3).float() @ model.unembedding_weight.float().T


TOKENS = torch.randint(0, VOCABULARY, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("metadata", [None, {}], ids=["pth", "safetensors"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_head_computes_the_published_description(
    name: str, metadata: dict[str, Any] | None, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    params = SIZES | CONFIGS[name]
    weights = random_tensors(params, width=112 if "ffn_dim_multiplier" in params else 96)
    model = source(write_folder(tmp_path / "meta", params, weights, metadata), tokenizer).load_base()
    got = logits(model, TOKENS)
    assert got.shape == (2, 17, params["n_future_tokens"], VOCABULARY)
    torch.testing.assert_close(got, published_logits(weights, params, TOKENS), rtol=0, atol=1e-5)
    assert (got - published_logits(weights, params, TOKENS, rotary=by_halves)).abs().max() > 0.1
    if params["n_future_tokens"] > 1:
        chained = published_logits(weights, params, TOKENS, from_trunk=False)
        assert (got[:, :, 0] - chained[:, :, 0]).abs().max() < 1e-5
        assert (got[:, :, 1] - chained[:, :, 1]).abs().max() > 0.1


def test_the_7b_model_has_291_tensors_of_the_published_names_and_shapes() -> None:
    params = {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "vocab_size": 32000, "norm_eps": 1e-5,
              "rope_theta": 10000.0, "n_future_tokens": 4}  # fmt: skip
    architecture = read_params(params, "params.json").architecture(0)
    model = empty_model(architecture)
    names = meta_names(28, 4)
    found = {names[ours]: tuple(parameter.shape) for ours, parameter in model.named_parameters()}
    expected = {"tok_embeddings.weight": (32000, 4096), "norm.weight": (4096,), "output.weight": (32000, 4096)}
    for prefix in (*(f"layers.{i}" for i in range(29)), *(f"extra_heads.{i}" for i in range(3))):
        expected |= block_shapes(prefix, 4096, 4096, 11008)
    assert found == expected
    assert len(found) == 291
    assert (model.num_heads, len(model.trunk)) == (4, 28)
    assert model.num_parameters == 6_738_415_616  # equal to Llama 2 7B, which has the same blocks and vocabulary
    assert list(names.values()) == list(published_shapes(params, 11008))
    assert len(set(names.values())) == len(names)


def test_sizes_that_metas_files_may_leave_out_have_metas_defaults(folder: Path, tokenizer: Tokenizer) -> None:
    complete = SIZES | {"norm_eps": 1e-5}
    (folder / "params.json").write_text(json.dumps(complete))
    expected = source(folder, tokenizer)
    (folder / "params.json").write_text(json.dumps(complete | {"norm_eps": None, "vocab_size": None}))
    assert source(folder, tokenizer).architecture() == expected.architecture()
    assert torch.equal(logits(source(folder, tokenizer).create(), TOKENS), logits(expected.create(), TOKENS))


def test_a_7b_model_with_one_head_has_one_layer_for_each_block() -> None:
    name_in_file = {name: own for own, name in meta_names(31, 1).items()}
    assert {name.split(".")[1] for name in name_in_file if name.startswith("layers.")} == set(map(str, range(32)))
    assert not any(name.startswith("extra_heads") for name in name_in_file)
    assert name_in_file["layers.31.attention.wq.weight"] == "heads.0.attention.query.weight"


@pytest.mark.parametrize(
    ("stored", "parameter_dtype"), product(["float16", "bfloat16", "float32", "float64"], ["fp32", "bf16"])
)
@pytest.mark.parametrize("metadata", [None, {}], ids=["pth", "safetensors"])
def test_parameters_have_the_configured_dtype_for_every_stored_dtype(
    stored: str, parameter_dtype: str, metadata: dict[str, Any] | None, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    weights = random_tensors(SIZES, dtype=getattr(torch, stored))
    folder = write_folder(tmp_path / "meta", SIZES, weights, metadata)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[parameter_dtype]
    made = source(folder, tokenizer, dtype=parameter_dtype)
    model = made.create()
    for ours, name_in_file in meta_names(2, 4).items():
        assert model.state_dict()[ours].dtype == dtype
        assert torch.equal(model.state_dict()[ours], weights[name_in_file].to(dtype)), name_in_file
    assert {parameter.dtype for parameter in made.empty().parameters()} == {dtype}
    assert isinstance(made.architecture(), LlamaArchitecture)
    exact = published_logits({name: value.float() for name, value in weights.items()}, SIZES, TOKENS)
    bound = 0.2 if parameter_dtype == "bf16" else 1e-4  # rounding errors of bf16, which has 8 bits, over six blocks
    assert (logits(model, TOKENS) - exact).abs().max() < bound
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_dtype_of_the_parameters_is_part_of_the_resume_check(folder: Path) -> None:
    fp32, bf16 = (source(folder, None, dtype=dtype).architecture().settings for dtype in ("fp32", "bf16"))
    assert bf16 == fp32 | {"dtype": "bf16"}
    assert type(source(folder, None).architecture()) is LlamaArchitecture


HUGGING_FACE = {
    "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3, "intermediate_size": 96, "vocab_size": VOCABULARY, "n_future_tokens": 4, "rope_theta": 500.0,
}  # fmt: skip
NAMED = {"files": {"config": "configs/config.json", "weights": "safetensors/model.safetensors"}}
PLACES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "params.json beside": ({}, {"params.json": SIZES}, "model.safetensors"),
    "params.json in configs": ({}, {"configs/params.json": SIZES}, "safetensors/model.safetensors"),
    "any safetensors": ({}, {"configs/params.json": SIZES}, "safetensors/7B.safetensors"),
    "named": (NAMED, {"configs/config.json": HUGGING_FACE}, "safetensors/model.safetensors"),
    "named otherwise": (
        {"files": {"checkpoint": "a/b.safetensors", "params": "c.json", "tokenizer": None}}, {"c.json": SIZES},
        "a/b.safetensors",
    ),
    "sizes in metadata": (HUGGING_FACE | {"version": "v2.0.0"}, {}, "model.safetensors"),
    "Meta's names in metadata": (SIZES, {}, "model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_metadata_json_may_name_the_files_of_sizes_and_weights(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    metadata, files, weights = PLACES[name]
    tensors = random_tensors(SIZES)
    for file, content in ({META: metadata} | files).items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(content))
    (tmp_path / weights).parent.mkdir(exist_ok=True)
    save_file(tensors, tmp_path / weights)
    model = source(tmp_path, tokenizer).load_base()
    torch.testing.assert_close(logits(model, TOKENS), published_logits(tensors, SIZES, TOKENS), rtol=0, atol=1e-5)


def test_weights_may_be_in_several_files_without_duplicate_tensors(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tensors = random_tensors(SIZES)
    folder = write_folder(tmp_path, SIZES, {}, {})
    (folder / "model.safetensors").unlink()
    (folder / "safetensors").mkdir()
    names = list(tensors)
    for number, part in enumerate((names[:20], names[20:])):
        save_file({name: tensors[name] for name in part}, folder / f"safetensors/part{number}.safetensors")
    model = source(folder, tokenizer).load_base()
    torch.testing.assert_close(logits(model, TOKENS), published_logits(tensors, SIZES, TOKENS), rtol=0, atol=1e-5)
    hashes = {
        f"safetensors/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (folder / "safetensors").iterdir()
    }
    (folder / META).write_text(json.dumps({"sha256": hashes}))
    source(folder, tokenizer).load_base()
    (folder / META).write_text(json.dumps({"sha256": hashes["safetensors/part0.safetensors"]}))
    with pytest.raises(InputError, match="sha256 must be a hash, or an object with one for each of"):
        source(folder, tokenizer).load_base()
    (folder / META).write_text("{}")
    save_file({"norm.weight": tensors["norm.weight"]}, folder / "safetensors/part2.safetensors")
    assert "part2.safetensors: contains tensors that another file contains too: norm.weight" in load_error(
        folder, tokenizer
    )


@pytest.mark.parametrize("extra", ["rope.freqs", "layers.0.attention.inner_attention.rope.freqs"])
def test_rotary_frequencies_in_the_file_are_ignored(extra: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = write_folder(tmp_path, SIZES, random_tensors(SIZES) | {extra: torch.ones(4)})
    assert source(folder, tokenizer).load_base().num_heads == 4
    torch.save(random_tensors(SIZES) | {f"{extra}2": torch.ones(4)}, folder / PTH)
    assert f"unexpected: {extra}2" in load_error(folder, tokenizer)


def test_a_vocabulary_size_of_minus_one_means_that_of_the_embedding(tmp_path: Path, tokenizer: Tokenizer) -> None:
    weights = random_tensors(SIZES | {"vocab_size": 520})
    folder = write_folder(tmp_path, SIZES | {"vocab_size": -1}, weights)
    assert [*source(folder, None).issues()] == []
    made = source(folder, tokenizer)
    assert made.architecture().vocab_size == 520
    assert torch.equal(made.load_base().embedding.weight, weights["tok_embeddings.weight"])
    assert json.loads(made.files_to_save()["params.json"])["vocab_size"] == 520


def test_the_loaded_model_is_independent_of_the_file(folder: Path, tokenizer: Tokenizer) -> None:
    model = source(folder, tokenizer).load_base()
    lazy = map_tensors(folder / PTH)["norm.weight"]
    with (folder / PTH).open("r+b") as file:
        file.write(bytes((folder / PTH).stat().st_size))
    assert torch.equal(logits(model, TOKENS), logits(model, TOKENS))
    torch.testing.assert_close(
        logits(model, TOKENS), published_logits(random_tensors(SIZES), SIZES, TOKENS), rtol=0, atol=1e-5
    )
    assert not lazy.any()  # values that were mapped but not read are lost


def test_additional_heads_are_initially_copies_of_head_1(folder: Path, tokenizer: Tokenizer) -> None:
    weights = random_tensors(SIZES)
    model = source(folder, tokenizer, num_heads=6, dropout=0.25).load_base()
    assert model.num_heads == 6
    assert {block.dropout.p for block in (*model.trunk, *model.heads)} == {0.25}
    for index, prefix in enumerate(["layers.2", *(f"extra_heads.{i}" for i in range(3)), "layers.2", "layers.2"]):
        query = model.heads[index].get_parameter("attention.query.weight")
        assert torch.equal(query, weights[f"{prefix}.attention.wq.weight"])
    with torch.no_grad():
        model.heads[5].get_parameter("attention.query.weight").zero_()
    assert torch.equal(model.heads[0].get_parameter("attention.query.weight"), weights["layers.2.attention.wq.weight"])


def test_fewer_heads_are_the_first_ones(folder: Path, tokenizer: Tokenizer) -> None:
    model = source(folder, tokenizer, num_heads=2).load_base()
    expected = published_logits(random_tensors(SIZES), SIZES, TOKENS)[:, :, :2]
    torch.testing.assert_close(logits(model, TOKENS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("num_heads", "create_heads", "has"), [(None, True, 4), (6, True, 6), (6, False, 4), (3, False, 3)]
)
def test_missing_heads_are_created_or_omitted_with_a_warning(
    num_heads: int | None, create_heads: bool, has: int, folder: Path, tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    made = source(folder, tokenizer, num_heads=num_heads, create_heads=create_heads)
    assert made.num_heads == made.load_base().num_heads == has
    message = f"model.num_heads=6, but {folder} has 4, and model.create_heads=false: the model has 4"
    new = f"{folder} has 4 of {has} heads; the other heads are new and start as head 1"
    assert caplog.messages == ([message] if has < (num_heads or 0) else [new] if has > 4 else [])


def test_adapters_do_not_change_the_checkpoints_weights(folder: Path, tokenizer: Tokenizer) -> None:
    model = source(folder, tokenizer, lora=Lora(rank=2, targets=("query", "value"))).create()
    torch.testing.assert_close(
        logits(model, TOKENS), published_logits(random_tensors(SIZES), SIZES, TOKENS), rtol=0, atol=1e-5
    )
    model.unembedding(model.train()(TOKENS).states).square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for name in model.state_dict() if name not in model.base_names}
    assert len([name for name in trained if "lora_" in name]) == 2 * 2 * 2
    assert model.base_fingerprint is not None
    assert source(folder, tokenizer, lora=Lora(rank=2)).create().base_fingerprint != model.base_fingerprint


def test_adapters_that_do_not_fit_are_reported_before_loading_weights(folder: Path, tmp_path: Path) -> None:
    [(key, value, problem)] = source(folder, None, lora=Lora(rank=2, targets=("wq", "query"))).issues()
    assert (key, value) == ("lora.targets", "wq")
    assert "it has down" not in problem
    assert "it has gate, key, output, query, up, value" in problem
    bare = write_folder(tmp_path / "bare", SIZES | {"n_layers": 4}, random_tensors(SIZES | {"n_layers": 4}))
    assert [*source(bare, None, lora=Lora(rank=2)).issues()] == [
        ("lora.rank", "2", "the trunk has no blocks that could have adapters")
    ]


def test_all_mismatched_tensors_are_listed_at_once(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tensors: dict[str, Any] = random_tensors(SIZES)
    del tensors["layers.0.attention.wk.weight"], tensors["norm.weight"]
    tensors |= {
        "layers.0.attention.wk.bias": torch.zeros(32),
        "output.weight": torch.zeros(7, 32),
        "layers.1.ffn_norm.weight": torch.ones(32, dtype=torch.int8),
        "extra_heads.2.feed_forward.w2.weight": "text",
        "extra_heads.1.feed_forward.w2.weight": torch.zeros(32, 96).to_sparse(),
        "extra_heads.0.feed_forward.w2.weight": torch.zeros(32, 96, device="meta"),
    }
    folder = write_folder(tmp_path, SIZES, tensors)
    assert load_error(folder, tokenizer) == "\n    ".join([
        f"model.path={folder}: consolidated.pth: does not match params.json:",
        "missing: layers.0.attention.wk.weight",
        "missing: norm.weight",
        "unexpected: layers.0.attention.wk.bias",
        "mis-typed: layers.1.ffn_norm.weight is torch.int8, not dense floats",
        "mis-shaped: output.weight is [7, 32], params.json needs [512, 32]",
        "mis-typed: extra_heads.0.feed_forward.w2.weight is torch.float32, not dense floats",
        "mis-typed: extra_heads.1.feed_forward.w2.weight is torch.float32, not dense floats",
        "mis-typed: extra_heads.2.feed_forward.w2.weight is str, not dense floats",
    ])  # fmt: skip


def test_mismatched_tensors_of_safetensors_are_listed_too(tmp_path: Path, tokenizer: Tokenizer) -> None:
    tensors = random_tensors(SIZES) | {"norm.weight": torch.ones(31), "layers.1.ffn_norm.weight": torch.ones(32).long()}
    tensors["value_head.weight"] = tensors.pop("extra_heads.0.attention.wo.weight")
    message = load_error(write_folder(tmp_path, SIZES, tensors, {}), tokenizer)
    assert "model.safetensors: does not match params.json" in message
    for problem in (
        "missing: extra_heads.0.attention.wo.weight", "unexpected: value_head.weight",
        "mis-shaped: norm.weight is [31], params.json needs [32]", "mis-typed: layers.1.ffn_norm.weight is torch.int64",
    ):  # fmt: skip
        assert problem in message


@pytest.mark.parametrize(
    ("change", "hint", "other"),
    [
        ({"n_future_tokens": 2}, "params.json has n_future_tokens=2, the file has 4 heads", "n_layers"),
        ({"n_future_tokens": 6}, "params.json has n_future_tokens=6, the file has 4 heads", "n_layers"),
        ({"n_future_tokens": None}, "params.json has n_future_tokens=1, the file has 4 heads", "n_layers"),
        ({"n_layers": 9}, "params.json has n_layers=9, the file has 6 blocks", "n_future_tokens"),
    ],
)
def test_a_wrong_number_of_heads_or_blocks_is_reported_before_the_names(
    change: dict[str, Any], hint: str, other: str, folder: Path, tokenizer: Tokenizer
) -> None:
    (folder / "params.json").write_text(json.dumps(SIZES | change))
    first, second, *names = load_error(folder, tokenizer).split("\n    ")
    assert first.endswith("consolidated.pth: does not match params.json:")
    assert second == hint
    assert (
        len(names)
        == {2: 18 + 18, 6: 18 + 18, None: 27 + 27, 9: 27}[change.get("n_future_tokens", change.get("n_layers"))]
    )
    assert not any(f"has {other}" in name for name in names)


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"dim": None, "n_heads": None}, ["dim: is missing", "n_heads: is missing"]),
        ({"dim": None, "hidden_size": 32, "norm_eps": None}, ["norm_eps: is missing"]),
        (
            {"n_layers": "six", "n_heads": True, "rope_theta": -1, "multiple_of": 1.5, "n_future_tokens": 0},
            ["n_layers='six': must be a valid integer", "n_heads=True: must be a valid integer",
             "rope_theta=-1: must be greater than 0", "n_future_tokens=0: must be greater than or equal to 1",
             "multiple_of=1.5: must be a valid integer"],
        ),
        (
            {"dim": 36, "n_kv_heads": 3, "n_layers": 3, "vocab_size": 0},
            ["vocab_size=0: must be at least 1, or -1", "n_layers=3: must be at least n_future_tokens=4",
             "dim=36: must be a multiple of 2 · n_heads = 8", "n_kv_heads=3: must divide n_heads=4"],
        ),
        ({"norm_eps": float("nan")}, ["norm_eps=nan: must be a finite number"]),
        ({"dim": 10**30, "n_layers": 10**9}, [f"dim={10**30}: must be less", "n_layers=1000000000: must be less"]),
        ({"use_scaled_rope": True}, ["use_scaled_rope: belongs to an unsupported kind of model"]),
    ],
)  # fmt: skip
def test_all_invalid_sizes_are_reported(
    change: dict[str, Any], lines: list[str], folder: Path, tokenizer: Tokenizer
) -> None:
    (folder / "params.json").write_text(json.dumps(SIZES | change))
    message = load_error(folder, tokenizer).splitlines()
    assert len(message) == len(lines)
    for line, expected in zip(message, lines, strict=True):
        assert line.startswith(f"model.path={folder}: params.json: {expected}")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"dim": 32', "\xff"])
@pytest.mark.parametrize("name", ["params.json", META])
def test_files_that_are_not_valid_json_are_reported(name: str, text: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = write_folder(tmp_path, SIZES, random_tensors(SIZES), {})
    (folder / name).write_bytes(text.encode("latin-1"))
    assert f"model.path={folder}: {name}: " in load_error(folder, tokenizer)


def test_missing_files_are_reported_with_a_remedy(folder: Path, tokenizer: Tokenizer) -> None:
    above = folder.parent
    assert f"has no params.json and no metadata.json; name the folder that contains Meta's files, such as {folder}" in (
        load_error(above, tokenizer)
    )
    assert "has no params.json and no metadata.json" in load_error(above / "nowhere", tokenizer)
    shutil.copytree(folder, above / "without")
    (above / "without" / PTH).unlink()
    assert "has no consolidated.pth, and no metadata.json beside safetensors" in load_error(
        above / "without", tokenizer
    )
    (above / "without" / META).write_text("{}")
    assert "has no model.safetensors or safetensors/model.safetensors" in load_error(above / "without", tokenizer)
    (above / "without" / META).write_text(json.dumps({"files": ["model.safetensors"]}))
    assert "files=['model.safetensors']: must be an object" in load_error(above / "without", tokenizer)
    (above / "without" / META).write_text(json.dumps({"files": {"weights": "there.safetensors"}}))
    assert "files.weights=there.safetensors: there is no such file" in load_error(above / "without", tokenizer)


@pytest.mark.parametrize("key", ["config", "params", "weights", "checkpoint"])
@pytest.mark.parametrize("name", ["../outside", "{outside}", "inside/../../outside", 7, ["outside"]])
def test_metadata_json_cannot_name_files_outside_the_folder(
    key: str, name: object, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    is_sizes = key in ("config", "params")
    folder, ending = tmp_path / "meta", ".json" if is_sizes else ".safetensors"
    outside = tmp_path / f"outside{ending}"
    if isinstance(name, str):
        name = name.replace("{outside}", str(tmp_path / "outside")) + ending
    write_folder(folder, SIZES, random_tensors(SIZES), {"files": {key: name}})
    (folder / "inside").mkdir()
    content = folder / ("params.json" if is_sizes else "model.safetensors")
    shutil.copy(content, outside)
    assert f"metadata.json: files.{key}={name}: must be a path inside the folder" in load_error(folder, tokenizer)
    (folder / META).write_text(
        json.dumps({"files": {key: content.name}})
    )  # the control: the same file inside the folder
    assert source(folder, tokenizer).load_base().num_heads == 4


def test_the_hash_of_metadata_json_is_compared(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = write_folder(tmp_path, SIZES, random_tensors(SIZES), {})
    path = folder / "model.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for given_hash in (digest, digest.upper(), {"model.safetensors": digest}):
        (folder / META).write_text(json.dumps({"sha256": given_hash}))
        assert source(folder, tokenizer).load_base().num_heads == 4
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"model.safetensors: its sha256 is .*, metadata.json has {digest}") as refused:
        source(folder, tokenizer).load_base()
    assert str(refused.value).startswith(f"model.path={folder}: ")
    for wrong in (7, {}, {"model.safetensors": None}):
        (folder / META).write_text(json.dumps({"sha256": wrong}))
        with pytest.raises(InputError, match="sha256 must be a hash"):
            source(folder, tokenizer).load_base()
    (folder / META).write_text("{}")  # the control: without a hash the change is not detected
    source(folder, tokenizer).load_base()


class Payload:
    """An object whose unpickling runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.marker), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_is_not_run(zipped: bool, folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content = random_tensors(SIZES) | {"rope.freqs": Payload(marker)}
    if zipped:
        torch.save(content, folder / PTH)
        assert "consolidated.pth: holds more than tensors (io.open), and nothing of it was run" in (
            load_error(folder, tokenizer)
        )
    else:
        (folder / PTH).write_bytes(pickle.dumps({"rope.freqs": Payload(marker)}))
        assert "consolidated.pth: is cut short, damaged or of another format" in load_error(folder, tokenizer)
    assert not marker.exists()
    if zipped:
        torch.load(folder / PTH, weights_only=False)
    else:
        pickle.loads((folder / PTH).read_bytes())
    assert marker.exists()


@pytest.mark.parametrize("percent", [0, 50, 99])
@pytest.mark.parametrize("metadata", [None, {}], ids=["pth", "safetensors"])
def test_a_truncated_file_is_reported(
    percent: int, metadata: dict[str, Any] | None, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    folder = write_folder(tmp_path, SIZES, random_tensors(SIZES), metadata)
    path = folder / (PTH if metadata is None else "model.safetensors")
    content = path.read_bytes()
    size = len(content) * percent // 100
    path.write_bytes(content[:size])
    message = load_error(folder, tokenizer)
    assert f"{path.name}: is cut short, damaged or of another format; get it again ({size:,} bytes" in message
    path.write_bytes(content)
    source(folder, tokenizer).load_base()


def test_a_file_without_tensors_by_name_is_reported(folder: Path, tokenizer: Tokenizer) -> None:
    torch.save([torch.ones(2)], folder / PTH)
    assert "consolidated.pth: holds a list, not tensors by name" in load_error(folder, tokenizer)
    torch.save({"model": random_tensors(SIZES)}, folder / PTH)
    assert "unexpected: model\n" in load_error(folder, tokenizer) + "\n"


def test_a_vocabulary_that_is_too_small_is_reported_with_both_sizes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    params = SIZES | {"vocab_size": 511}
    folder = write_folder(tmp_path / "small", params, random_tensors(params))
    with pytest.raises(InputError, match="has embeddings for 511 tokens, its tokenizer has 512"):
        source(folder, tokenizer).create()
    params = SIZES | {"vocab_size": 513}
    assert source(write_folder(tmp_path / "large", params, random_tensors(params)), tokenizer).create().num_heads == 4


ROUND_TRIP_PARAMS = {
    "as Meta writes it": SIZES | {"max_seq_len": 4096, "n_kv_heads": None},
    "minus one": SIZES | {"vocab_size": -1, "ffn_dim_multiplier": 1.3, "multiple_of": 4},
    "with a width": SIZES | {"intermediate_size": 40},
}


@pytest.mark.parametrize("layout", ["pth", "safetensors"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ROUND_TRIP_PARAMS)
def test_a_loaded_model_is_written_back_unchanged(
    name: str, dtype: str, layout: Any, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    params = ROUND_TRIP_PARAMS[name]
    width = params.get("intermediate_size") or hidden_dim(32, params["multiple_of"], params.get("ffn_dim_multiplier"))
    weights = random_tensors(params, width, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    metadata = None if layout == "pth" else {}
    first = read_meta(write_folder(tmp_path / "first", params, weights, metadata))
    model = source(tmp_path / "first", tokenizer, dtype=dtype).load_base()
    write_meta(model, tmp_path / "second", first.content, layout)
    assert json.loads((tmp_path / "second/params.json").read_text()) == params
    path = tmp_path / "second" / (PTH if layout == "pth" else "model.safetensors")
    written = torch.load(path, weights_only=True) if layout == "pth" else load_file(path)
    assert written.keys() == weights.keys()
    if layout == "pth":
        assert type(written) is dict
        assert list(written) == list(weights)
    for name_in_file, tensor in weights.items():
        assert written[name_in_file].dtype == tensor.dtype
        assert torch.equal(written[name_in_file], tensor)
    third = source(tmp_path / "second", tokenizer, dtype=dtype).load_base()
    assert torch.equal(logits(third, TOKENS), logits(model, TOKENS))
    expected = {"params.json", path.name} | ({META} if layout == "safetensors" else set())
    assert {path.name for path in (tmp_path / "second").iterdir()} == expected


@pytest.mark.parametrize("layout", ["pth", "safetensors"])
def test_a_model_is_written_without_given_params_and_read_again(
    layout: Any, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = tiny_model(num_heads=3)
    write_meta(model, tmp_path / "out", layout=layout)
    write_meta(model, tmp_path / "out", layout=layout)  # overwrites the first output
    made = source(tmp_path / "out", tokenizer)
    assert [*made.issues()] == []
    assert made.architecture() == model.architecture
    read = made.load_base()
    assert read.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in read.state_dict().items())
    with pytest.raises(InputError, match="which belongs to the other layout; name another folder"):
        write_meta(model, tmp_path / "out", layout="safetensors" if layout == "pth" else "pth")
    path = tmp_path / "out/model.safetensors"
    if layout == "safetensors":
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
        with pytest.raises(InputError, match="its sha256 is"):
            source(tmp_path / "out", tokenizer).load_base()


def test_only_the_elements_of_a_view_are_written(tmp_path: Path) -> None:
    model = tiny_model(num_heads=1)
    write_meta(model, tmp_path / "own")
    with torch.no_grad():
        large = torch.zeros(100 * 512, 64)
        large[:512] = model.embedding.weight
        model.embedding.weight = torch.nn.Parameter(large[:512])
    write_meta(model, tmp_path / "part")
    assert (tmp_path / "own" / PTH).read_bytes() == (tmp_path / "part" / PTH).read_bytes()


def test_removed_heads_are_not_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = tiny_model(num_heads=4)
    model.heads = model.heads[:2]
    write_meta(model, tmp_path)
    assert json.loads((tmp_path / "params.json").read_text())["n_future_tokens"] == 2
    assert source(tmp_path, tokenizer).load_base().num_heads == 2


def test_models_that_the_layout_does_not_support_are_refused(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    out = tmp_path / "out"
    with_adapters = source(folder, tokenizer, lora=Lora(rank=2)).create()
    with_value_head = tiny_model()
    with_value_head.add_value_head()
    for model in (with_adapters, with_value_head):
        with pytest.raises(InputError, match="does not support adapters and value heads"):
            write_meta(model, out)
    medusa = create_llama(LlamaArchitecture(
        vocab_size=64, dim=16, num_layers=2, num_heads=1, num_attention_heads=2, num_kv_heads=1, hidden_dim=40,
        head_kind="medusa",
    ))  # fmt: skip
    with pytest.raises(InputError, match="supports only Llama models whose heads are blocks"):
        write_meta(medusa, out)
    with pytest.raises(InputError, match="norm_eps=0.0: must be greater than 0"):
        write_meta(create_llama(LlamaArchitecture(
            vocab_size=64, dim=16, num_layers=2, num_heads=1, num_attention_heads=2, num_kv_heads=1, hidden_dim=40,
            norm_eps=0.0,
        )), out)  # fmt: skip
    model = source(folder, tokenizer).load_base()
    wrong = SIZES | {"norm_eps": 1e-6, "n_future_tokens": 3, "multiple_of": 32, "vocab_size": 7}
    with pytest.raises(InputError) as refused:
        write_meta(model, out, wrong)
    for message in ("vocab_size=7, not 512", "num_layers=4, not 3", "num_heads=3, not 4", "norm_eps=1e-06, not 0.001"):
        assert message in str(refused.value)
    assert "hidden_dim" not in str(refused.value)  # multiple_of=32 also gives 96
    with pytest.raises(InputError, match="dim: is missing"):
        write_meta(model, out, {})
    assert not out.exists()


def test_the_formula_gives_the_widths_of_llama() -> None:
    assert hidden_dim(4096) == 11008  # 7B
    assert hidden_dim(8192, 4096, 1.3) == 28672  # Llama 2 70B
    assert hidden_dim(4096, 1024, 1.3) == 14336  # Llama 3 8B
    assert formula_keys(4096, 11008) == {"multiple_of": 256}


@given(dim=st.integers(1, 2**14), width=st.integers(1, 2**16))
@settings(max_examples=500, deadline=None)
def test_formula_keys_exist_for_every_width(dim: int, width: int) -> None:
    keys = formula_keys(dim, width)
    parsed = json.loads(json.dumps(keys))
    assert hidden_dim(dim, int(parsed["multiple_of"]), parsed.get("ffn_dim_multiplier")) == width
    read = {"dim": 8, "n_layers": 1, "n_heads": 1, "vocab_size": 1, "norm_eps": 1e-5} | parsed
    if parsed.get("ffn_dim_multiplier", 1) <= 1024:
        assert isinstance(read_params(read, "here"), MetaParams)


@pytest.mark.parametrize("name", [*ROUND_TRIP_PARAMS, "hugging face"])
def test_checkpoints_can_be_used_with_the_files_kept_by_the_run(
    name: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    params = ROUND_TRIP_PARAMS.get(name, HUGGING_FACE)
    width = params.get("intermediate_size") or hidden_dim(32, params["multiple_of"], params.get("ffn_dim_multiplier"))
    weights = random_tensors(SIZES | params, width)
    folder = with_tokenizer(write_folder(tmp_path / "meta", params, weights), tokenizer)
    options = {"num_heads": 6, "dropout": 0.25, "dtype": "bf16"}
    made = source(folder, tokenizer, **options)
    kept = made.files_to_save()
    assert kept.keys() == {"params.json", "tokenizer.json", "tokenizer_config.json"}
    assert kept["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    (tmp_path / "model").mkdir()
    for file, content in kept.items():
        (tmp_path / "model" / file).write_bytes(content)
    again = source(tmp_path / "model", tokenizer, **options)
    assert again.architecture() == made.architecture()
    assert again.files_to_save() == kept
    blank = again.empty()
    assert blank.architecture == made.architecture()
    assert blank.load_state_dict(made.load_base().state_dict(), strict=True)
    assert source(tmp_path / "model", tokenizer).num_heads == 4
    assert "has no consolidated.pth" in load_error(tmp_path / "model", tokenizer)


def test_a_tokenizer_of_another_folder_is_kept_too(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    for other in (None, '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'):
        if other is not None:
            (folder / "tokenizer.json").write_text(other)
        for file, content in source(folder, tokenizer).files_to_save().items():
            (tmp_path / file).write_bytes(content)
        kept = pretrained_tokenizer(path=tmp_path)
        assert (kept.fingerprint, kept.end, kept.padding) == (tokenizer.fingerprint, tokenizer.end, tokenizer.padding)


@pytest.mark.slow
def test_a_finished_run_does_not_need_the_models_folder(
    invoke: Invoke, folder: Path, tokenizer: Tokenizer, cache: Path, tmp_path: Path
) -> None:
    with_tokenizer(folder, tokenizer)
    run = tmp_path / "run"
    arguments = ["model=meta_mtp_7b", f"model.path={folder}", "max_steps=2", "num_samples=0", f"hydra.run.dir={run}"]
    data = ["data.num_train=40", "data.num_validation=8", "data.num_test=8", "num_validation_samples=0"]
    done = invoke(*arguments, *data, tiny=False)
    assert done.code == 0, done.err
    shutil.rmtree(folder)
    model = load_trained(run, tokenizer, Hardware(device="cpu"), cache)
    start = random_tensors(SIZES)
    moved = (
        (model.state_dict()["heads.3.attention.query.weight"] - start["extra_heads.2.attention.wq.weight"]).abs().max()
    )
    assert 0 < moved < 0.1


def test_train_refuses_an_invalid_folder_before_training(
    invoke: Invoke, folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with_tokenizer(folder, tokenizer)
    (folder / "params.json").write_text(json.dumps(SIZES | {"n_future_tokens": 2}))
    done = invoke("model=meta_mtp_7b", f"model.path={folder}", f"hydra.run.dir={tmp_path / 'run'}", tiny=False)
    assert done.code == 2
    assert f"model.path={folder}: consolidated.pth: does not match params.json" in done.err
    assert "params.json has n_future_tokens=2, the file has 4 heads" in done.err
    assert "unexpected: extra_heads.2.ffn_norm.weight" in done.err
    assert not (tmp_path / "run/checkpoints").exists()
    missing = invoke("model=meta_mtp_7b", tiny=False)
    assert (missing.code, "model.path: missing; set it with model.path=" in missing.err) == (2, True)
