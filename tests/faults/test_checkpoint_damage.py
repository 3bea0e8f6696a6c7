"""Tests of damaged and malicious checkpoints: they are rejected before any file is parsed."""

import ast
import pickle
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from tests.unit.checkpoint.test_store import FORMATS, snapshot
from wmtp.checkpoint import manifest
from wmtp.checkpoint.store import CheckpointStore, find_damage, load
from wmtp.config.schema import CONFIG_FOLDER
from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError

ROOT = CONFIG_FOLDER.parent
TENSORS = {"whole": "model.safetensors", "sharded": "__0_0.distcp"}


def flip_random_bit(content: bytes, random_: random.Random, start: float = 0.0) -> bytes:
    """Return the content with one random bit flipped after a given fraction of it."""
    position = random_.randrange(int(start * len(content)), len(content))
    return content[:position] + bytes([content[position] ^ 1 << random_.randrange(8)]) + content[position + 1 :]


def truncations(content: bytes) -> list[bytes]:
    """Return the content cut off after different fractions, and without its last byte."""
    return [*(content[: int(len(content) * share)] for share in (0, 0.1, 0.5, 0.99)), content[:-1]]


@FORMATS
def test_truncations_and_flipped_bits_are_detected(
    tmp_path: Path, format_: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, format=format_)
    before, path = store.save(1, snapshot(1)), store.save(2, snapshot(2))
    random_ = random.Random(0)
    rejected = 0
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        broken = truncations(whole) + [flip_random_bit(whole, random_) for _ in range(100)]
        for content in broken:
            file.write_bytes(content)
            rejected += find_damage(path) is not None
        caplog.clear()
        assert store.latest() == before
        assert re.search(r"step_00000002 is damaged \(.*\); the previous one is used", caplog.text)
        with pytest.raises(InputError, match="no complete checkpoint"):
            load(path)
        file.write_bytes(whole)
    assert rejected == 105 * len(list(path.iterdir()))
    assert find_damage(path) is None


def read_with_torch(folder: Path) -> torch.Tensor:
    """Return the tensor that torch's own reader loads from a folder."""
    tensors = {"w": torch.empty(100)}
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors["w"]


def test_control_readers_accept_a_flipped_bit(tmp_path: Path) -> None:
    written = torch.linspace(1, 2, 100)
    path = CheckpointStore(tmp_path).save(1, snapshot(0)) / "model.safetensors"
    dcp.save({"w": written}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    torch.save({"w": written}, tmp_path / "model.pt")
    shard = next((tmp_path / "dcp").glob("*.distcp"))
    readers: dict[Path, Callable[[], torch.Tensor]] = {
        path: lambda: load_file(path)["w"],
        shard: lambda: read_with_torch(tmp_path / "dcp"),
        tmp_path / "model.pt": lambda: torch.load(tmp_path / "model.pt", weights_only=True)["w"],
    }
    random_ = random.Random(0)
    for file, read in readers.items():
        good, original = read().clone(), file.read_bytes()
        offset = original.index(good.numpy().tobytes())
        wrong = 0
        for _ in range(40):
            changed = bytearray(original)
            changed[offset + random_.randrange(400)] ^= 1 << random_.randrange(8)
            file.write_bytes(changed)
            wrong += not torch.equal(read(), good)
        assert wrong == 40, file


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def rewrite_manifest(folder: Path) -> None:
    """Replace the manifest of a changed checkpoint by one that matches its files."""
    (folder / "manifest.json").unlink()
    manifest.write(folder, 1, manifest.entries(list(folder.iterdir())))
    assert find_damage(folder) is None


@FORMATS
@pytest.mark.parametrize("with_matching_hash", [False, True])
def test_pickle_instead_of_any_file_is_not_executed(tmp_path: Path, format_: Any, with_matching_hash: bool) -> None:
    marker = tmp_path / "marker"
    files = [path.name for path in CheckpointStore(tmp_path / "dry", format=format_).save(1, snapshot(1)).iterdir()]
    refused = 0
    for name in {*files, ".metadata"} - {"manifest.json"}:
        path = CheckpointStore(tmp_path / name, format=format_).save(1, snapshot(1))
        if name == TENSORS["sharded"] and with_matching_hash:
            torch.save(Payload(marker), path / name)
        else:
            (path / name).write_bytes(pickle.dumps(Payload(marker)))
        if with_matching_hash:
            rewrite_manifest(path)
        try:
            load(path)
        except Exception as error:
            refused += with_matching_hash or isinstance(error, InputError)
        assert not marker.exists(), name
    assert refused == len(files) - 1, "an unknown file is not read"


def test_control_torch_executes_a_pickle_in_its_index_or_without_weights_only(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    dcp.save({"w": torch.ones(100)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    (tmp_path / "dcp" / ".metadata").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(BaseException):  # noqa: B017, PT011 - any error: the code has already run
        read_with_torch(tmp_path / "dcp")
    assert marker.exists()
    marker.unlink()
    torch.save(Payload(marker), tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert marker.exists()


PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def pickle_uses(source: str) -> Iterator[str]:
    """Yield the imports and calls in a program that read or write pickles."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] in PICKLES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in PICKLES:
                yield str(node.module)
            yield from (f"torch.{a.name}" for a in node.names if node.module == "torch" and a.name in ("load", "save"))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in (("torch", "load"), ("torch", "save")):
                yield f"torch.{node.attr}"
        elif isinstance(node, ast.keyword) and ast.unparse(node) in ("weights_only=False", "allow_pickle=True"):
            yield ast.unparse(node)


META_FORMAT = {
    "wmtp/models/meta.py": ["torch.save"],
    "wmtp/models/meta_format.py": ["pickle", "torch.load"],  # an error class, and a `torch.load` of tensors only
}
"""Calls that are allowed: Meta's checkpoints are pickles. Tests of their reader show that it executes no code."""


SANDBOX = {f"wmtp/sandbox/{name}.py": ["marshal"] for name in ("grader", "init", "isolation")}
"""Modules that pass code which wmtp has compiled itself to the processes of the sandbox. They read no checkpoint."""


def test_only_the_reader_of_meta_checkpoints_reads_pickles() -> None:
    sources = sorted((ROOT / "wmtp").glob("**/*.py"))
    assert len(sources) > 50
    found = {path.relative_to(ROOT).as_posix(): list(pickle_uses(path.read_text())) for path in sources}
    assert {path: names for path, names in found.items() if names} == META_FORMAT | SANDBOX
    layout = (ROOT / "wmtp/models/meta_format.py").read_text()
    loads = [n for n in ast.walk(ast.parse(layout)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    assert ["weights_only=True" in [ast.unparse(k) for k in load.keywords] for load in loads] == [True]
    assert "from pickle import UnpicklingError\n" in layout and layout.count("pickle") == 1
    requires = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert requires and (int(requires[1]), int(requires[2])) >= (2, 10), (
        "older versions execute code despite weights_only"
    )


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "import torch\ntorch.load(path)", "from torch import load",
     "read(path, weights_only=False)", "numpy.load(path, allow_pickle=True)", "import os, marshal"],
)  # fmt: skip
def test_control_pickle_reader_is_detected(source: str) -> None:
    assert len(list(pickle_uses(source))) == 1


def test_damaged_checkpoint_is_renamed_by_its_run(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, Processes())
    for step in (1, 2, 3):
        store.save(step, snapshot(step))
    (store.folder / "step_00000003" / "state.json").unlink()
    assert store.latest().name == "step_00000002"
    store.save(3, snapshot(3))
    assert store.latest().name == "step_00000003"
    assert (store.folder / "damaged-step_00000003").exists()
