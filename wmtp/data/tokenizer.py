"""Tokenizers: the small byte-level BPE of the embedded tasks, or one from a tokenizer.json."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from wmtp.data import task_steps, tasks
from wmtp.data.records import Record
from wmtp.errors import InputError
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.locks import one_at_a_time

PADDING, END = "<pad>", "<end>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TRAINING_TASKS = 1_500
DIFFICULTIES = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}
PROBE = (
    "def naïve(x):\n    return x ** 2 - 10_345.678  # don't  stop\t日本語 🙂\r\n\n\n"
    " CamelCase HTTP2 “½ ﬁ” A\u030a Å \u00a0\u200b 1234567890 "
)
"""Text on which tokenizers with one vocabulary differ if they normalise, split or merge differently."""


class Tokenizer:
    """Text to token ids and back. `end` closes a solution; `padding` fills a batch."""

    def __init__(self, backend: BackendTokenizer, end: str = END, padding: str = PADDING) -> None:
        self.backend = backend
        self.vocab_size: int = 1 + max(backend.get_vocab().values())  # ids may have gaps
        self.end, self.padding = special_id(backend, end), special_id(backend, padding)
        self.fingerprint = content_fingerprint(backend)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens."""
        return [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]

    def character_spans(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        """The characters [start, end) that each token of each text stands for."""
        return [encoding.offsets for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, tokens: list[int]) -> str:
        """The text of some ids; special tokens are left out."""
        text: str = self.backend.decode(tokens, skip_special_tokens=True)
        return text


def special_id(backend: BackendTokenizer, token: str) -> int:
    """The id of a special token.

    Raises:
        InputError: the tokenizer has none of that name.
    """
    found = backend.token_to_id(token)
    if found is None:
        raise InputError(f"model.tokenizer: there is no special token {token}; name those it has as end and padding")
    return int(found)


def train_byte_pairs(records: list[Record], vocab_size: int) -> BackendTokenizer:
    """A byte-level BPE learned from prompts and solutions: every text can be encoded."""
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PADDING, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator((text for r in records for text in (r.prompt, r.solution)), trainer)
    return backend


def task_tokenizer(cache_dir: Path, *, vocab_size: Annotated[int, Field(ge=258)] = 512) -> Tokenizer:
    """The tokenizer of the embedded tasks: always the same for one `vocab_size`, kept on disk."""
    sources = "".join(inspect.getsource(module) for module in (tasks, task_steps)).encode()
    key = hashlib.sha256(json.dumps([vocab_size, TRAINING_TASKS, DIFFICULTIES]).encode() + sources).hexdigest()
    path = cache_dir / f"tokenizer-{key[:16]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(path.with_suffix(".lock")):
        if not path.exists():
            records = tasks.generate("train", TRAINING_TASKS, DIFFICULTIES, noise=0.2, seed=0)
            replace_atomically(path, train_byte_pairs(records, vocab_size).to_str().encode())
    return Tokenizer(BackendTokenizer.from_file(str(path)))


def pretrained_tokenizer(*, path: Path, end: str | None = None, padding: str | None = None) -> Tokenizer:
    """The tokenizer of a folder that `save_pretrained` wrote, or of a tokenizer.json by itself.

    `end` closes a solution (None: what the folder calls eos_token), `padding` fills batches (None: its pad_token,
    else the end token).

    Raises:
        InputError: there is no usable tokenizer.json, or no end token is named.
    """
    file = path if path.is_file() else path / "tokenizer.json"
    if not file.is_file():
        raise InputError(
            f"model.tokenizer.path={path}: there is no tokenizer.json; save one there (a SentencePiece model is "
            "converted by transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…))"
        )
    end = end or _named_token(file.parent, "eos_token")
    if end is None:
        raise InputError(f"model.tokenizer.end: {file.parent} names no eos_token; name the token that ends a solution")
    padding = padding or _named_token(file.parent, "pad_token") or end
    return Tokenizer(read_backend(file), end, padding)


def kept_tokenizer(folder: Path, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """The files of a model's tokenizer: those of its folder, or its own where the folder has another or none."""
    there = folder / TOKENIZER_FILES[0]
    if tokenizer is None or (there.is_file() and content_fingerprint(read_backend(there)) == tokenizer.fingerprint):
        return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    backend = tokenizer.backend
    special = {"eos_token": backend.id_to_token(tokenizer.end), "pad_token": backend.id_to_token(tokenizer.padding)}
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": encode_json(special)}


def _named_token(folder: Path, name: str) -> str | None:
    """A special token that the files beside a tokenizer.json name."""
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if not file.is_file():
            continue
        try:
            named = json.loads(file.read_text(encoding="utf-8")).get(name)
        except (ValueError, AttributeError) as error:
            raise InputError(f"{file}: cannot be read: {error}") from error
        if named is not None:
            return str(named["content"] if isinstance(named, dict) else named)
    return None


def read_backend(path: Path) -> BackendTokenizer:
    """What a tokenizer.json describes, without the padding and truncation that some ask for.

    Raises:
        InputError: it cannot be read.
    """
    try:
        backend = BackendTokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises no class of its own
        raise InputError(f"{path}: is no tokenizer.json that can be read: {' '.join(str(error).split())}") from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def content(backend: BackendTokenizer) -> dict[str, Any]:
    """Everything that decides which ids a text becomes, however the tokenizer was made and stored.

    What it adds around a text, pads with or truncates to is left aside.
    """
    described = json.loads(backend.to_str())
    vocabulary = {number: token for token, number in backend.get_vocab().items()}
    model = described["model"]
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else None  # of a unigram model
    return {
        "vocabulary": [[number, vocabulary[number]] for number in sorted(vocabulary)],
        "merges": [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []],
        "special tokens": sorted(described["added_tokens"], key=lambda token: token["id"]),
        "normaliser": described["normalizer"],
        "splitting": described["pre_tokenizer"],
        "model": {key: value for key, value in model.items() if key not in ("vocab", "merges")} | {"scores": scores},
        "probe": backend.encode(PROBE, add_special_tokens=False).tokens,
    }


def content_fingerprint(backend: BackendTokenizer) -> str:
    """A hash of a tokenizer's content: equal for tokenizers that give every text the same ids."""
    return hashlib.sha256(json.dumps(content(backend), sort_keys=True).encode()).hexdigest()


def tokenizer_difference(ours: Tokenizer, theirs: BackendTokenizer) -> str | None:
    """Where another tokenizer gives other ids than ours, with a hash of each; None if it is the same.

    Compared are the token of every id, merges, special tokens, the normaliser, and how `PROBE` and the special
    tokens are split.
    """
    difference = next(_differences(ours, theirs), None)
    if difference is None:
        return None
    other = content_fingerprint(theirs)
    return f"{difference} (theirs is {other[:16]}…, ours {ours.fingerprint[:16]}…)"


def _differences(ours: Tokenizer, theirs: BackendTokenizer) -> Iterator[str]:
    backends = theirs, ours.backend
    sizes = [backend.get_vocab_size() for backend in backends]
    if sizes[0] != sizes[1]:
        yield f"it has {sizes[0]} tokens, ours has {sizes[1]}"
    other, own = (content(backend) for backend in backends)
    tokens = [dict(part["vocabulary"]) for part in (other, own)]
    for number in sorted(tokens[0].keys() | tokens[1].keys()):
        if tokens[0].get(number) != tokens[1].get(number):
            yield f"token {number} is {tokens[0].get(number)!r}, in ours it is {tokens[1].get(number)!r}"
    for number, (one, another) in enumerate(zip_longest(other["merges"], own["merges"])):
        if one != another:
            yield f"merge {number} is {one!r}, in ours it is {another!r}"
    text = PROBE + "".join(str(ours.backend.id_to_token(number)) for number in (ours.padding, ours.end))
    pieces = [backend.encode(text, add_special_tokens=False).tokens for backend in backends]
    for one, another in zip_longest(*pieces):
        if one != another:
            yield f"it splits text otherwise: {one!r} where ours has {another!r}"
    for name in ("special tokens", "normaliser", "splitting", "model"):
        if other[name] != own[name]:
            yield f"it has other {name}: {json.dumps(other[name])[:200]}, ours has {json.dumps(own[name])[:200]}"
