"""Tests of the comments in conf/ and of the config with comments in `--help`."""

import pytest
from hydra._internal.hydra import Hydra

from tests.conftest import run_command
from wmtp.config.help_text import KEY, annotated, keyed_lines
from wmtp.config.schema import CONFIG_FOLDER

NOT_SETTINGS = (
    "_target_",
    "defaults",
    "hydra",
    "difficulties.",
    "pretrain.model",
    "pretrain.data",
    "tokenizer",
    "lora",
    "arms.",
    "preparations.",
    "space.",
)
"""Beginnings of keys that need no comment, because they are no settings or contain other keys or overrides."""


def test_each_key_of_the_config_files_has_a_comment() -> None:
    comments, missing = set[tuple[str, str]](), set[tuple[str, str]]()
    for path in CONFIG_FOLDER.rglob("*.yaml"):
        group = path.relative_to(CONFIG_FOLDER).parts[0]
        if group in ("experiment", "command.yaml") or path.parent.name == "arms":
            continue
        for line, key in keyed_lines(path.read_text()):
            found = KEY.fullmatch(line)
            if key is None or found is None or line.endswith(":"):
                continue
            (comments if found[3] else missing).add((group, key))
    undocumented = {
        (group, key) for group, key in missing - comments if key != group and not key.startswith(NOT_SETTINGS)
    }
    assert {(group, key) for group, key in undocumented if not key.endswith("._target_")} == set()
    assert len(comments) > 100


def test_keys_are_dotted_and_long_comments_are_wrapped() -> None:
    text = 'a: 1  # one\nb:\n  c: "# {x}"   # two\n  d: [1]\ne: null'
    assert [key for _, key in keyed_lines(text)] == ["a", "b", "b.c", "b.d", "e"]
    assert (
        annotated("key: 1", "words " * 20)[0]
        == "key: 1" + " " * 22 + "# words words words words words words words words"
    )
    lines = annotated("key: 1", "words " * 20)
    assert len(lines) == 3 and all(len(line) <= 80 and line[28:30] == "# " for line in lines)
    assert annotated("key: 1", "") == ["key: 1"]


def test_help_lists_no_groups_that_it_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lists of Hydra take half of the time of `--help`. The control is Hydra's own help, which shows them."""
    listed = list[object]()
    monkeypatch.setattr(Hydra, "list_all_config_groups", lambda hydra, *parent: listed.append(hydra) or [])
    assert run_command(["--help"], monkeypatch) == 0 and not listed
    assert run_command(["--hydra-help"], monkeypatch) == 0 and listed
