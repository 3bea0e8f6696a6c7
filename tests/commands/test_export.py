"""Tests of `python -m wmtp.export`: exported models give the logits of the run and have exactly its tensors."""

import json
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import processors
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.conftest import Invoke, run_command
from tests.support.families import FAMILIES, SIZES, write_family
from wmtp import export as export_command
from wmtp.checkpoint import manifest
from wmtp.cli.job import JobContext
from wmtp.config.schema import CONFIG_FOLDER, ConfigError, build
from wmtp.data.dataset import read_dataset
from wmtp.data.special_tokens import with_prefix
from wmtp.data.tokenizer import END, PROBE, Tokenizer, pretrained_tokenizer
from wmtp.distributed.device import Hardware
from wmtp.errors import InputError, InterruptedRun
from wmtp.export import positional_args
from wmtp.models import export as model_export
from wmtp.models.huggingface import export as hf_export
from wmtp.models.huggingface.pretrained import Pretrained
from wmtp.models.loading import find_checkpoint, find_trained_checkpoint
from wmtp.models.lora import Lora
from wmtp.models.meta import MetaCheckpoint
from wmtp.models.mtp import MtpModel

# one worker runs all these tests, so that each run is trained only once
pytestmark = [pytest.mark.xdist_group("export"), pytest.mark.slow]
HEADS = 3
ALL_MODELS = [*FAMILIES, "wmtp"]
"""The families of models in transformers, and wmtp's own architecture."""
SHORT_RUN = [
    "tracking=none", "data.num_train=40", "data.num_validation=8", "data.num_test=8", "num_samples=0",
    "num_validation_samples=0", "max_steps=2", "optimizer.lr=0.02", "report=false",
]  # fmt: skip
"""Overrides of a run with two updates."""


@dataclass
class TrainedRun:
    """The folder of a run, and its model and tokenizer as loaded by wmtp."""

    folder: Path
    model: MtpModel
    tokenizer: Tokenizer

    def logits(self, tokens: Tensor) -> Tensor:
        """Return logits of shape [batch, position, head, vocabulary]."""
        return all_logits(self.model, tokens)


def all_logits(model: MtpModel, tokens: Tensor) -> Tensor:
    """Return logits of shape [batch, position, head, vocabulary]."""
    with torch.no_grad():
        states = model.eval()(tokens).states
        return (states @ model.unembedding_weight.T).permute(1, 2, 0, 3)


@dataclass
class Runs:
    """Runs of the models; each is trained when a test first requests it."""

    folder: Path
    cache: Path
    tokenizer: Tokenizer
    trained: dict[str, TrainedRun] = field(default_factory=dict)

    def source(self, family: str) -> Path:
        """Return the folder of an untrained model of this family, written by `save_pretrained`."""
        path = self.folder / "sources" / family
        if not path.exists():
            write_family(path, family, self.tokenizer)
        return path

    def get(self, family: str, *overrides: str) -> TrainedRun:
        """Return a run of this family of transformers, or of wmtp's own architecture if `family` is "wmtp"."""
        key = " ".join([family, *overrides])
        if key not in self.trained:
            path = self.folder / f"run-{len(self.trained)}"
            model = ["model=nano"] if family == "wmtp" else ["model=huggingface", f"model.path={self.source(family)}"]
            options = [f"model.num_heads={HEADS}", f"cache_dir={self.cache}", f"hydra.run.dir={path}"]
            with pytest.MonkeyPatch.context() as patch:
                assert run_command([*SHORT_RUN, *model, *options, *overrides], patch) == 0
            self.trained[key] = self.load(path)
        return self.trained[key]

    def load(self, path: Path) -> TrainedRun:
        """Return the run in a folder, with its model as loaded by wmtp."""
        checkpoint = find_trained_checkpoint(path)
        tokenizer = checkpoint.tokenizer(self.cache)
        return TrainedRun(path, checkpoint.load_model(tokenizer, Hardware(device="cpu"), self.cache), tokenizer)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, cache: Path, tokenizer: Tokenizer) -> Runs:
    """Return the runs that all tests share."""
    return Runs(tmp_path_factory.mktemp("exporting"), cache, tokenizer)


