"""Tests of tokenizers: text never becomes a control token, and every text is decoded unchanged."""

from functools import cache

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer

from wmtp.data.records import Record
from wmtp.data.token_cache import tokenize
from wmtp.data.tokenizer import Tokenizer, train_bpe
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


TOKENIZERS = {make.__name__: cache(make) for make in (own, byte_level, sentencepiece_bpe, sentencepiece_unigram)}
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
    backend = TOKENIZERS["own"]().backend
    with pytest.raises(InputError, match=r"model\.tokenizer\.end=Ċ: is a part of ordinary text"):
        Tokenizer(backend, "Ċ")
