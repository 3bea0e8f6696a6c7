import json
import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wmtp.checkpoint.state import Snapshot, load_model, restore_optimizer, split_optimizer_state
from wmtp.checkpoint.store import CheckpointStore, damage, load
from wmtp.errors import InputError
from wmtp.optimization import parameter_groups

PCG64 = np.random.default_rng(0).bit_generator.state["state"]


def snapshot(value: float, **state: Any) -> Snapshot:
    return Snapshot({"w": torch.full((100,), value)}, {"w:exp_avg": torch.ones(100)}, {"value": value, **state})


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(10, snapshot(1.5))
    loaded = load(store.latest())
    assert torch.equal(loaded.model["w"], torch.full((100,), 1.5)) and loaded.state == {"value": 1.5}
    assert json.loads((tmp_path / "checkpoints/latest.json").read_text())["folder"] == "step_00000010"


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (1, 2, 3, 4, 5):
        store.save(step, snapshot(step))
        if step == 2:
            store.mark_best(2, 0.5)
    assert [path.name for path in sorted(store.folder.glob("step_*"))] == [f"step_0000000{n}" for n in (2, 4, 5)]


def test_every_damage_is_found_before_anything_is_parsed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=9)
    store.save(1, snapshot(1))
    path = store.save(2, snapshot(2))
    random_ = random.Random(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        cuts = [whole[: int(len(whole) * share)] for share in (0, 0.1, 0.5, 0.99)] + [whole[:-1]]
        flips = []
        for _ in range(25):
            position, bit = random_.randrange(len(whole)), random_.randrange(8)
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            flips.append(bytes(flipped))
        for broken in cuts + flips:
            file.write_bytes(broken)
            assert damage(path) is not None, f"{file.name} of {len(broken)} bytes"
        file.write_bytes(whole)
    assert damage(path) is None


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = CheckpointStore(tmp_path)
    first = store.save(1, snapshot(1))
    second = store.save(2, snapshot(2))
    (second / "model.safetensors").write_bytes(b"")
    assert store.latest() == first
    assert "step_00000002 is damaged" in caplog.text
    (first / "manifest.json").unlink()
    with pytest.raises(InputError, match="no whole checkpoint"):
        store.latest()


@pytest.mark.parametrize("phase", ["_save_tensors", "write_synced", "sync_folder", "Path.rename"])
def test_a_save_that_breaks_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str) -> None:
    store = CheckpointStore(tmp_path)
    first = store.save(1, snapshot(1))

    def broken(*arguments: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(f"wmtp.checkpoint.store.{phase}", broken)
        with pytest.raises(OSError, match="disk full"):
            store.save(2, snapshot(2))
    assert store.latest() == first and damage(first) is None
    store.save(3, snapshot(3))
    assert not list(store.folder.glob(".staging*")), "the next save clears what was left over"


@pytest.mark.parametrize("bad", [deque([1]), Path("x"), np.zeros(2), PCG64])
def test_state_that_json_cannot_hold_is_an_error_when_saved(tmp_path: Path, bad: object) -> None:
    state = {"bad": bad}
    if isinstance(bad, dict):  # plain integers: fine, and equal when loaded
        CheckpointStore(tmp_path).save(1, snapshot(1, **state))
        assert load(CheckpointStore(tmp_path).latest()).state["bad"] == bad
        return
    with pytest.raises(TypeError):
        CheckpointStore(tmp_path).save(1, snapshot(1, **state))
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam, torch.optim.Adafactor])
def test_any_optimizer_goes_on_bit_for_bit(make: Any) -> None:
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

    straight, straight_optimizer = fresh()
    train(straight, straight_optimizer, range(6))

    first, first_optimizer = fresh()
    train(first, first_optimizer, range(3))
    tensors, state = split_optimizer_state(first, first_optimizer)
    weights = {name: value.clone() for name, value in first.state_dict().items()}
    second, second_optimizer = fresh()
    load_model(second, weights)
    restore_optimizer(second, second_optimizer, tensors, json.loads(json.dumps(state)))
    train(second, second_optimizer, range(3, 6))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
