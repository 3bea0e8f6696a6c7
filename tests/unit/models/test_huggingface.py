"""Tests of models from transformers as trunk and head 1: equality with the original, training, checkpoints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.conftest import Invoke, compose_config
from tests.support.families import FAMILIES, write_family, write_tokenizer
from tests.support.world import lines_of
from wmtp.algorithms.uniform import Uniform
from wmtp.data.dataset import Dataset
from wmtp.data.tokenizer import Tokenizer
from wmtp.generation.decoding import Request, generate
from wmtp.generation.settings import Decoding
from wmtp.models.huggingface.decoder_block import DecoderBlock
from wmtp.models.huggingface.pretrained import Pretrained
from wmtp.models.lora import Lora
from wmtp.models.mtp import MtpModel
from wmtp.objectives.mtp import MtpObjective
from wmtp.ops.metric_sums import MetricSums
from wmtp.training.validate import check_training

pytestmark = pytest.mark.xdist_group("huggingface")  # its tests share what one fixture makes

LENGTH = 24
QUICK = [
    "data.num_train=40", "data.num_validation=8", "data.num_test=8", "max_steps=2", "optimizer.lr=0.01",
    "num_samples=0", "early_stopping=none", "report=false",
]  # fmt: skip


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Callable[[str], Path]:
    """Return a function that writes a tiny model of an architecture and returns its folder."""
    root = tmp_path_factory.mktemp("families")

    def folder(family: str) -> Path:
        path = root / family
        return path if path.exists() else write_family(path, family, tokenizer)

    return folder


@pytest.fixture
def texts() -> Tensor:
    """Return random tokens."""
    return torch.randint(3, 512, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def source(path: Path, tokenizer: Tokenizer, **options: Any) -> Pretrained:
    """Return a source with defaults for options that are not given."""
    return Pretrained(**{"tokenizer": tokenizer, "path": path, "num_heads": 3, "lora": Lora(), **options})


def original_logits(path: Path, tokens: Tensor) -> Tensor:
    """Return the logits of transformers."""
    with torch.no_grad():
        logits: Tensor = AutoModelForCausalLM.from_pretrained(path).eval()(tokens).logits
    return logits


def logits_of(model: MtpModel, tokens: Tensor) -> Tensor:
    """Return the logits of every head."""
    with torch.no_grad():
        return model.eval()(tokens).states @ model.unembedding_weight.T


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["transformer", "medusa"])
def test_before_training_every_head_is_the_original_model(
    family: str, kind: str, folders: Callable[[str], Path], tokenizer: Tokenizer, texts: Tensor
) -> None:
    path = folders(family)
    model = source(path, tokenizer, head_kind=kind).create()
    logits, original = logits_of(model, texts), original_logits(path, texts)
    assert len(logits) == 3
    for head in logits:
        torch.testing.assert_close(head, original, rtol=1e-4, atol=1e-4)
    trunk_only = model.norm(model.trunk_states(texts)) @ model.unembedding_weight.T
    assert (trunk_only - original).abs().max() > 0.1, "the control: the trunk alone equals the original model"


def test_heads_are_copies_and_no_aliases(folders: Callable[[str], Path], tokenizer: Tokenizer) -> None:
    model = source(folders("llama"), tokenizer).create()
    places = [p.data_ptr() for head in model.heads for p in head.parameters()]
    assert len(places) == len(set(places)), "heads share parameters"


def test_the_sliding_window_is_respected(folders: Callable[[str], Path], tokenizer: Tokenizer, texts: Tensor) -> None:
    path = folders("mistral")
    model = source(path, tokenizer).create()
    for block in [*model.trunk, *model.heads]:
        assert isinstance(block, DecoderBlock) and block.window == 6 < LENGTH
        block.window = None
    assert (logits_of(model, texts)[0] - original_logits(path, texts)).abs().max() > 0.1


def test_layers_with_and_without_a_window_are_distinguished(
    tmp_path: Path, tokenizer: Tokenizer, texts: Tensor
) -> None:
    config = FAMILIES["qwen2"]()
    config.use_sliding_window, config.sliding_window, config.max_window_layers = True, 5, 1
    config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, tokenizer)
    model = source(tmp_path, tokenizer).create()
    assert [block.window for block in [*model.trunk, model.heads[0]]] == [None, 5, 5]
    torch.testing.assert_close(logits_of(model, texts)[0], original_logits(tmp_path, texts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_head_1_starts_at_the_original_models_loss(
    family: str, folders: Callable[[str], Path], tokenizer: Tokenizer, tiny_data: Dataset
) -> None:
    path, objective, sums = folders(family), MtpObjective(Uniform()), MetricSums()
    model, original = source(path, tokenizer).create().eval(), AutoModelForCausalLM.from_pretrained(path).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in tiny_data.validation_batches(1):
            sums.add(objective.evaluate(model, batch))
            number = int((batch.labels[:, 1:] != -100).sum())
            total += float(original(batch.tokens, labels=batch.labels).loss) * number
            count += number
    assert objective.metrics(sums)["head_1_loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"), [*((family, "transformer") for family in FAMILIES), ("llama", "medusa"), ("gpt2", "medusa")]
)
def test_greedy_completions_equal_those_of_transformers_with_and_without_drafts(
    family: str, kind: str, folders: Callable[[str], Path], tokenizer: Tokenizer
) -> None:
    path, new = folders(family), 20
    model = source(path, tokenizer, head_kind=kind).create()
    torch.manual_seed(3)
    for head in model.heads[1:]:  # so that some drafts are accepted
        for parameter in head.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    original = AutoModelForCausalLM.from_pretrained(path).eval()
    prompts = [tokenizer.encode([text])[0] for text in ("Write f(x).", "def f(x):\n    return x + 1\n", "x")]
    for speculative in (True, False):
        how = Decoding(max_new_tokens=new, speculative=speculative)
        requests = [Request(prompt) for prompt in prompts]
        for index, answer in generate(model, tokenizer, requests, how, context=64):
            prompt = torch.tensor([prompts[index]])
            out = original.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, pad_token_id=0
            )
            expected = out[0, len(prompts[index]) :].tolist()
            assert answer.tokens == expected[: len(answer.tokens)]
            assert len(answer.tokens) == new or expected[len(answer.tokens)] == tokenizer.end
        assert model.training, "generation changed the model"


@pytest.mark.slow
def test_tied_embeddings_stay_tied(folders: Callable[[str], Path], invoke: Invoke, tmp_path: Path) -> None:
    names = {}
    for family in ("llama-tied", "llama"):
        run = tmp_path / family
        model = ["model=huggingface", f"model.path={folders(family)}"]
        outcome = invoke(*model, *QUICK, f"hydra.run.dir={run}", tiny=False)
        assert outcome.code == 0, outcome.err
        names[family] = set(load_file(run / "checkpoints/step_00000002/model.safetensors"))
    assert "unembedding.weight" in names["llama"], "the control"
    assert names["llama"] - names["llama-tied"] == {"unembedding.weight"}


@pytest.mark.parametrize(("stored", "dtype"), [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")])
def test_parameters_have_the_configured_dtype(stored: str, dtype: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    types = {"fp32": torch.float32, "bf16": torch.bfloat16}
    path = write_family(tmp_path / "model", "qwen2", tokenizer, types[stored])
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(path).parameters()} == {types[stored]}, "the control"
    model = source(path, tokenizer, dtype=dtype).create()
    assert {p.dtype for p in model.parameters()} == {types[dtype]}
    assert model.positions.rotary.inv_freq.dtype == torch.float32, "rotary frequencies have the dtype of parameters"
    assert {p.dtype for p in source(path, tokenizer, dtype=dtype).empty().parameters()} == {types[dtype]}


@pytest.mark.slow
def test_a_bf16_model_trains(folders: Callable[[str], Path], invoke: Invoke, tmp_path: Path) -> None:
    options = ["model.dtype=bf16", "hardware=cpu", "hardware.precision=bf16", f"hydra.run.dir={tmp_path / 'run'}"]
    outcome = invoke("model=huggingface", f"model.path={folders('llama')}", *options, *QUICK, tiny=False)
    assert outcome.code == 0, outcome.err
    stored = load_file(tmp_path / "run/checkpoints/step_00000002/model.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}


@pytest.mark.slow
def test_an_unsupported_architecture_is_refused_and_supported_ones_are_listed(
    tmp_path: Path, tokenizer: Tokenizer, invoke: Invoke
) -> None:
    config = transformers.OPTConfig(
        vocab_size=512, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "opt")
    write_tokenizer(tmp_path / "opt", tokenizer)
    outcome = invoke("model=huggingface", f"model.path={tmp_path / 'opt'}", tiny=False)
    assert outcome.code == 2
    assert "opt" in outcome.err and "gpt2, llama, mistral, qwen2, qwen3" in outcome.err


def test_missing_heads_are_created_or_omitted_with_a_warning(
    folders: Callable[[str], Path], tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    made = source(folders("qwen3"), tokenizer, num_heads=4)
    assert made.num_heads == made.create().num_heads == 4
    assert "has 1 of 4 heads; the other heads are new" in caplog.text
    caplog.clear()
    assert source(folders("qwen3"), tokenizer, num_heads=1).create().num_heads == 1
    assert not caplog.records, "the control: a warning was logged"
    without = source(folders("qwen3"), tokenizer, num_heads=4, create_heads=False)
    assert without.num_heads == without.create().num_heads == 1
    assert "model.num_heads=4" in caplog.text and "the model has 1" in caplog.text


def test_validation_uses_the_number_of_heads_of_the_created_model(folders: Callable[[str], Path]) -> None:
    overrides = ["model=huggingface", f"model.path={folders('llama')}", "early_stopping.monitor=val/head_4_loss"]
    assert not check_training(compose_config(*overrides)).issues
    assert "head_4_loss" in str(check_training(compose_config(*overrides, "model.create_heads=false")).issues[0])


def change_weights(path: Path, name: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Apply `change` to the weights in a file."""
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name, metadata={"format": "pt"})


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "lacks and has too much": (
        lambda path: change_weights(
            path, "model.safetensors",
            lambda t: t.update({"model.layers.9.other": t.pop("model.layers.0.mlp.up_proj.weight")}),
        ),
        "missing: model.layers.0.mlp.up_proj.weight",
    ),
    "cut": (lambda path: (path / "model.safetensors").write_bytes(b"\0" * 100), "cannot be loaded"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "has no model.safetensors"),
    "no config": (lambda path: (path / "config.json").unlink(), "has no config.json"),
    "no tokenizer": (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json"),
    "no end": (lambda path: (path / "tokenizer_config.json").write_text("{}"), "has no eos_token"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_folder_is_refused_before_training(
    case: str, folders: Callable[[str], Path], invoke: Invoke, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(folders("llama"), tmp_path / "wrong"))
    change, message = WRONG[case]
    change(path)
    outcome = invoke("model=huggingface", f"model.path={path}", f"hydra.run.dir={tmp_path / 'run'}", tiny=False)
    assert outcome.code == 2, outcome.err
    assert message in outcome.err and "Traceback" not in outcome.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_too_few_embeddings_for_the_tokenizer_are_refused(tmp_path: Path, tokenizer: Tokenizer, invoke: Invoke) -> None:
    config = FAMILIES["llama"]()
    config.vocab_size = 300
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    write_tokenizer(tmp_path / "small", tokenizer)
    outcome = invoke("model=huggingface", f"model.path={tmp_path / 'small'}", tiny=False)
    assert outcome.code == 2
    assert "300" in outcome.err and "512" in outcome.err


def test_texts_longer_than_learned_positions_are_refused(folders: Callable[[str], Path]) -> None:
    overrides = ["model=huggingface", f"model.path={folders('gpt2')}"]
    assert not check_training(compose_config(*overrides, "data.max_length=512")).issues
    (issue,) = check_training(compose_config(*overrides, "data.max_length=513")).issues
    assert (issue.key, issue.problem) == ("data.max_length", "the model reads 512 tokens at most")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama-tied", pytest.param("gpt2", marks=pytest.mark.deep)])
def test_a_finished_run_does_not_need_its_models_folder(
    family: str, folders: Callable[[str], Path], invoke: Invoke, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(folders(family), tmp_path / "original"))
    model = ["model=huggingface", f"model.path={path}", "model.num_heads=2", *QUICK]
    run, uninterrupted = tmp_path / "run", tmp_path / "whole"
    assert invoke(*model, "max_steps=4", f"hydra.run.dir={uninterrupted}", tiny=False).code == 0
    assert invoke(*model, "max_steps=4", "save_interval=2", f"hydra.run.dir={run}", tiny=False).code == 0
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    resumed = invoke(f"resume={run}", tiny=False)
    assert resumed.code == 0, resumed.err
    last = [folder / "checkpoints/step_00000004/model.safetensors" for folder in (run, uninterrupted)]
    assert last[0].read_bytes() == last[1].read_bytes(), "the resumed run differs from the uninterrupted run"
    shutil.rmtree(path)
    generated = invoke(f"checkpoint={run}", "prompt=Write f(x).", "generation.max_new_tokens=4", command="generate")
    assert generated.code == 0, generated.err
    options = [f"checkpoint={run}", "evaluation.limit=2", "generation.max_new_tokens=4"]
    assert invoke(*options, command="evaluate").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["critic", "rho1", "rho1_token_skip", "prior"])
def test_the_algorithms_train_a_pretrained_model(
    algorithm: str, folders: Callable[[str], Path], invoke: Invoke, tmp_path: Path
) -> None:
    options = [f"algo={algorithm}", "model=huggingface", f"model.path={folders('qwen2')}", f"hydra.run.dir={tmp_path}"]
    options += ["pretrain.trains=head"] if algorithm == "critic" else ["algo.reference=initial"]
    outcome = invoke(*options, *QUICK, tiny=False)
    assert outcome.code == 0, outcome.err
    assert "train/head_3_loss" in lines_of(tmp_path)[0]
    if algorithm == "critic":
        stage = json.loads((tmp_path / "pretrain/result.json").read_text())
        assert stage["total_steps"] == 2


@pytest.mark.slow
def test_the_excess_over_the_initial_model_starts_at_zero(
    folders: Callable[[str], Path], invoke: Invoke, tmp_path: Path
) -> None:
    """At the start, head 1 equals the reference, so all targets of head 1 have the same weight."""
    options = ["algo=rho1", "algo.reference=initial", "model=huggingface", f"model.path={folders('llama')}"]
    options += ["model.num_heads=1", f"hydra.run.dir={tmp_path}"]
    assert invoke(*options, *QUICK, "log_interval=1", tiny=False).code == 0
    first, second = (line for line in lines_of(tmp_path) if "train/loss" in line)
    assert first["train/weight_std"] == pytest.approx(0, abs=1e-3)
    assert second["train/weight_std"] > 0.01, "the control: weights do not differ after training"


@pytest.mark.slow
def test_the_first_weights_of_prior_are_those_of_dft(
    folders: Callable[[str], Path], invoke: Invoke, tmp_path: Path
) -> None:
    """At the start, head 1 equals the reference. Later, the probabilities of the policy change, but not the weights."""
    options = ["model=huggingface", f"model.path={folders('llama')}", "model.num_heads=1", *QUICK, "log_interval=1"]
    lines = {}
    for algorithm in ("dft", "prior"):
        run = [f"algo={algorithm}", "algo.rescale=false", f"hydra.run.dir={tmp_path / algorithm}"]
        outcome = invoke(*options, *run, tiny=False)
        assert outcome.code == 0, outcome.err
        lines[algorithm] = [line for line in lines_of(tmp_path / algorithm) if "train/loss" in line]
    for name in ("train/weight_mean", "train/weight_min", "train/weight_max", "train/loss"):
        first, second = [
            pytest.approx(line[name], rel=1e-3) == other[name] for line, other in zip(*lines.values(), strict=True)
        ]
        assert first and not second, name


@pytest.mark.slow
def test_a_randomly_initialized_model_cannot_be_its_own_reference(invoke: Invoke) -> None:
    outcome = invoke("algo=rho1", "algo.reference=initial")
    assert outcome.code == 2 and "algo.reference=initial: is for pretrained models" in outcome.err


def swap_token_ids(path: Path) -> None:
    """Exchange the ids of two tokens in a folder's tokenizer."""
    content = json.loads((path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    token_by_id = {number: token for token, number in vocabulary.items()}
    vocabulary[token_by_id[300]], vocabulary[token_by_id[301]] = 301, 300
    (path / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_a_reference_with_two_ids_swapped_is_refused(
    folders: Callable[[str], Path], invoke: Invoke, tmp_path: Path
) -> None:
    reference = Path(shutil.copytree(folders("qwen2"), tmp_path / "reference"))
    options = ["algo=rho1", "pretrain=none", f"algo.reference={reference}", *QUICK, "hydra.run.dir=run"]
    assert invoke(*options, "hydra.run.dir=control").code == 0, (
        "the control: a reference with the same tokenizer is refused"
    )
    swap_token_ids(reference)
    outcome = invoke(*options)
    assert outcome.code == 2
    assert "token 300 is" in outcome.err and "reference" in outcome.err
    assert not Path("run/metrics.jsonl").exists()


@pytest.mark.slow
def test_labels_in_the_models_config_do_not_prevent_resuming(
    folders: Callable[[str], Path], invoke: Invoke, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(folders("llama"), tmp_path / "labelled"))
    config = json.loads((path / "config.json").read_text()) | {"id2label": {"0": "a", "1": "b", "2": "c"}}
    (path / "config.json").write_text(json.dumps(config | {"rope_scaling": None}))
    options = ["model=huggingface", f"model.path={path}", *QUICK, "hydra.run.dir=run"]
    assert invoke(*options, tiny=False).code == 0
    outcome = invoke("resume=run", "max_steps=3", tiny=False)
    assert outcome.code == 0, outcome.err


@pytest.mark.slow
def test_a_reference_with_too_few_positions_for_the_data_is_refused(
    tokenizer: Tokenizer, invoke: Invoke, tmp_path: Path
) -> None:
    config = FAMILIES["gpt2"]()
    config.n_positions = 100
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "short")
    write_tokenizer(tmp_path / "short", tokenizer)
    outcome = invoke("algo=rho1", f"algo.reference={tmp_path / 'short'}", *QUICK)
    assert outcome.code == 2
    assert "algo.reference=" in outcome.err and "the model reads 100 tokens at most" in outcome.err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_reference_that_is_not_a_model_is_reported(kind: str, invoke: Invoke, tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    nothing.mkdir() if kind == "folder" else nothing.write_text("x")
    outcome = invoke("algo=rho1", f"algo.reference={nothing}", *QUICK)
    assert outcome.code == 2 and f"algo.reference={nothing}" in outcome.err and "Traceback" not in outcome.err


def test_a_config_that_transformers_cannot_use_is_an_issue(folders: Callable[[str], Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(folders("llama"), tmp_path / "odd"))
    for name, value in {"hidden_act": "nosuch", "quantization_config": {"quant_method": "gptq", "bits": 4}}.items():
        config = json.loads((folders("llama") / "config.json").read_text()) | {name: value}
        (path / "config.json").write_text(json.dumps(config))
        (issue,) = check_training(compose_config("model=huggingface", f"model.path={path}")).issues
        assert issue.key == "model.path", issue
