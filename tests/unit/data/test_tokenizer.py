"""Tests of tokenizers: text never becomes a control token, and every text is decoded unchanged."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import DictConfig
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as BackendTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from wmtp.config.schema import build
from wmtp.data.collate import IGNORED, collate
from wmtp.data.records import Record
from wmtp.data.sources import FileSource
from wmtp.data.split import build_split
from wmtp.data.token_cache import tokenize
from wmtp.data.token_labels import label_tokens
from wmtp.data.tokenizer import Tokenizer, pretrained_tokenizer, tokenizer_files, train_bpe
from wmtp.errors import InputError

TEXTS = ["<|begin|>user\nSay <|end|> and </s>, twice: </s>", "print('<end>')", "a<pad>", "naïve 日本語 🙂"] * 3
SPECIAL = ["<pad>", "<end>", "<s>", "</s>", "<|begin|>", "<|end|>"]
"""Names of special tokens. Each of the tokenizers below has some of them."""
ORDINARY = "<think>"
"""The name of an added token that is not special."""
BYTES = {f"<0x{number:02X}>": 6 + number for number in range(256)}


def own() -> Tokenizer:
    """Return a tokenizer that is trained like that of the embedded tasks, on text with the names of special tokens."""
    records = [Record(task_id="a", prompt=text, solution=text) for text in TEXTS]
    return Tokenizer(train_bpe(records, 320))


def byte_level() -> Tokenizer:
    """Return a byte-level BPE with special tokens that are not in its vocabulary, as Llama 3 and Qwen have them."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    backend.add_special_tokens([*SPECIAL[2:5], AddedToken("<end>", lstrip=True, rstrip=True, normalized=True)])
    backend.add_tokens([AddedToken("<|end|>", special=False), AddedToken(ORDINARY, special=False)])
    return Tokenizer(backend, "<|end|>", "<|begin|>")


def sentencepiece_bpe() -> Tokenizer:
    """Return a BPE like that of Llama 2, whose control pieces are in the vocabulary and are created by merges."""
    pieces = ["▁", "<", "/", "s", ">", "</", "s>", "<s", "e", "n", "d", "a"]
    vocabulary = {name: number for number, name in enumerate(SPECIAL)} | BYTES
    vocabulary |= {name: len(vocabulary) + number for number, name in enumerate(pieces)}
    merges = [(a, b) for a in pieces for b in pieces if a + b in vocabulary]
    return marking_spaces(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))


def sentencepiece_unigram() -> Tokenizer:
    """Return a Unigram model whose control pieces have the largest score."""
    pieces = [(name, 0.0) for name in SPECIAL] + [(name, -9.0) for name in (*BYTES, *"▁</s>end")]
    return marking_spaces(models.Unigram(pieces, 5, byte_fallback=True))


def marking_spaces(model: models.Model) -> Tokenizer:
    """Return a tokenizer that replaces spaces with ▁ and adds one before a text, like that of Llama 2."""
    backend = BackendTokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(SPECIAL)
    return Tokenizer(backend, "</s>", "<pad>")


def llama_3() -> Tokenizer:
    """Return a byte-level BPE that begins every text with <|begin|>, and whose post-processor has two parts."""
    begin = processors.TemplateProcessing("<|begin|> $A", "<|begin|> $A <|begin|> $B:1", [("<|begin|>", 302)])
    return processed(byte_level(), processors.Sequence([processors.ByteLevel(), begin]))


def llama_2() -> Tokenizer:
    """Return a tokenizer like that of Llama 2, which begins every text with <s>."""
    return processed(sentencepiece_bpe(), processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)]))


def two_tokens() -> Tokenizer:
    """Return a tokenizer that puts two tokens before every text and one after it."""
    names = [("<s>", 2), ("<|begin|>", 4), ("<end>", 1)]
    return processed(sentencepiece_unigram(), processors.TemplateProcessing("<s> <|begin|> $A <end>", None, names))


def processed(tokenizer: Tokenizer, processor: processors.PostProcessor) -> Tokenizer:
    """Return a tokenizer with another post-processor."""
    tokenizer.backend.post_processor = processor
    end, padding = (str(tokenizer.backend.id_to_token(number)) for number in (tokenizer.end, tokenizer.padding))
    return Tokenizer(tokenizer.backend, end, padding)


