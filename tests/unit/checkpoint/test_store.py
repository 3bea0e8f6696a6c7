import json
import shutil
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wmtp.checkpoint import manifest
from wmtp.checkpoint.state import Snapshot, load_model, restore_optimizer, split_optimizer_state
from wmtp.checkpoint.store import CheckpointStore, load
from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError
from wmtp.training.optim import parameter_groups

FORMATS = pytest.mark.parametrize("format_", ["whole", "sharded"])


def snapshot(value: float, **state: Any) -> Snapshot:
    return Snapshot({"w": torch.full((100,), value)}, {"w:exp_avg": torch.ones(100)}, {"value": value, **state})


@FORMATS
def test_saved_state_is_loaded(tmp_path: Path, format_: Any) -> None:
    store = CheckpointStore(tmp_path, format=format_)
    store.save(10, snapshot(1.5))
    loaded = load(store.latest())
    assert torch.equal(loaded.model["w"], torch.full((100,), 1.5)) and loaded.state == {"value": 1.5}
    assert torch.equal(loaded.optimizer["w:exp_avg"], torch.ones(100))
    assert not load(store.latest(), optimizer=False).optimizer
    assert json.loads((tmp_path / "checkpoints/latest.json").read_text())["folder"] == "step_00000010"


@FORMATS
def test_all_types_and_shapes_are_loaded_bit_for_bit(tmp_path: Path, format_: Any) -> None:
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(), "f64": torch.randn(2, dtype=torch.float64), "scalar": torch.tensor(7.0),
        "int": torch.tensor([-(2**62)]), "bool": torch.tensor([True, False]), "empty": torch.empty(0, 4),
        "transposed": torch.randn(3, 4).T, "a view": torch.randn(9)[2:5], "nan": torch.tensor([float("nan")]),
    }  # fmt: skip
    tensors["tied"] = tensors["f64"]
    store = CheckpointStore(tmp_path, format=format_)
    loaded = load(store.save(1, Snapshot(tensors, {}, {}))).model
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded[name].nan_to_num(5), tensor.nan_to_num(5)), name


def test_checkpoint_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, Processes())
    store.save(1, snapshot(1))
    hashed: list[str] = []
    original = manifest.file_hash
    monkeypatch.setattr(manifest, "file_hash", lambda path: hashed.append(path.name) or original(path))
    load(store.latest(), verified=True)
    assert sorted(hashed) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    load(store.latest())
    assert len(hashed) == 9, "the control: without `verified`, the checkpoint is verified again"


@FORMATS
def test_other_users_may_read_a_checkpoint_if_they_may_read_its_folder(tmp_path: Path, format_: Any) -> None:
    tmp_path.chmod(0o755)
    path = CheckpointStore(tmp_path, format=format_).save(1, snapshot(1))
    assert {
        file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir() if file.stat().st_mode & 0o44 != 0o44
    } == {}
    save_file({"x": torch.ones(1)}, path / "control")
    assert (path / "control").stat().st_mode & 0o44 == 0


@pytest.mark.parametrize("owned", [True, False])
def test_read_only_store_changes_no_folder(tmp_path: Path, owned: bool) -> None:
    store = CheckpointStore(tmp_path, Processes() if owned else None)
    first, second = store.save(1, snapshot(1)), store.save(2, snapshot(2))
    (second / "model.safetensors").write_bytes(b"")
    (store.folder / ".staging-step_00000003").mkdir()
    assert store.latest() == first
    remaining = {path.name for path in store.folder.iterdir() if path.is_dir()} - {"step_00000001"}
    assert remaining == ({"damaged-step_00000002"} if owned else {"step_00000002", ".staging-step_00000003"})


