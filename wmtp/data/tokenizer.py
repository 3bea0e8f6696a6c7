"""Tokenizers. The generated tasks have a small byte-level BPE; other tokenizers are read from a tokenizer.json."""

import hashlib
import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import Field
from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from wmtp.data import task_noise, task_steps, tasks
from wmtp.data.records import Record
from wmtp.data.special_tokens import prefix_ids, rename_control_tokens, special_token_id, with_prefix
from wmtp.errors import InputError
from wmtp.field_types import InputPath
from wmtp.runtime.atomic_files import encode_json, replace_atomically
from wmtp.runtime.locks import file_lock
from wmtp.runtime.untrusted_files import read_own_file

log = logging.getLogger(__name__)

PADDING, END = "<pad>", "<end>"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
TRAINING_TASKS = 1_500
"""The number of tasks on which the tokenizer of the generated tasks is trained."""
DIFFICULTIES = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0}
PROBE = (
    "def naïve(x):\n    return x ** 2 - 10_345.678  # don't  stop\t日本語 🙂\r\n\n\n"
    " CamelCase HTTP2 “½ ﬁ” A\u030a Å \u00a0\u200b 1234567890 "
)
"""A text for the comparison of tokenizers.

Tokenizers with the same vocabulary encode it differently if they normalize, split or merge text differently.
"""


class Tokenizer:
    """A tokenizer with an end token and a padding token.

    The attribute `end` is the id of the token that follows a solution. The attribute `padding` is the id of the token
    that fills the rows of a batch. `prefix` contains the ids of the tokens with which every prompt begins, such as
    `<s>`; it is empty if the tokenizer puts no tokens before a text. `fingerprint` is the hash that
    `content_fingerprint` returns.

    The end token, the padding token and all other special tokens are control tokens. Text never becomes a control
    token: if it contains the name of one, such as `<end>`, the name is encoded like any other characters. Only the
    template of a prompt can name control tokens.

    Raises:
        InputError: the vocabulary does not contain the padding token, or the end token is not a special token.
    """

    def __init__(self, backend: BackendTokenizer, end: str = END, padding: str = PADDING) -> None:
        self.backend = backend
        self.vocab_size: int = 1 + max(backend.get_vocab().values())  # ids may have gaps
        self.end, self.padding = special_token_id(backend, end), special_token_id(backend, padding)
        self.prefix = prefix_ids(backend)
        self.fingerprint = content_fingerprint(backend)
        self._text_backend, self._control_names = rename_control_tokens(backend, {self.end, self.padding, *self.prefix})
        if end not in self._control_names:
            raise InputError(f"model.tokenizer.end={end}: is a part of ordinary text; set this to a special token")

    @property
    def special_token_names(self) -> dict[str, str]:
        """The names of the special tokens in use, under their keys in a tokenizer_config.json."""
        ids = {"eos_token": self.end, "pad_token": self.padding}
        if len(self.prefix) == 1:
            ids["bos_token"] = self.prefix[0]
        return {key: str(self.backend.id_to_token(number)) for key, number in ids.items()}

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of each text. They include no control tokens."""
        return [encoding.ids for encoding in self._text_backend.encode_batch(texts, add_special_tokens=False)]

    def encode_prompts(self, template: str, prompts: Sequence[str]) -> list[list[int]]:
        """Insert each prompt into the template in place of `{prompt}`, and return the token ids of the results.

        Names of control tokens in the template become control tokens. In the prompts, they are text. The result begins
        with `prefix`, which is not added if the template already begins with it.
        """
        longest_first = map(re.escape, sorted(self._control_names, key=len, reverse=True))
        template = re.sub("|".join(longest_first), lambda match: self._control_names[match[0]], template)
        encoded = self.encode([template.replace("{prompt}", prompt) for prompt in prompts])
        size = len(self.prefix)
        return [tokens if tokens[:size] == self.prefix else [*self.prefix, *tokens] for tokens in encoded]

    def character_spans(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        """For each text, return the range of characters [start, end) of each of its tokens."""
        return [encoding.offsets for encoding in self._text_backend.encode_batch(texts, add_special_tokens=False)]

    def decode(self, tokens: list[int]) -> str:
        """Return the text that the token ids encode. Control tokens are left out."""
        text: str = self._text_backend.decode(tokens, skip_special_tokens=True)
        return text


def train_bpe(records: list[Record], vocab_size: int) -> BackendTokenizer:
    """Train a byte-level BPE tokenizer on the prompts and solutions of records. It can encode every text."""
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
    """Return the tokenizer of the generated tasks. It is trained once, and then read from the cache on disk.

    The tokenizer depends only on `vocab_size` and on the source code of the tasks.
    """
    sources = "".join(inspect.getsource(module) for module in (tasks, task_noise, task_steps)).encode()
    key = hashlib.sha256(json.dumps([vocab_size, TRAINING_TASKS, DIFFICULTIES]).encode() + sources).hexdigest()
    path = cache_dir / f"tokenizer-{key[:16]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(path.with_suffix(".lock")):
        if not path.exists():
            records = tasks.generate("train", TRAINING_TASKS, DIFFICULTIES, noise=0.2, seed=0)
            replace_atomically(path, train_bpe(records, vocab_size).to_str().encode())
    return Tokenizer(BackendTokenizer.from_file(str(path)))


def pretrained_tokenizer(
    *, path: InputPath, end: str | None = None, padding: str | None = None, add_bos_token: bool | None = None
) -> Tokenizer:
    """Return the tokenizer from a folder that `save_pretrained` wrote, or from a single tokenizer.json.

    `end` is the token that follows a solution. Its default is the eos_token of the folder. `padding` is the token that
    fills batches. Its default is the pad_token of the folder, or the end token if the folder has no pad_token. If
    `add_bos_token` is None, prompts begin with the tokens that the tokenizer itself puts before a text. If it is true,
    they begin with these tokens, or with the bos_token of the folder if there are none. If it is false, they begin with
    no such token.

    Raises:
        InputError: there is no usable tokenizer.json, or a special token is needed that neither the arguments nor the
            folder name.
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
    backend = read_backend(file)
    if add_bos_token is not None and add_bos_token != bool(prefix_ids(backend)):
        beginning = _special_token_name(file.parent, "bos_token") if add_bos_token else None
        if add_bos_token and beginning is None:
            raise InputError(f"model.tokenizer.add_bos_token=true: the files in {file.parent} name no bos_token")
        backend = with_prefix(backend, beginning)
    return Tokenizer(backend, end, padding)


