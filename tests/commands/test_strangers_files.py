"""Tests of what the files of a stranger may not do: those of a run, of a model, of a tokenizer, and of a data set.

docs/security.md has the rules. Each test has a control, which shows that the attack works otherwise, or that what users
do is still possible.
"""

import gzip
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rich.console
from transformers import LlamaConfig

from tests.commands.test_strangers import EARLIER
from wmtp.checkpoint import manifest
from wmtp.data import strict_json
from wmtp.data.tokenizer import Tokenizer, tokenizer_files
from wmtp.errors import InputError
from wmtp.models.huggingface import export as hf_export
from wmtp.models.huggingface.folder import read_model_config
from wmtp.models.loading import read_run_config
from wmtp.runtime import destinations
from wmtp.runtime.console import Console, TerminalText
from wmtp.runtime.destinations import remember_destinations
from wmtp.sync import main as sync
from wmtp.tracking.mlflow import end_sweep, send_pending, tracker
from wmtp.tracking.mlflow.artifacts import read_best
from wmtp.tracking.mlflow.sweep_run import describe_jobs

EVIL = "http://127.0.0.1:9"
SECRET = "a secret of the user"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a writable run. The user has not sent data anywhere before."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(destinations, "_used_by_this_process", set())  # other tests use the same server
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(EARLIER, tmp_path / "run")


def use_server(run: Path, uri: str) -> None:
    """Write an mlflow.json that names a server."""
    (run / "mlflow.json").write_text(json.dumps({"run_id": "a", "uri": uri, "experiment": "wmtp"}))