@pytest.fixture(autouse=True)
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make transformers copy the code of loaded models into the test's folder, not into the user's home."""
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    yield
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
    sys.path[:] = [path for path in sys.path if path != str(modules)]


@pytest.fixture
def export(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Path]:
    """Return a function that exports a run to a format and returns the new folder.

    It does not parse a command line. It writes the printed text to `output.txt` in `tmp_path`.
    """

    def export_run(run: TrainedRun, format_: str) -> Path:
        folder = tmp_path / f"{run.folder.name}-{format_}"
        content = {"checkpoint": {"path": str(run.folder)}, "folder": str(folder), "format": format_}
        capsys.readouterr()
        config = OmegaConf.create(content | {"cache_dir": str(runs.cache)})
        export_command.export(JobContext(config, tmp_path, [], inputs=find_trained_checkpoint(run.folder)))
        (tmp_path / "output.txt").write_text(capsys.readouterr().out)
        return folder

    return export_run


@pytest.fixture
def tokens() -> Tensor:
    """Return random tokens of shape [2, 21]."""
    return torch.randint(0, 512, (2, 21), generator=torch.Generator().manual_seed(0))


def load_exported(folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model with transformers; return it, and the names of missing, unexpected and mis-shaped tensors."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    return model, {kind: set(names) for kind, names in info.items() if names}


def assert_logits_close(got: Tensor, expected: Tensor) -> None:
    """Check that two tensors of logits agree to 1e-4."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ALL_MODELS)
def test_an_exported_trunk_is_a_standard_model_of_its_family(
    runs: Runs, export: Callable[..., Path], tmp_path: Path, tokens: Tensor, family: str
) -> None:
    run = runs.get(family)
    folder = export(run, "hf_trunk")
    model, info = load_exported(folder)
    with torch.no_grad():
        assert_logits_close(model(tokens).logits, run.logits(tokens)[:, :, 0])
    assert info == {}
    assert not any(folder.glob("*.py"))

    config = json.loads((folder / "config.json").read_text())
    if family == "wmtp":
        assert (config["architectures"], config["tie_word_embeddings"]) == (["LlamaForCausalLM"], False)
    else:
        original = json.loads((runs.source(family) / "config.json").read_text())
        assert {key: original[key] for key in original if config.get(key) != original[key]} == {}
    assert config["dtype"] == "float32"
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not model.config.tie_word_embeddings

    has_warning = "AutoTokenizer creates a different tokenizer" in (tmp_path / "output.txt").read_text()
    assert has_warning is (family == "qwen2")  # for Qwen2, AutoTokenizer splits text by a fixed rule
    tokenizer_class = PreTrainedTokenizerFast if has_warning else AutoTokenizer
    exported = tokenizer_class.from_pretrained(folder)
    assert exported(PROBE)["input_ids"] == run.tokenizer.encode([PROBE])[0]
    is_text = exported(END)["input_ids"] == run.tokenizer.encode([END])[0]
    assert is_text is (family == "wmtp")  # the files of other tokenizers, and so their settings, are copied
    assert (exported.eos_token_id, exported.pad_token_id) == (run.tokenizer.end, run.tokenizer.padding)
    assert model.generation_config.eos_token_id == run.tokenizer.end