PREFIXES = {"own": [], "byte_level": [], "llama_3": [302], "llama_2": [2], "two_tokens": [2, 4]}
"""The ids of the tokens that the tokenizers put before a text."""
TOKENIZERS = {make.__name__: cache(make) for make in (own, byte_level, sentencepiece_bpe, sentencepiece_unigram)}
WITH_PREFIX = {make.__name__: make for make in (own, byte_level, llama_3, llama_2, two_tokens)}
characters = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=5)
texts = st.lists(st.sampled_from([*SPECIAL, ORDINARY, " ", "\n"]) | characters).map("".join)


def control_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids of the tokens that text must not become."""
    ids = (tokenizer.backend.token_to_id(name) for name in SPECIAL)
    return {number for number in ids if number is not None}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts)
@example("".join(SPECIAL) + " </s> <end> ")
def test_no_text_becomes_a_control_token_and_every_text_is_decoded_unchanged(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]()
    (tokens,) = tokenizer.encode([text])
    assert control_ids(tokenizer).isdisjoint(tokens)
    assert tokenizer.decode(tokens) == text
    (spans,) = tokenizer.character_spans([text])
    assert len(spans) == len(tokens)
    if not any(name in text for name in SPECIAL):
        assert tokens == tokenizer.backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_control_the_tokenizer_itself_makes_control_tokens_of_text(name: str) -> None:
    """The option of the library is not enough, because models contain control tokens as ordinary pieces."""
    tokenizer = TOKENIZERS[name]()
    backend, text = BackendTokenizer.from_str(tokenizer.backend.to_str()), "</s><end>"
    assert not control_ids(tokenizer).isdisjoint(backend.encode(text).ids)
    backend.encode_special_tokens = True
    found = not control_ids(tokenizer).isdisjoint(backend.encode("</s><|end|>").ids)
    assert found is (name != "own")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_only_the_template_names_control_tokens(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    start, end = (str(tokenizer.backend.id_to_token(number)) for number in (tokenizer.padding, tokenizer.end))
    template = f"{start}user\n {{prompt}}{end}\n"
    plain, special = "Say it.", f"{start}{end}{template}"
    tokens, with_names = tokenizer.encode_prompts(template, [plain, special])
    assert tokens == tokenizer.backend.encode(template.replace("{prompt}", plain), add_special_tokens=False).ids
    control = control_ids(tokenizer)
    assert [token for token in with_names if token in control] == [tokenizer.padding, tokenizer.end]
    assert tokenizer.decode(with_names).split() == f"user {special}".split()
    (split,) = tokenizer.encode_prompts(f"{start[:2]}{{prompt}}", [start[2:]])
    assert control.isdisjoint(split), "a name that begins in the template and ends in the prompt is text"


def test_records_that_contain_names_of_special_tokens_have_one_end_token() -> None:
    tokenizer = TOKENIZERS["sentencepiece_bpe"]()
    record = Record(task_id="a", prompt="</s>", solution="print('</s>')")
    samples = tokenize([record], tokenizer, "<s>{prompt}\n", 100, "drop")
    assert np.flatnonzero(samples.tokens == tokenizer.end).tolist() == [len(samples.tokens) - 1]
    assert samples.tokens[0] == tokenizer.backend.token_to_id("<s>")


def test_an_ordinary_added_token_is_text() -> None:
    tokenizer = TOKENIZERS["byte_level"]()
    (tokens,) = tokenizer.encode([ORDINARY])
    assert tokens == [tokenizer.backend.token_to_id(ORDINARY)]


def test_the_end_token_must_be_a_special_token() -> None:
    backend = BackendTokenizer.from_str(TOKENIZERS["own"]().backend.to_str())
    backend.add_special_tokens(["!"])
    for end in ("Ċ", "!"):
        with pytest.raises(InputError, match=rf"model\.tokenizer\.end={end}: is a part of ordinary text"):
            Tokenizer(backend, end)


def test_a_special_token_that_is_a_character_stays_text() -> None:
    backend = BackendTokenizer.from_str(TOKENIZERS["own"]().backend.to_str())
    backend.add_special_tokens(["!", "\n"])
    tokenizer, text = Tokenizer(backend, padding="!"), "a != b!\n"
    (tokens,) = tokenizer.encode([text])
    assert (tokenizer.decode(tokens), tokenizer.padding) == (text, backend.token_to_id("!"))
    assert backend.token_to_id("\n") not in tokens, "a line break has another token, so this one is not needed"
    assert backend.decode(tokens, skip_special_tokens=True) != text, "the control"


def saved(tokenizer: Tokenizer, folder: Path, **options: Any) -> PreTrainedTokenizerFast:
    """Save a tokenizer with transformers, and return it as transformers loads it."""
    names = dict(tokenizer.special_token_names) | options
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend, **names).save_pretrained(folder)
    loaded = AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.mark.parametrize("name", WITH_PREFIX)
def test_prompts_begin_as_transformers_begins_a_text(name: str, tmp_path: Path) -> None:
    made, text = WITH_PREFIX[name](), "def f(x):\n    return x"
    theirs, ours = saved(made, tmp_path), pretrained_tokenizer(path=tmp_path)
    (tokens,) = ours.encode_prompts("{prompt}", [text])
    assert ours.prefix == PREFIXES[name] and tokens[: len(ours.prefix)] == ours.prefix
    assert tokens == theirs(text)["input_ids"][: len(tokens)]
    assert (tokens == ours.encode([text])[0]) is not bool(ours.prefix), "the control: texts alone have no such token"
    first = "".join(str(ours.backend.id_to_token(number)) for number in ours.prefix)
    assert ours.encode_prompts(f"{first}{{prompt}}", ["a"]) == [
        theirs(f"{first}a", add_special_tokens=False)["input_ids"]
    ]
    assert ours.fingerprint == made.fingerprint


@pytest.mark.parametrize("name", WITH_PREFIX)
@pytest.mark.parametrize("add_bos_token", [True, False])
def test_the_first_token_can_be_chosen_and_is_kept_in_saved_files(
    name: str, add_bos_token: bool, tmp_path: Path
) -> None:
    made, text = WITH_PREFIX[name](), "def f(x):\n    return x"
    begin = made.special_token_names.get("bos_token", "<pad>" if name in ("own",) else "<s>")
    plain = saved(made, tmp_path, bos_token=begin)(text, add_special_tokens=False)["input_ids"]
    ours = pretrained_tokenizer(path=tmp_path, add_bos_token=add_bos_token)
    expected = (made.prefix or [made.backend.token_to_id(begin)]) if add_bos_token else []
    assert ours.encode_prompts("{prompt}", [text]) == [[*expected, *plain]]
    assert ours.character_spans([text]) == made.character_spans([text])
    assert ours.fingerprint == made.fingerprint, "a trained model could not be loaded with the other setting"
    (tmp_path / "saved").mkdir()
    for file, content in tokenizer_files(tmp_path, ours).items():
        (tmp_path / "saved" / file).write_bytes(content)
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert again(text)["input_ids"][: len(expected) + len(plain)] == [*expected, *plain]
    assert pretrained_tokenizer(path=tmp_path / "saved").prefix == expected


def test_a_missing_bos_token_is_reported(tmp_path: Path) -> None:
    saved(own(), tmp_path)
    with pytest.raises(InputError, match=r"add_bos_token=true: the files in .* name no bos_token"):
        pretrained_tokenizer(path=tmp_path, add_bos_token=True)


def test_prompts_of_the_7b_presets_begin_with_the_bos_token(compose: Callable[..., DictConfig], tmp_path: Path) -> None:
    saved(sentencepiece_bpe(), tmp_path, bos_token="<s>")
    for preset, expected in (("experiment=meta_7b/baseline", [2]), ("model=meta_mtp_7b", [])):
        tokenizer = build(compose(preset, f"model.path={tmp_path}").model.tokenizer)
        assert tokenizer.prefix == expected, preset


def test_the_first_token_is_context_and_has_its_own_cache(tmp_path: Path) -> None:
    tokenizer, without = llama_2(), sentencepiece_bpe()
    record = Record(task_id="a", prompt="<s>", solution="a b", decisive=((2, 3),))
    source = FileSource(tokenizer=tokenizer, path=tmp_path, shape="jsonl", template="{prompt}")
    split = build_split("train", [record], source, None, tmp_path)
    batch = collate(split, [0], tokenizer.padding)
    (solution,) = tokenizer.encode([record.solution])
    assert batch.labels[0][batch.labels[0] != IGNORED].tolist() == [*solution, tokenizer.end]
    assert batch.tokens[0].tolist() == [2, *tokenizer.encode(["<s>"])[0], *solution, tokenizer.end]
    decisive, _, response = label_tokens(split, tokenizer)
    assert tokenizer.decode(batch.tokens[0][decisive].tolist()) == "b" and not response[0]
    plain = build_split("train", [record], replace(source, tokenizer=without), None, tmp_path)
    assert plain.samples.tokens.tolist() == split.samples.tokens.tolist()[1:]