def record(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[tuple[Any, ...]]:
    """Replace a class in a module, and return the list of the arguments of its calls."""
    calls: list[tuple[Any, ...]] = []

    class Recorded:
        """Takes the place of the class."""

        report = ""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            calls.append(arguments)

        def close(self, state: Any) -> None:
            """Do nothing."""

    monkeypatch.setattr(module, name, Recorded)
    return calls


def test_an_evaluation_sends_nothing_to_a_server_that_only_the_folder_names(
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_server(run, EVIL)
    calls = record(monkeypatch, tracker, "MlflowTracker")
    assert send_pending(run) is None and end_sweep(run, "KILLED") is None and not calls
    remember_destinations([EVIL])
    send_pending(run)
    assert len(calls) == 1, "control: a server that the user has used is used again"


def test_sync_locks_nothing_outside_of_the_folder(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text(SECRET)
    (run / ".hydra" / "lock").unlink(missing_ok=True)
    (run / ".hydra" / "lock").symlink_to(file)
    (run / "status.json").write_text(json.dumps({"state": "RUNNING"}))
    assert sync([str(run)]) == 2 and file.read_text() == SECRET


@pytest.mark.parametrize("name", ["/other", "../../other", "..", 5])
def test_the_best_checkpoint_is_in_the_folder(name: Any, run: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / manifest.NAME).touch()
    (tmp_path / manifest.NAME).touch()
    best = run / "checkpoints" / "best.json"
    best.write_text(json.dumps({"folder": str(tmp_path / "other") if name == "/other" else name, "step": 6}))
    assert read_best(run) is None
    best.write_text(json.dumps({"folder": "step_00000006", "step": 6}))
    assert read_best(run) is not None


@pytest.fixture
def folder(tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """Return the folder of a model of transformers, without weights, and a file with a secret beside it."""
    folder = tmp_path / "folder"
    LlamaConfig(vocab_size=tokenizer.vocab_size).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str())
    (tmp_path / "secret").write_text(SECRET)
    return folder


def test_a_secret_behind_a_link_is_not_copied(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = folder / "chat_template.jinja"
    template.symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=r"chat_template\.jinja: is a link to .*secret, out of its folder"):
        tokenizer_files(folder, tokenizer)
    assert template.read_text() == SECRET, "control: the link leads to the secret"
    template.unlink()
    (folder / "generation_config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="is a link to"):
        hf_export.write_generation_config(tokenizer, folder, tmp_path)


def test_the_links_of_a_cache_of_hugging_face_are_followed(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(folder, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert tokenizer_files(snapshot, tokenizer)["tokenizer.json"] == (folder / "tokenizer.json").read_bytes()
    (snapshot / "chat_template.jinja").symlink_to("../../../secret")
    with pytest.raises(InputError, match="is a link to"):
        tokenizer_files(snapshot, tokenizer)


def test_a_model_cannot_name_other_models_or_code(folder: Path) -> None:
    assert read_model_config("model.path", folder, weights=False)._attn_implementation is None
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "stranger/kernel"}))
    assert LlamaConfig.from_pretrained(folder)._attn_implementation == "stranger/kernel", "control"
    assert read_model_config("model.path", folder, weights=False)._attn_implementation is None
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../private/model.safetensors"}}))
    with pytest.raises(InputError, match="names files outside the folder"):
        read_model_config("model.path", folder)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    read_model_config("model.path", folder)
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/private"}))
    with pytest.raises(InputError, match=r"has an adapter_config\.json, which names other models and code"):
        read_model_config("model.path", folder)


def test_an_exported_tokenizer_runs_no_code_and_asks_no_question(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"auto_map": {"AutoTokenizer": [None, "stranger/code--code.Code"]}, "tokenizer_class": "Code"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("a question about the code was asked"))
    (note,) = hf_export.tokenizer_notes(tokenizer, folder)
    assert "AutoTokenizer cannot read tokenizer.json" in note


def test_a_small_compressed_file_cannot_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strict_json, "MIN_UNPACKED", 2**20)
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": "' + b"0" * 2**22 + b'"}\n'))
    with pytest.raises(InputError, match="contains more than 1,048,576 bytes; decompress it"):
        list(strict_json.decode_rows(path))
    monkeypatch.setattr(strict_json, "MIN_UNPACKED", 2**23)
    assert len(list(strict_json.decode_rows(path))) == 1, "control: the file itself is valid"


class Terminal(io.BytesIO):
    """A file that says that it is a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


ATTACK = "\x1b]52;c;aGk=\x07a\x9b2J\rb\tc\n"
"""A text that writes to the clipboard, clears the screen and overwrites its line."""


def show_with_print(stream: Any) -> None:
    """Print the text."""
    print(ATTACK, file=stream)


def show_with_rich(console: Callable[..., rich.console.Console]) -> Callable[[Any], None]:
    """Return a function that shows the text in a table."""

    def _show(stream: Any) -> None:
        """Show the text in a table."""
        table = rich.table.Table("name")
        table.add_row(ATTACK)
        shown = console(file=stream.rich_proxied_file, force_terminal=True, color_system="standard", width=200)
        shown.print(table)

    return _show


@pytest.mark.parametrize("show", [show_with_print, show_with_rich(Console)])
def test_a_text_cannot_control_the_terminal(show: Callable[[Any], None]) -> None:
    file = Terminal()
    stream = TerminalText(file, "utf-8")
    show(stream)
    stream.flush()
    shown = file.getvalue().decode()
    assert r"\x1b]52;c;aGk=" in shown and "\x1b]" not in shown
    assert "\x9b" not in shown and "\r" not in shown


def test_control_rich_itself_shows_escape_sequences() -> None:
    file = Terminal()
    stream = TerminalText(file, "utf-8")
    show_with_rich(rich.console.Console)(stream)
    stream.flush()
    assert b"\x1b]52" in file.getvalue()


def test_a_command_shows_no_escape_sequences_on_a_terminal() -> None:
    script = (
        f"from wmtp.runtime.standard_streams import lasting_streams\nwith lasting_streams():\n    print({ATTACK!r})"
    )
    assert "\x1b" not in shown_on_terminal(script) and r"\x1b]52;c;" in shown_on_terminal(script)
    assert "\x1b" in shown_on_terminal(f"print({ATTACK!r})"), "control"


def shown_on_terminal(script: str) -> str:
    """Return what a script shows on a terminal."""
    import pty
    import subprocess
    import sys

    reading, writing = pty.openpty()
    subprocess.run([sys.executable, "-c", script], stdout=writing, check=True)
    os.close(writing)
    return os.read(reading, 10_000).decode()


def test_the_description_of_a_sweep_contains_no_images_and_links() -> None:
    text = "++run_name='![x](http://stranger/a.png) <img src=x> `'"
    jobs = [{"number": 0, "overrides": [text], "state": "FINISHED", "result": {}}]
    row = describe_jobs(jobs).splitlines()[2]
    assert row.startswith("| 0 | `run_name='![x](http://stranger/a.png) <img src=x> ''` | `FINISHED` |")
    assert row.count("`") == 4


@pytest.mark.parametrize(("name", "content"), [(".hydra/hydra.yaml", "{a: ["), ("config.yaml", "5")])
def test_a_damaged_file_of_a_run_is_an_input_error(name: str, content: str, run: Path) -> None:
    read_run_config(run / "config.yaml")
    (run / name).write_text(content)
    with pytest.raises(InputError, match=re.escape(name)):
        read_run_config(run / "config.yaml")


def test_a_deeply_nested_manifest_is_damaged(run: Path) -> None:
    checkpoint = run / "checkpoints" / "step_00000006"
    assert manifest.find_damage(checkpoint) is None
    (checkpoint / manifest.NAME).write_text("[" * 50_000)
    assert "manifest.json is damaged: RecursionError" in str(manifest.find_damage(checkpoint))