@pytest.mark.parametrize("family", ALL_MODELS)
def test_all_heads_load_with_exported_code_and_with_wmtp(
    runs: Runs, export: Callable[..., Path], tokens: Tensor, family: str
) -> None:
    run = runs.get(family)
    folder, expected = export(run, "hf"), run.logits(tokens)
    assert (expected[:, :, 0] - expected[:, :, 1]).abs().max() > 1e-2  # otherwise heads in the wrong order would pass
    assert (expected[:, :, 1] - expected[:, :, 2]).abs().max() > 1e-2
    model, info = load_exported(folder, trust_remote_code=True)
    assert info == {}
    with torch.no_grad():
        assert_logits_close(model(tokens, return_all_heads=True).logits, expected)
        assert_logits_close(model(tokens, return_all_heads=True, logits_to_keep=2).logits, expected[:, -2:])
        assert_logits_close(model(tokens).logits, expected[:, :, 0])

    plain, info = load_exported(folder)
    assert type(plain).__module__.startswith("transformers.models.")
    assert info.keys() == {"unexpected_keys"}
    assert all(name.startswith("extra_heads.") for name in info["unexpected_keys"])
    texts = [each.generate(tokens[:, :5], max_new_tokens=8, do_sample=False) for each in (model, plain)]
    assert torch.equal(*texts)

    source = Pretrained(
        tokenizer=pretrained_tokenizer(path=folder), path=folder, num_heads=HEADS, create_heads=False, lora=Lora()
    )
    assert [*source.issues()] == []
    assert_logits_close(all_logits(source.create(), tokens), expected)


def test_padding_on_either_side_does_not_change_the_logits(
    runs: Runs, export: Callable[..., Path], tokens: Tensor
) -> None:
    model, _ = load_exported(export(runs.get("llama"), "hf"), trust_remote_code=True)
    text, padding = tokens[:1], torch.zeros(1, 4, dtype=torch.int64)
    with torch.no_grad():
        unpadded = model(text, return_all_heads=True).logits
        for parts in ([padding, text], [text, padding]):
            mask = torch.cat([torch.full_like(part, part is text) for part in parts], 1)
            padded = model(torch.cat(parts, 1), attention_mask=mask, return_all_heads=True).logits
            assert_logits_close(padded[:, mask[0] == 1], unpadded)
        cached = model(text, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="whole texts"):
            model(text[:, :1], past_key_values=cached, return_all_heads=True)


def vllm_medusa_logits(folder: Path, states: Tensor) -> Tensor:
    """Return the logits that vLLM's Medusa class computes from the last hidden states.

    Check also that config.json and the names of the tensors are those of this class.
    """
    config, weights = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    counts = {  # as vLLM's MedusaConfig renames the keys
        "num_heads" if "heads" in key else "num_hidden_layers" if "layers" in key else key: value
        for key, value in config.items()
        if "num" in key
    }
    assert config["architectures"] == ["MedusaModel"]
    assert (config["model_type"], config["original_lm_head"], config["medusa_fc_bias"]) == ("medusa", True, False)
    assert config["truncated_vocab_size"] == config["vocab_size"]
    names = [
        f"blocks.{i}.layers.{j}.weight" for i in range(counts["num_heads"]) for j in range(counts["num_hidden_layers"])
    ]
    assert weights.keys() == {"lm_head.weight", *names}
    return torch.stack([(states + F.silu(states @ weights[n].T)) @ weights["lm_head.weight"].T for n in names], -2)


@pytest.mark.parametrize("family", ["llama-tied", "qwen3"])
def test_medusa_heads_are_exported_as_a_draft_model_of_vllm(
    runs: Runs, export: Callable[..., Path], tokens: Tensor, family: str
) -> None:
    run = runs.get(family, "model.head_kind=medusa")
    expected = run.logits(tokens)
    assert (expected[:, :, 0] - expected[:, :, 1]).abs().max() > 1e-2
    folder = export(run, "medusa")
    base, info = load_exported(folder / "base")
    assert info == {}
    with torch.no_grad():
        states = base.base_model(tokens).last_hidden_state
        assert_logits_close(base(tokens).logits, expected[:, :, 0])
        assert_logits_close(vllm_medusa_logits(folder, states), expected[:, :, 1:])
        model, info = load_exported(export(run, "hf"), trust_remote_code=True)
        assert info == {}
        assert_logits_close(model(tokens, return_all_heads=True).logits, expected)