def tokenizer_files(folder: Path | None, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """Return the tokenizer files to save with a model. The keys are file names, and the values are contents.

    If `folder` contains the same tokenizer, or if `tokenizer` is None, the files in `folder` are returned. They are
    changed only if they do not name the special tokens in use, or if they begin a text with other tokens. Otherwise,
    new files are made, with which transformers encodes the names of special tokens in a text as text.
    """
    vocabulary, settings, names = TOKENIZER_FILES[:3]
    paths = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()] if folder is not None else []
    files = {path.name: read_own_file(path) for path in paths}
    if tokenizer is None:
        return files
    stored = read_backend(folder / vocabulary) if folder is not None and vocabulary in files else None
    changes: dict[str, Any] = dict(tokenizer.special_token_names)
    if folder is None or stored is None or content_fingerprint(stored) != tokenizer.fingerprint:
        files = {vocabulary: tokenizer.backend.to_str().encode()}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
    else:
        config = _read_settings(folder / settings, {"tokenizer_class": "PreTrainedTokenizerFast"})
        named = _read_settings(folder / names) | config
        changes = {key: name for key, name in changes.items() if named.get(key) is None}
        if prefix_ids(stored) != tokenizer.prefix:
            files[vocabulary] = tokenizer.backend.to_str().encode()
            changes["add_bos_token"] = bool(tokenizer.prefix)  # read by versions of transformers before 5
    return files | ({settings: encode_json(config | changes)} if changes else {})


def _special_token_name(folder: Path, name: str) -> str | None:
    """Return the token that the files in `folder` define as `name` (for example, eos_token), or None."""
    for file in (folder / "tokenizer_config.json", folder / "special_tokens_map.json"):
        if (named := _read_settings(file).get(name)) is not None:
            return str(named["content"] if isinstance(named, dict) else named)
    return None


def _read_settings(path: Path, default: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """Return the object in a JSON file, or `default` if there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig")) if path.is_file() else dict(default)
    except ValueError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: cannot be read: it contains no object")
    return content


def read_backend(path: Path) -> BackendTokenizer:
    """Read a tokenizer from a tokenizer.json, and disable its padding and its truncation.

    Raises:
        InputError: the file cannot be read.
    """
    try:
        backend = BackendTokenizer.from_str(path.read_text(encoding="utf-8-sig"))
    except Exception as error:  # the library raises plain Exception
        raise InputError(f"{path}: is not a readable tokenizer.json: {' '.join(str(error).split())}") from error
    backend.no_padding()
    backend.no_truncation()
    return backend


def tokenizer_content(backend: BackendTokenizer) -> dict[str, Any]:
    """Return all properties of a tokenizer that determine the ids of a text.

    The result does not depend on the layout of the tokenizer.json. It does not include settings for padding, for
    truncation or for special tokens around a text.
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
    """Return a description of the first difference between two tokenizers, or None if they are equal.

    The description contains the hashes of both tokenizers. The comparison covers the token of every id, the merges, the
    special tokens, the normalizer, and the encoding of `PROBE` and of the special tokens. If they are equal but put
    different tokens before a text, a warning is logged.
    """
    difference = next(_differences(ours, theirs), None)
    if difference is None:
        if (prefix := prefix_ids(theirs)) != ours.prefix:
            first, expected = ([ours.backend.id_to_token(number) for number in ids] for ids in (ours.prefix, prefix))
            problem = "the samples begin with %s, but the tokenizer of another model of the run begins a text with %s"
            log.warning(f"{problem}; to change the samples, set model.tokenizer.add_bos_token", first, expected)
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
