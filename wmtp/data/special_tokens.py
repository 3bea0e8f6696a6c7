"""The special tokens of a tokenizer: their ids, those that begin a text, and a copy that does not find them in text."""

import json
import re
import secrets
from collections.abc import Collection
from itertools import takewhile

from tokenizers import Tokenizer as BackendTokenizer

from wmtp.errors import InputError

SINGLE_CHARACTER = re.compile(r".|<0x[0-9A-F]{2}>", re.DOTALL)
"""Names of tokens that consist of one character or one byte."""


def rename_control_tokens(
    backend: BackendTokenizer, other_ids: Collection[int]
) -> tuple[BackendTokenizer, dict[str, str]]:
    """Return a copy of a tokenizer whose control tokens have random names, and the new name of each control token.

    The control tokens are the special tokens of the tokenizer, and the added tokens with the given ids. All ids stay
    the same. No text contains the random names, so the copy encodes the original names like any other characters. A
    token without which these characters cannot be encoded, such as the padding token `!` of some models, is text.
    """
    described = json.loads(backend.to_str())
    model, added = described["model"], described["added_tokens"]
    pieces = model["vocab"] if isinstance(model["vocab"], dict) else {token for token, _ in model["vocab"]}
    control = []
    for token in added:
        is_needed = token["content"] in pieces and SINGLE_CHARACTER.fullmatch(token["content"]) is not None
        token["special"] = not is_needed and (token["special"] or token["id"] in other_ids)
        control += [token] if token["special"] else []
    names = {token["content"]: secrets.token_hex(16) for token in control}
    for token in control:
        token["content"] = names[token["content"]]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(token, token): number for token, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if "merges" in model:  # without the merges that create a control token
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
        model["merges"] = [
            (first, second)
            for first, second in pairs
            if not (first in names or second in names or first + second.removeprefix(prefix) in names)
        ]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return BackendTokenizer.from_str(json.dumps(described)), names


def prefix_ids(backend: BackendTokenizer) -> list[int]:
    """Return the ids of the tokens that a tokenizer puts before each text."""
    encoding = backend.encode("a")
    pairs = zip(encoding.ids, encoding.special_tokens_mask, strict=True)
    return [number for number, _ in takewhile(lambda pair: pair[1], pairs)]


def with_prefix(backend: BackendTokenizer, name: str | None) -> BackendTokenizer:
    """Return a copy of a tokenizer that adds to each text only the token `name` before it, or nothing if it is None."""
    described = json.loads(backend.to_str())
    processor = described["post_processor"] or {"type": "Sequence", "processors": []}
    parts = processor["processors"] if processor["type"] == "Sequence" else [processor]
    parts = [part for part in parts if part["type"] == "ByteLevel"]  # determines only the ranges of characters
    if name is not None:
        text, second_text = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
        single = [{"SpecialToken": {"id": name, "type_id": 0}}, text]
        ids = {"id": name, "ids": [special_token_id(backend, name)], "tokens": [name]}
        template = {"single": single, "pair": [*single, second_text], "special_tokens": {name: ids}}
        parts.append({"type": "TemplateProcessing", **template})
    described["post_processor"] = {"type": "Sequence", "processors": parts} if parts else None
    return BackendTokenizer.from_str(json.dumps(described))


def special_token_id(backend: BackendTokenizer, token: str) -> int:
    """Return the id of the special token with the name `token`.

    Raises:
        InputError: the tokenizer has no token of this name.
    """
    found = backend.token_to_id(token)
    if found is None:
        raise InputError(
            f"model.tokenizer: there is no special token {token}; set end and padding to tokens that exist"
        )
    return int(found)