@pytest.mark.parametrize("family", ["wmtp", "llama", "llama-tied"])
def test_meta_format_gives_the_same_model(
    runs: Runs, export: Callable[..., Path], tmp_path: Path, tokens: Tensor, family: str
) -> None:
    run = runs.get(family)
    folder = export(run, "meta")
    preset = (tmp_path / "output.txt").read_text().partition("model=")[2].split()[0]
    assert f"{MetaCheckpoint.__module__}." in (CONFIG_FOLDER / "model" / f"{preset}.yaml").read_text()
    tokenizer = pretrained_tokenizer(path=folder)
    assert tokenizer.fingerprint == run.tokenizer.fingerprint
    source = MetaCheckpoint(tokenizer=tokenizer, path=folder, lora=Lora())
    assert source.num_heads == HEADS
    assert_logits_close(all_logits(source.create(), tokens), run.logits(tokens))


def test_the_logits_differ_without_the_rotary_permutation(
    runs: Runs, export: Callable[..., Path], tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_export, "to_half_split", lambda weight, head_dim: weight)
    run = runs.get("wmtp")
    model, _ = load_exported(export(run, "hf_trunk"))
    with torch.no_grad():
        assert (model(tokens).logits - run.logits(tokens)[:, :, 0]).abs().max() > 0.05