@FORMATS
def test_save_removes_files_of_an_interrupted_save(
    tmp_path: Path, format_: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, format=format_)
    for name in (".staging-step_00000001", ".staging-step_00000009", ".removed-step_00000007"):
        (store.folder / name).mkdir(parents=True)
        (store.folder / name / "__7_0.distcp").touch()
    (store.folder / ".best.json.1.tmp").touch()
    path = store.save(1, snapshot(1))
    assert sorted(entry.name for entry in store.folder.iterdir()) == ["latest.json", "step_00000001"]
    assert not (path / "__7_0.distcp").exists()
    assert caplog.text.count("was left by an interrupted save") == 2


class RemovesTheBest(CheckpointStore):
    """A store that selects the checkpoints to remove only by their age."""

    def _superseded(self, best: str | None) -> list[Path]:
        return super()._superseded(None)


class StopsAtAFailedRemoval(CheckpointStore):
    """A store that removes no more checkpoints after one that cannot be removed."""

    def _remove(self, path: Path) -> None:
        if path.exists():
            shutil.rmtree(path)

    def _prune(self) -> None:
        with suppress(OSError):
            super()._prune()


def remaining_steps(store: CheckpointStore, num_steps: int) -> list[int]:
    """Save a checkpoint after each step, of which the second is the best, and return the steps that are kept."""
    for step in range(1, num_steps + 1):
        store.save(step, snapshot(step))
        if step == 2:
            store.mark_best(2, {"val/loss": 0.5})
    return sorted(int(path.name[5:]) for path in store.folder.glob("step_*"))


def test_newest_and_best_are_kept(tmp_path: Path) -> None:
    assert remaining_steps(CheckpointStore(tmp_path, keep_last=2), 5) == [2, 4, 5]
    assert remaining_steps(RemovesTheBest(tmp_path / "control", keep_last=2), 5) == [4, 5]


