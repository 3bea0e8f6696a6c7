import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from tests.conftest import Invoke
from wmtp.data.dataset import Dataset
from wmtp.data.special_tokens import with_prefix
from wmtp.data.tokenizer import END, PADDING, Tokenizer, task_tokenizer, tokenizer_difference
from wmtp.distributed.device import Hardware
from wmtp.errors import InputError
from wmtp.models.huggingface import reward_model as reward
from wmtp.models.huggingface.reward_model import RewardModel

CPU = Hardware(device="cpu")
OTHER_PADDING = 7


def llama_config(**options: Any) -> LlamaConfig:
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaConfig(**(sizes | heads | {"num_labels": 1, "initializer_range": 0.3} | options))


def save(config: PreTrainedConfig, kind: type, tokenizer: Tokenizer, folder: Path) -> Path:
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def llama(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with one label, saved in bf16, whose padding token occurs in samples."""
    config = llama_config(pad_token_id=OTHER_PADDING)
    folder = save(config, LlamaForSequenceClassification, tokenizer, tmp_path_factory.mktemp("llama"))
    AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with two labels and a tokenizer saved by transformers."""
    config = GPT2Config(
        vocab_size=512, n_embd=32, n_layer=2, n_head=4, num_labels=2, initializer_range=0.3, pad_token_id=None
    )
    folder = save(config, GPT2ForSequenceClassification, tokenizer, tmp_path_factory.mktemp("gpt2"))
    backend = BackendTokenizer.from_str(tokenizer.backend.to_str())
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END, pad_token=PADDING).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """Return the folder of a copy of the Llama model, which a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "reward-model"))


@pytest.fixture
def loaded_folders(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return the folders whose weights were loaded."""
    folders: list[Path] = []
    load = reward._load
    monkeypatch.setattr(reward, "_load", lambda path, config: (folders.append(path), load(path, config))[1])
    return folders


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_reward_is_the_score_at_the_last_token_of_the_sample(
    name: str, request: pytest.FixtureRequest, tokenizer: Tokenizer, tiny_data: Dataset
) -> None:
    folder: Path = request.getfixturevalue(name)
    rewards = RewardModel(folder, tokenizer, CPU).rewards(tiny_data.train)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    backbone = model.base_model
    samples, expected = tiny_data.train.samples, []
    for start, stop in zip(samples.offsets, samples.offsets[1:], strict=False):
        tokens = torch.tensor(samples.tokens[start:stop]).long()[None]
        assert tokens[0, -1] == tokenizer.end
        with torch.no_grad():
            logits = model.score(backbone(tokens).last_hidden_state[0, -1])
        expected.append(float(logits[0] if len(logits) == 1 else logits.exp()[1] / logits.exp().sum()))
    assert rewards.dtype == np.float32
    assert rewards.shape == (len(tiny_data.train),)
    np.testing.assert_allclose(rewards, expected, atol=1e-5, rtol=0)
    assert rewards.std() > 0.05  # the samples have different rewards


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_rewards_do_not_depend_on_the_other_samples_of_a_batch(
    name: str,
    request: pytest.FixtureRequest,
    tokenizer: Tokenizer,
    tiny_data: Dataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def score_in_batches(lengths: np.ndarray, batch_size: int) -> list[list[int]]:
        shuffled = np.random.default_rng(0).permutation(len(lengths))
        return [chosen.tolist() for chosen in np.array_split(shuffled, 3)]

    model = RewardModel(request.getfixturevalue(name), tokenizer, CPU)
    monkeypatch.setattr(reward, "BATCH_SIZE", 1)
    alone = model.rewards(tiny_data.train)
    monkeypatch.setattr(reward, "batches_by_length", score_in_batches)
    assert len(set(tiny_data.train.samples.lengths)) > 5
    np.testing.assert_allclose(model.rewards(tiny_data.train), alone, atol=1e-5, rtol=0)
    model.model.config.pad_token_id = OTHER_PADDING  # as in the folder: padding is scored
    assert np.abs(model.rewards(tiny_data.train) - alone).max() > 0.05


def test_the_model_computes_in_fp32_without_dropout_for_every_saved_dtype(llama: Path, tokenizer: Tokenizer) -> None:
    assert json.loads((llama / "config.json").read_text())["dtype"] == "bfloat16"
    model = RewardModel(llama, tokenizer, CPU).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


def with_changed_backend(backend: BackendTokenizer, change: Callable[[dict[str, Any]], None]) -> BackendTokenizer:
    content = json.loads(backend.to_str())
    change(content)
    return BackendTokenizer.from_str(json.dumps(content))


def swap_tokens(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    first, second = (token for token, number in vocabulary.items() if number in (400, 401))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def swap_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[20], merges[21] = merges[21], merges[20]


def other_size(tokenizer: Tokenizer) -> BackendTokenizer:
    backend = with_changed_backend(tokenizer.backend, lambda content: None)
    backend.add_tokens(["<more>"])
    return backend


def normalizing(tokenizer: Tokenizer) -> BackendTokenizer:
    backend = with_changed_backend(tokenizer.backend, lambda content: None)
    backend.normalizer = normalizers.NFC()
    return backend


def with_prefix_space(tokenizer: Tokenizer) -> BackendTokenizer:
    backend = with_changed_backend(tokenizer.backend, lambda content: None)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return backend


def greedy_special_tokens(expected: Tokenizer) -> BackendTokenizer:
    """Return a tokenizer whose special tokens include the following space."""

    def change(content: dict[str, Any]) -> None:
        for token in content["added_tokens"]:
            token["rstrip"] = True

    return with_changed_backend(expected.backend, change)


def single_digits(tokenizer: Tokenizer) -> BackendTokenizer:
    backend = with_changed_backend(tokenizer.backend, lambda content: None)
    parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
    return backend


OTHERS: dict[str, tuple[Callable[[Tokenizer], BackendTokenizer], str]] = {
    "size": (other_size, "it has 513 tokens, ours has 512"),
    "swapped ids": (
        lambda expected: with_changed_backend(expected.backend, swap_tokens),
        "token 400 is '.*', in ours it is '.*'",
    ),
    "swapped merges": (lambda expected: with_changed_backend(expected.backend, swap_merges), "merge 20 is"),
    "normaliser": (normalizing, "splits text differently"),
    "prefix space": (with_prefix_space, "splits text differently"),
    "digits": (single_digits, "splits text differently"),
    "special tokens": (greedy_special_tokens, "different special tokens"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_reward_model_with_another_tokenizer_is_refused_before_its_weights_are_loaded(
    other: str, folder: Path, tokenizer: Tokenizer, loaded_folders: list[Path]
) -> None:
    make, problem = OTHERS[other]
    make(tokenizer).save(str(folder / "tokenizer.json"))
    other_tokenizer = Tokenizer(BackendTokenizer.from_file(str(folder / "tokenizer.json"))).fingerprint
    with pytest.raises(InputError, match=problem) as refused:
        RewardModel(folder, tokenizer, CPU)
    assert refused.value.exit_code == 2
    for part in (str(folder), other_tokenizer[:16], tokenizer.fingerprint[:16]):
        assert part in str(refused.value)
    assert other_tokenizer != tokenizer.fingerprint
    assert loaded_folders == []


def test_control_a_comparison_of_sizes_accepts_swapped_ids(
    folder: Path, tokenizer: Tokenizer, loaded_folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sizes_differ(expected: Tokenizer, other_tokenizer: BackendTokenizer) -> str | None:
        return None if other_tokenizer.get_vocab_size() == expected.vocab_size else "size"

    with_changed_backend(tokenizer.backend, swap_tokens).save(str(folder / "tokenizer.json"))
    monkeypatch.setattr(reward, "tokenizer_difference", sizes_differ)
    RewardModel(folder, tokenizer, CPU)
    assert loaded_folders == [folder]


def test_special_tokens_around_a_text_are_not_compared(folder: Path, tokenizer: Tokenizer) -> None:
    backend = with_changed_backend(tokenizer.backend, lambda content: None)
    backend.enable_padding(length=300, pad_id=0, pad_token=PADDING)
    backend.enable_truncation(5)
    backend.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, tokenizer.end)])
    backend.save(str(folder / "tokenizer.json"))
    assert tokenizer_difference(tokenizer, backend) is not None, (
        "the control: without normalization, the tokenizer encodes differently"
    )
    assert RewardModel(folder, tokenizer, CPU).model.config.pad_token_id == tokenizer.padding


def test_other_tokens_before_a_text_are_reported(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    assert tokenizer_difference(tokenizer, with_prefix(tokenizer.backend, None)) is None and not caplog.messages
    assert tokenizer_difference(tokenizer, with_prefix(tokenizer.backend, END)) is None
    assert "the samples begin with [], but the tokenizer of another model of the run begins a text with ['<end>']" in (
        caplog.text
    )


@pytest.mark.slow
def test_a_tokenizer_does_not_differ_from_itself(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer_difference(tokenizer, tokenizer.backend) is None
    smaller = task_tokenizer(tmp_path, vocab_size=400)
    assert "it has 400 tokens, ours has 512" in str(tokenizer_difference(tokenizer, smaller.backend))


def resave(folder: Path, kind: type, **options: Any) -> None:
    kind(llama_config(**options)).save_pretrained(folder)


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def without_score_head(folder: Path) -> None:
    config = (folder / "config.json").read_bytes()
    resave(folder, LlamaForCausalLM)
    (folder / "config.json").write_bytes(config)


def other_widths(folder: Path) -> None:
    config = (folder / "config.json").read_bytes()
    resave(folder, LlamaForSequenceClassification, hidden_size=16)
    (folder / "config.json").write_bytes(config)


def with_custom_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('ran')")


INVALID_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is not usable"),
    "unknown kind": (lambda f: (f / "config.json").write_text("{}"), "config.json is not usable"),
    "own code": (with_custom_code, "config.json is not usable"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "is not a readable tokenizer.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
    "pickled weights": (pickle_weights, "save the model as safetensors"),
    "language model": (
        lambda f: resave(f, LlamaForCausalLM),
        "contains LlamaForCausalLM; a …ForSequenceClassification is needed",
    ),
    "three labels": (lambda f: resave(f, LlamaForSequenceClassification, num_labels=3), "has 3 labels"),
    "few embeddings": (lambda f: resave(f, LlamaForSequenceClassification, vocab_size=500), "embeddings for 500"),
}
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut weights": (cut_weights, "cannot be loaded"),
    "other widths": (other_widths, "cannot be loaded"),
    "no head": (without_score_head, "lack 1 tensors, such as score.weight"),
}


@pytest.mark.parametrize("invalid", [*INVALID_FOLDERS, *DAMAGES])
def test_a_folder_that_is_not_a_reward_model_is_refused(
    invalid: str, folder: Path, tokenizer: Tokenizer, loaded_folders: list[Path]
) -> None:
    damage, problem = (INVALID_FOLDERS | DAMAGES)[invalid]
    damage(folder)
    with pytest.raises(InputError, match=problem) as refused:
        RewardModel(folder, tokenizer, CPU)
    assert str(folder) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert loaded_folders == ([] if invalid in INVALID_FOLDERS else [folder])


def test_a_padding_token_that_also_ends_samples_is_refused(folder: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"set model\.tokenizer\.padding"):
        RewardModel(folder, Tokenizer(tokenizer.backend, END, END), CPU)


def test_a_sample_longer_than_the_model_reads_is_refused(
    folder: Path, tokenizer: Tokenizer, tiny_data: Dataset
) -> None:
    longest = int(tiny_data.train.samples.lengths.max())
    resave(folder, LlamaForSequenceClassification, max_position_embeddings=longest)
    RewardModel(folder, tokenizer, CPU).rewards(tiny_data.train)
    resave(folder, LlamaForSequenceClassification, max_position_embeddings=longest - 1)
    with pytest.raises(InputError, match=rf"set data\.max_length={longest - 1}"):
        RewardModel(folder, tokenizer, CPU).rewards(tiny_data.train)


def test_a_score_that_is_not_finite_is_refused(llama: Path, tokenizer: Tokenizer, tiny_data: Dataset) -> None:
    model = RewardModel(llama, tokenizer, CPU)
    unused = max(set(range(512)) - set(tiny_data.train.samples.tokens.tolist()))
    model.model.get_input_embeddings().weight.data[unused] = torch.nan
    model.rewards(tiny_data.train)
    model.model.get_input_embeddings().weight.data[tiny_data.train.samples.tokens[0]] = torch.nan
    with pytest.raises(InputError, match="its score of sample .* is not finite"):
        model.rewards(tiny_data.train)


def test_train_refuses_a_reward_model_with_another_tokenizer_before_training(
    invoke: Invoke, folder: Path, tokenizer: Tokenizer, loaded_folders: list[Path]
) -> None:
    other_tokenizer = with_changed_backend(tokenizer.backend, swap_tokens)
    other_tokenizer.save(str(folder / "tokenizer.json"))
    outcome = invoke("algo=critic", "pretrain.loss=reward", f"data.reward_model={folder}")
    assert outcome.code == 2
    for fingerprint in (Tokenizer(other_tokenizer).fingerprint, tokenizer.fingerprint):
        assert fingerprint[:16] in outcome.err
    assert loaded_folders == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["algo=critic"], "pretrain.loss=cross_entropy: needs rewards from 0 to 1"),
        (
            ["algo=critic", "pretrain=none", "data.correct_ratio=0.5"],
            "pretrain=none: the value loss is then the cross-entropy",
        ),
        (["algo=random", "pretrain.loss=cross_entropy", "algo.of=critic_state"], "pretrain.loss=cross_entropy: needs"),
    ],
)
def test_the_cross_entropy_refuses_scores_that_are_no_probabilities(
    invoke: Invoke, folder: Path, arguments: list[str], message: str
) -> None:
    """The control is the run without a reward model. Its config has no issue."""
    outcome = invoke(*arguments, f"data.reward_model={folder}")
    assert outcome.code == 2 and message in outcome.err and "pretrain.loss=reward" in outcome.err
    assert invoke(*arguments, "dry_run=true", "num_samples=0").code == 0