def test_a_bf16_model_stays_bf16(runs: Runs, export: Callable[..., Path], tokens: Tensor) -> None:
    run = runs.get("llama", "model.dtype=bf16")
    for format_, options in (("hf_trunk", {}), ("hf", {"trust_remote_code": True})):
        folder = export(run, format_)
        assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
        model, info = load_exported(folder, **options)
        assert (model.dtype, info) == (torch.bfloat16, {})
        with torch.no_grad():
            torch.testing.assert_close(model(tokens).logits, run.logits(tokens)[:, :, 0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_adapters_are_merged(runs: Runs, export: Callable[..., Path], tokens: Tensor, family: str) -> None:
    run = runs.get(family, "model.lora.rank=4")
    folder = export(run, "hf")
    model, info = load_exported(folder, trust_remote_code=True)
    assert info == {}
    base = AutoModelForCausalLM.from_pretrained(runs.source(family))
    with torch.no_grad():
        assert_logits_close(model(tokens, return_all_heads=True).logits, run.logits(tokens))
        assert (base(tokens).logits - run.logits(tokens)[:, :, 0]).abs().max() > 0.05
    merged, original_weights = model.base_model.state_dict(), base.base_model.state_dict()
    changed = {name for name in original_weights if not torch.equal(merged[name], original_weights[name])}
    layers = {name.split(".")[1] for name in changed if name.startswith(("layers.", "h."))}
    assert layers == {"0", "1", "2"}  # 0 and 1: the trunk, by its adapters; 2: head 1, which is trained directly
    assert not {name for name in changed if "embed" in name or "wte" in name}


def test_an_exported_model_can_be_trained_and_exported_again(
    runs: Runs, export: Callable[..., Path], tokens: Tensor
) -> None:
    folder = export(runs.get("qwen3"), "hf")
    again = runs.get("qwen3", f"model.path={folder}", "max_steps=1", "model.create_heads=false")
    plain = export(again, "hf_trunk")
    assert not {key for key in json.loads((plain / "config.json").read_text()) if "mtp" in key or "auto_map" in key}
    model, info = load_exported(export(again, "hf"), trust_remote_code=True)
    assert info == {}
    with torch.no_grad():
        assert_logits_close(model(tokens, return_all_heads=True).logits, again.logits(tokens))


def test_other_files_are_copied_with_the_end_token_of_training(
    runs: Runs, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    original, out = tmp_path / "original", tmp_path / "out"
    shutil.copytree(runs.source("llama"), original)
    (original / "generation_config.json").write_text('{"eos_token_id": [7, 9], "temperature": 0.6}')
    (original / "chat_template.jinja").write_text("{{ messages }}")
    (original / "tokenizer_config.json").write_text("{}")
    trained_model = model_export.TrainedModel(runs.get("llama").model, tokenizer, 64, original)
    assert len(model_export.write_export(trained_model, "hf_trunk", out)) == 2
    written = json.loads((out / "generation_config.json").read_text())
    assert written == {"eos_token_id": [tokenizer.end, 7, 9], "temperature": 0.6, "pad_token_id": tokenizer.padding}
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"eos_token": "<end>", "pad_token": "<pad>"}

    backend = BackendTokenizer.from_file(str(original / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing("$A <end>", special_tokens=[("<end>", tokenizer.end)])
    backend.save(str(original / "tokenizer.json"))
    lines = model_export.write_export(trained_model, "hf_trunk", tmp_path / "special_tokens")
    assert "special tokens around texts" in lines[-1]

    (original / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match=r"generation_config\.json: is not valid JSON"):
        model_export.write_export(trained_model, "hf_trunk", tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def test_the_first_token_of_a_tokenizer_is_used_in_training_generation_and_exports(
    runs: Runs, export: Callable[..., Path], invoke: Invoke, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """transformers must give the same prompts and answers, also after a change of the setting."""
    original, prompt = tmp_path / "original", "Write f(x) <end>."
    shutil.copytree(runs.source("llama"), original)
    with_prefix(tokenizer.backend, END).save(str(original / "tokenizer.json"))
    run = runs.get("llama", f"model.path={original}")
    run_config = find_trained_checkpoint(run.folder).config
    data = read_dataset(build(run_config.data, tokenizer=run.tokenizer), runs.cache, 0)
    assert json.loads((run.folder / "summary.json").read_text())["data_hash"] == data.fingerprint
    assert {int(data.train.samples.tokens[start]) for start in data.train.samples.offsets[:-1]} == {tokenizer.end}

    def answers(run: TrainedRun, first: list[int]) -> tuple[str, str]:
        """Return the answers of wmtp and of transformers with the export, after comparing the prompts."""
        folder = export(run, "hf_trunk").rename(tmp_path / f"export-{len(first)}")
        theirs = AutoTokenizer.from_pretrained(folder)
        tokens = theirs(f"{prompt}\n", return_tensors="pt", split_special_tokens=True)
        assert tokens["input_ids"].tolist() == run.tokenizer.encode_prompts("{prompt}\n", [prompt])
        assert tokens["input_ids"][0].tolist() == [*first, *run.tokenizer.encode([f"{prompt}\n"])[0]]
        model = AutoModelForCausalLM.from_pretrained(folder)
        generated = model.generate(**tokens, max_new_tokens=12, do_sample=False)[0, tokens["input_ids"].shape[1] :]
        arguments = [f"checkpoint={run.folder}", f"prompt={prompt}", "generation.max_new_tokens=12"]
        done = invoke(*arguments, command="generate")
        assert done.code == 0, done.err
        return done.out, theirs.decode(generated, skip_special_tokens=True) + "\n"

    ours, theirs = answers(run, [tokenizer.end])
    assert ours == theirs
    content = (run.folder / "config.yaml").read_text()
    assert content.count("add_bos_token: null") == 1
    (run.folder / "config.yaml").write_text(content.replace("    add_bos_token: null\n", ""))
    without, theirs_without = answers(runs.load(run.folder), [])  # a run of an earlier version has no such key
    assert without == theirs_without
    assert without != ours, "the control: the first token has no effect"


def remove_tensors(path: Path, prefix: str) -> None:
    """Remove the tensors whose names start with `prefix` from a safetensors file."""
    tensors = load_file(path)
    kept = {name: tensor.clone() for name, tensor in tensors.items() if not name.startswith(prefix)}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, path, {"format": "pt"})


def test_missing_heads_are_reported_and_not_created(
    runs: Runs, export: Callable[..., Path], invoke: Invoke, tmp_path: Path
) -> None:
    run = runs.get("llama")
    damaged_run = tmp_path / "broken"
    shutil.copytree(run.folder, damaged_run)
    checkpoint, _ = find_checkpoint(damaged_run)
    remove_tensors(checkpoint / "model.safetensors", "heads.2.")
    (checkpoint / manifest.NAME).unlink()
    manifest.write(checkpoint, 2, manifest.entries([*checkpoint.iterdir()]))
    done = invoke(f"checkpoint={damaged_run}", "folder=out", "format=hf", tiny=False, command="export")
    assert (done.code, Path("out").exists()) == (2, False)
    assert "does not fit the model" in done.err
    assert "heads.2.layer" in done.err

    folder = export(run, "hf")
    remove_tensors(folder / "model.safetensors", "extra_heads.1.")
    with pytest.raises(ValueError, match=r"declares 3 heads; not in the files: .*extra_heads\.1\."):
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(InputError, match="head 3"):
        Pretrained(tokenizer=run.tokenizer, path=folder, num_heads=HEADS, lora=Lora()).create()
    with pytest.raises(InputError, match=r"missing: extra_heads\.1\."):
        hf_export.check_causal(folder)


def test_tensors_that_contradict_the_config_are_reported(runs: Runs, export: Callable[..., Path]) -> None:
    folder = export(runs.get("llama"), "hf_trunk")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.3.mlp.up_proj.weight"] = tensors.pop("model.layers.2.mlp.up_proj.weight")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5].clone()
    tensors["lm_head.weight"] = tensors["lm_head.weight"].half()
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError) as error:
        hf_export.check_causal(folder)
    lines = str(error.value).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        ["missing:", "model.layers.2.mlp.up_proj.weight"], ["unexpected:", "model.layers.3.mlp.up_proj.weight"],
        ["mis-shaped:", "lm_head.weight"], ["mis-shaped:", "model.norm.weight"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "overrides", "format_", "message"),
    [
        ("llama", [], "medusa", "format=hf"),
        ("wmtp", [], "medusa", "format=hf_trunk"),
        ("llama-tied", ["model.head_kind=medusa"], "meta", "residual layers"),
        ("mistral", [], "meta", "its model type is mistral"),
        ("gpt2", [], "meta", "its model type is gpt2"),
    ],
)
def test_an_unsupported_format_is_refused(
    runs: Runs, invoke: Invoke, family: str, overrides: list[str], format_: str, message: str
) -> None:
    run = runs.get(family, *overrides)
    done = invoke(f"checkpoint={run.folder}", "folder=out", f"format={format_}", tiny=False, command="export")
    assert (done.code, Path("out").exists()) == (2, False)
    assert f"format={format_}: " in done.err
    assert message in done.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention has biases"),
        ({"mlp_bias": True}, "feed-forward layers have biases"),
        ({"hidden_act": "gelu"}, "activation is gelu"),
        ({"head_dim": 12}, "4 attention heads of width 12 do not add up to its width 32"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "scaled"),
    ],
)
def test_meta_format_refuses_other_llama_variants(changes: dict[str, Any], message: str) -> None:
    config = transformers.LlamaConfig(**SIZES | changes)
    with pytest.raises(InputError, match=message):
        model_export.check_format("meta", hf_export.HuggingFaceArchitecture(config, HEADS))
    model_export.check_format("hf", hf_export.HuggingFaceArchitecture(config, HEADS))


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), InterruptedRun(15, "stop"), ValueError()])
def test_a_failed_export_leaves_no_files(runs: Runs, invoke: Invoke, error: BaseException) -> None:
    def fail(folder: Path) -> None:
        assert (folder / "model.safetensors").exists()
        raise error

    command = [f"checkpoint={runs.get('llama').folder}", "folder=out/model", "format=hf"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf_export, "check_causal", fail)
        done = invoke(*command, tiny=False, command="export")
    assert done.code == {OSError: 2, InterruptedRun: 143, ValueError: 1}[type(error)]
    assert isinstance(error, ValueError) or "Traceback" not in done.err
    assert not isinstance(error, OSError) or "No space left" in done.err
    assert [*Path("out").iterdir()] == []
    Path("out/model").mkdir()  # an empty folder is accepted too
    assert invoke(*command, tiny=False, command="export").code == 0
    assert Path("out/model/config.json").exists()
    assert [path.name for path in Path("out").iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["folder=out"], ["format: missing; set it with format=hf, hf_trunk, medusa or meta"]),
        (["folder=out", "format=onnx"], ["format=onnx: must be 'hf', 'hf_trunk', 'medusa' or 'meta'"]),
        (["format=hf"], ["folder: missing; set it with folder=…"]),
        (["folder=taken", "format=hf"], ["folder=taken: is not empty; name a new folder"]),
        (["folder=taken/file", "format=hf"], ["folder=taken/file: is a file"]),
        (["folder=dangling", "format=hf"], ["folder=dangling: is a link to nowhere, which is not a folder"]),
        (["folder=s3://bucket/x", "format=hf"], ["exports are written to a local folder"]),
        (["checkpoint=nowhere", "folder=taken", "formt=hf"], ["format", "does not exist", "taken", "formt"]),
    ],
)
def test_all_export_errors_are_reported_together(
    runs: Runs, invoke: Invoke, tmp_path: Path, overrides: list[str], messages: list[str]
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    done = invoke(f"checkpoint={runs.get('wmtp').folder}", *overrides, tiny=False, command="export")
    assert done.code == 2
    assert "nothing was done" in done.err
    for message in messages:
        assert message in done.err
    assert not Path("out").exists()


def test_the_first_two_arguments_need_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert positional_args(["a run", "out", "format=hf"]) == ["checkpoint='a run'", "folder=out", "format=hf"]
    assert positional_args(["format=hf", "run", "--cfg", "job", "out"])[1:] == [
        "checkpoint='run'",
        "--cfg",
        "job",
        "folder=out",
    ]
    assert positional_args(["checkpoint=run", "folder=out"]) == ["checkpoint=run", "folder=out"]
    (tmp_path / "lr=0.1").mkdir()
    assert positional_args(["lr=0.1", "out"]) == ["checkpoint='lr=0.1'", "folder=out"]
    with pytest.raises(ConfigError, match="one too many"):
        positional_args(["run", "out", "hf"])


def test_the_export_command_writes_a_model_and_reports_extra_arguments(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_export(*arguments: str) -> tuple[int, str, str]:
        """Run `python -m wmtp.export …` in this process, where all modules are imported."""
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["wmtp.export", *arguments])
        handler = signal.getsignal(signal.SIGINT)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(export_command.__file__, run_name="__main__")
        signal.signal(signal.SIGINT, handler)
        captured = capsys.readouterr()
        return int(exit_info.value.code or 0), captured.out, captured.err

    monkeypatch.chdir(tmp_path)
    code, out, err = run_export("run", "out", "hf")
    assert (code, out) == (2, "")
    assert "hf: is one too many; write python -m wmtp.export RUN DIR format=hf, hf_trunk, medusa or meta" in err
    name = "a folder, {of} [mine]"
    Path("tokenizer.json").write_text("the current folder may contain another tokenizer, which must not be used")
    code, out, err = run_export(str(runs.get("wmtp").folder), name, "format=hf_trunk", f"cache_dir={runs.cache}")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"{name}: trunk and head 1 of 3, a plain causal language model",
        f'  AutoModelForCausalLM.from_pretrained("{name}")',
    ]
    assert AutoConfig.from_pretrained(tmp_path / name).model_type == "llama"
    exported = BackendTokenizer.from_file(str(tmp_path / name / "tokenizer.json"))
    assert exported.get_vocab() == runs.get("wmtp").tokenizer.backend.get_vocab()


def test_a_value_head_is_reported_as_not_exported(
    runs: Runs, export: Callable[..., Path], tmp_path: Path, tokens: Tensor
) -> None:
    critic = ["algo=critic", "pretrain=critic", "pretrain.num_epochs=1", "pretrain.max_steps=1", "max_steps=1"]
    run = runs.get("wmtp", *critic)
    model, info = load_exported(export(run, "hf"), trust_remote_code=True)
    assert "the value head is not exported" in (tmp_path / "output.txt").read_text()
    assert info == {}
    with torch.no_grad():
        assert_logits_close(model(tokens, return_all_heads=True).logits, run.logits(tokens))
