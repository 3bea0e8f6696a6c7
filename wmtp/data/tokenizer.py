"""Tokenizers: a small byte-level BPE for the embedded tasks, or one from a tokenizer.json."""

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
from wmtp.runtime.locks import file_lock

PADDING, END = "<pad>", "<end>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TRAINING_TASKS = 1_500
"""Number of tasks on which the tokenizer of the embedded tasks is trained."""
DIFFICULTIES = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}
PROBE = (
    "def naïve(x):\n    return x ** 2 - 10_345.678  # don't  stop\t日本語 🙂\r\n\n\n"
    " CamelCase HTTP2 “½ ﬁ” A\u030a Å \u00a0\u200b 1234567890 "
)
"""Text that tokenizers with the same vocabulary encode differently if they normalize, split or merge differently."""


class Tokenizer:
    """A tokenizer. `end` is the id of the token after a solution, `padding` the id that fills a batch.

    `fingerprint` is a hash of its content (see `content_fingerprint`).

    Raises:
        InputError: the vocabulary does not contain `end` or `padding`.
    """

    def __init__(self, backend: BackendTokenizer, end: str = END, padding: str = PADDING) -> None:
        self.backend = backend
        self.vocab_size: int = 1 + max(backend.get_vocab().values())  # ids may have gaps
        self.end, self.padding = special_token_id(backend, end), special_token_id(backend, padding)
        self.fingerprint = content_fingerprint(backend)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, without special tokens."""
        return [encoding.ids for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]

    def character_spans(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        """Return the range of characters [start, end) of each token of each text."""
        return [encoding.offsets for encoding in self.backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, tokens: list[int]) -> str:
        """Return the text of token ids, without special tokens."""
        text: str = self.backend.decode(tokens, skip_special_tokens=True)
        return text


def special_token_id(backend: BackendTokenizer, token: str) -> int:
    """Return the id of a special token.

    Raises:
        InputError: the tokenizer has no token of that name.
    """
    found = backend.token_to_id(token)
    if found is None:
        raise InputError(
            f"model.tokenizer: there is no special token {token}; set end and padding to tokens that exist"
        )
    return int(found)


def train_bpe(records: list[Record], vocab_size: int) -> BackendTokenizer:
    """Train a byte-level BPE, which can encode every text, on prompts and solutions."""
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
    """Return the tokenizer of the embedded tasks. It depends only on `vocab_size`, and is cached on disk."""
    sources = "".join(inspect.getsource(module) for module in (tasks, task_steps)).encode()
    key = hashlib.sha256(json.dumps([vocab_size, TRAINING_TASKS, DIFFICULTIES]).encode() + sources).hexdigest()
    path = cache_dir / f"tokenizer-{key[:16]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_suffix(".lock")):
        if not path.exists():
            records = tasks.generate("train", TRAINING_TASKS, DIFFICULTIES, noise=0.2, seed=0)
            replace_atomically(path, train_bpe(records, vocab_size).to_str().encode())
    return Tokenizer(BackendTokenizer.from_file(str(path)))


def pretrained_tokenizer(*, path: Path, end: str | None = None, padding: str | None = None) -> Tokenizer:
    """Return the tokenizer of a folder that `save_pretrained` wrote, or of a single tokenizer.json.

    `end` is the token after a solution (default: the folder's eos_token), `padding` the token that fills batches
    (default: the folder's pad_token, else the end token).

    Raises:
        InputError: there is no usable tokenizer.json, or it has no end token.
    """
    file = path if path.is_file() else path / "tokenizer.json"
    if not file.is_file():
        raise InputError(
            f"model.tokenizer.path={path}: there is no tokenizer.json; save one there (a SentencePiece model is "
            "converted by transformers: AutoTokenizer.from_pretrained(…).save_pretrained(…))"
        )
    end = end or _special_token_name(file.parent, "eos_token")
    if end is None:
        raise InputError(
            f"model.tokenizer.end: {file.parent} has no eos_token; set this to the token that ends a solution"
        )
    padding = padding or _special_token_name(file.parent, "pad_token") or end
    return Tokenizer(read_backend(file), end, padding)


def tokenizer_files(folder: Path, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """Return the tokenizer files to save with a model, by name.

    These are the files in `folder` if they contain the same tokenizer (or if `tokenizer` is None), else new files.
    """
    file = folder / TOKENIZER_FILES[0]
    if tokenizer is None or (file.is_file() and content_fingerprint(read_backend(file)) == tokenizer.fingerprint):
        return {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    backend = tokenizer.backend
    special = {"eos_token": backend.id_to_token(tokenizer.end), "pad_token": backend.id_to_token(tokenizer.padding)}
    return {"tokenizer.json": backend.to_str().encode(), "tokenizer_config.json": encode_json(special)}


def _special_token_name(folder: Path, name: str) -> str | None:
    """Return a special token from the files next to a tokenizer.json, or None."""
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
    """Return the tokenizer of a tokenizer.json, without its padding and truncation settings.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        backend = BackendTokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: is not a readable tokenizer.json: {' '.join(str(error).split())}") from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def tokenizer_content(backend: BackendTokenizer) -> dict[str, Any]:
    """Return everything that determines the ids of a text, in a form that does not depend on the tokenizer's file.

    Special tokens around a text, padding and truncation are not included.
    """
    described = json.loads(backend.to_str())
    vocabulary = {number: token for token, number in backend.get_vocab().items()}
    model = described["model"]
    scores = model["vocab"] if isinstance(model.get("vocab"), list) else None  # only unigram models
    return {  # the keys are part of fingerprints stored in checkpoints
        "vocabulary": [[number, vocabulary[number]] for number in sorted(vocabulary)],
        "merges": [m if isinstance(m, str) else " ".join(m) for m in model.get("merges") or []],
        "special tokens": sorted(described["added_tokens"], key=lambda token: token["id"]),
        "normaliser": described["normalizer"],
        "splitting": described["pre_tokenizer"],
        "model": {key: value for key, value in model.items() if key not in ("vocab", "merges")} | {"scores": scores},
        "probe": backend.encode(PROBE, add_special_tokens=False).tokens,
    }


def content_fingerprint(backend: BackendTokenizer) -> str:
    """Return a hash of `tokenizer_content`. Tokenizers with equal hashes give every text the same ids."""
    return hashlib.sha256(json.dumps(tokenizer_content(backend), sort_keys=True).encode()).hexdigest()


def tokenizer_difference(ours: Tokenizer, theirs: BackendTokenizer) -> str | None:
    """Return a description of the first difference between two tokenizers, with their hashes; None if they are equal.

    The comparison covers the token of every id, the merges, the special tokens, the normalizer, and the encoding of
    `PROBE` and of the special tokens.
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
    other, own = (tokenizer_content(backend) for backend in backends)
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
            yield f"it splits text differently: {one!r} where ours has {another!r}"
    for name in ("special tokens", "normaliser", "splitting", "model"):
        if other[name] != own[name]:
            yield f"different {name}: {json.dumps(other[name])[:200]}, ours has {json.dumps(own[name])[:200]}"