def test_only_an_existing_checkpoint_is_the_best(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    path = store.save(1, snapshot(1))
    store.mark_best(2, {"val/loss": 0.5})
    assert not (store.folder / "best.json").exists()
    store.mark_best(1, {"val/loss": 0.5})
    assert store.best() == path
    shutil.rmtree(path)
    assert store.best() is None


def test_the_new_folder_of_the_checkpoints_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr("wmtp.checkpoint.store.fsync_path", synced.append)
    store = CheckpointStore(tmp_path)
    store.save(1, snapshot(1))
    store.save(2, snapshot(2))
    assert synced.count(tmp_path) == 1 and synced[0] == tmp_path


@pytest.mark.parametrize("name", ["../outside", "a/b", "manifest.json"])
def test_a_manifest_names_only_other_files_of_its_folder(name: str) -> None:
    files = {"state.json": {"sha256": "0", "bytes": 1}}
    content = {"format": 1, "step": 1, "files": files}
    assert manifest.parse(manifest._add_hash(content)) == files
    with pytest.raises(ValueError, match="names files that a checkpoint cannot have"):
        manifest.parse(manifest._add_hash(content | {"files": {name: files["state.json"]}}))


def test_the_names_of_tensors_must_be_those_of_the_model() -> None:
    model = torch.nn.Linear(2, 1)
    weight, bias = torch.ones(1, 2), model.bias.detach().clone()
    for tensors in ({"weight": weight}, {"weight": weight, "bias": bias, "other": bias}):
        with pytest.raises(RuntimeError, match="bias|other"):
            load_model(model, tensors)
    load_model(model, {"weight": weight}, known=["bias"])
    assert torch.equal(model.weight, weight) and torch.equal(model.bias, bias)


def test_plain_values_of_an_optimizer_are_restored() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer, other = (torch.optim.SGD(model.parameters(), lr=0.1) for _ in range(2))
    optimizer.state[model.bias]["count"] = 3
    tensors, state = split_optimizer_state(model, optimizer)
    restore_optimizer(model, other, tensors, json.loads(json.dumps(state)))
    assert other.state[model.bias]["count"] == 3 and tensors == {}


def test_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    first = store.save(1, snapshot(1))
    second = store.save(2, snapshot(2))
    (second / "model.safetensors").write_bytes(b"")
    assert store.latest() == first
    assert "step_00000002 is damaged" in caplog.text
    (first / "manifest.json").unlink()
    with pytest.raises(InputError, match="no complete checkpoint"):
        store.latest()


def test_failed_removal_is_logged_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = CheckpointStore(tmp_path, Processes(), keep_last=2)
    original = shutil.rmtree

    def fail_once(path: Path, *arguments: Any, **options: Any) -> None:
        if "step_00000003" in str(path):
            raise OSError(16, "Device or resource busy")
        original(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", fail_once)
    assert remaining_steps(store, 7) == [2, 6, 7]
    assert "step_00000003 cannot be removed" in caplog.text and "busy" in caplog.text
    control = StopsAtAFailedRemoval(tmp_path / "control", Processes(), keep_last=2)
    assert remaining_steps(control, 7) == [2, 3, 4, 5, 6, 7]
    assert (store.folder / ".removed-step_00000003").exists()
    monkeypatch.undo()
    store.save(8, snapshot(8))
    remaining = [path.name for path in sorted(store.folder.glob("*step_*"))]
    assert remaining == ["step_00000002", "step_00000007", "step_00000008"]


def test_best_is_kept_if_best_json_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path, Processes(), keep_last=1)
    best = store.save(1, snapshot(1))
    store.mark_best(1, {"val/loss": 0.5})
    (store.folder / "best.json").write_bytes(b"{")
    for step in (2, 3):
        store.save(step, snapshot(step))
    assert best.exists() and store.best() is None
    assert "best.json is damaged" in caplog.text
    store.mark_best(3, {"val/loss": 0.4})
    assert [path.name for path in store.folder.glob("step_*")] == ["step_00000003"]


REFUSED: dict[str, Any] = {
    "a deque": deque([1]),
    "a path": Path("x"),
    "an array": np.zeros(2),
    "a generator of NumPy": np.random.RandomState(0).get_state(legacy=False),
    "a tensor": torch.ones(1),
    "infinity": float("inf"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_state_that_is_not_plain_json_is_an_error(tmp_path: Path, name: str) -> None:
    store = CheckpointStore(tmp_path)
    with pytest.raises((TypeError, ValueError)):
        store.save(1, snapshot(1, bad=REFUSED[name]))
    assert not list(tmp_path.glob("checkpoints/*"))


def test_numpy_numbers_are_loaded_as_plain_numbers(tmp_path: Path) -> None:
    generator = np.random.default_rng(0).bit_generator.state
    loaded = load(CheckpointStore(tmp_path).save(1, snapshot(1, number=np.float64(0.1), generator=generator))).state
    assert type(loaded["number"]) is float and loaded["number"] == 0.1
    assert loaded["generator"] == generator


@pytest.mark.parametrize("bad", [deque([1]), np.float64(1), Path("x"), np.random.RandomState(0).get_state()])
def test_control_torch_saves_such_a_state_but_cannot_load_it(tmp_path: Path, bad: object) -> None:
    torch.save({"bad": bad}, tmp_path / "state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "state.pt", weights_only=True)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam, torch.optim.Adafactor])
def test_optimizers_resume_bit_for_bit(make: Any) -> None:
    def fresh() -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
        options = {"momentum": 0.9} if make is torch.optim.SGD else {}
        return model, make(parameter_groups(model), lr=0.01, **options)

    def train(model: torch.nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            model(torch.full((2, 4), step / 7)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    uninterrupted, uninterrupted_optimizer = fresh()
    train(uninterrupted, uninterrupted_optimizer, range(6))

    first, first_optimizer = fresh()
    train(first, first_optimizer, range(3))
    tensors, state = split_optimizer_state(first, first_optimizer)
    weights = {name: value.clone() for name, value in first.state_dict().items()}
    second, second_optimizer = fresh()
    load_model(second, weights)
    restore_optimizer(second, second_optimizer, tensors, json.loads(json.dumps(state)))
    options, expected = (each.state_dict()["param_groups"] for each in (second_optimizer, first_optimizer))
    assert options == expected, "JSON has no tuples"
    train(second, second_optimizer, range(3, 6))
    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
