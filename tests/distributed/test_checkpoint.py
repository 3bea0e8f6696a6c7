"""Tests of checkpoints of two ranks: both ranks raise failures; one process, DDP and FSDP2 load each other's saves."""

import resource
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from tests.faults.test_checkpoint_damage import rewrite_manifest
from tests.support.ranks import Ranks
from wmtp.checkpoint.state import Snapshot, load_model, restore_optimizer, split_optimizer_state
from wmtp.checkpoint.store import CheckpointStore, find_damage, load
from wmtp.distributed.process_group import OtherProcessFailed, Processes
from wmtp.distributed.sharded_io import gather_full, read_shards
from wmtp.errors import InputError
from wmtp.training.optim import parameter_groups

pytestmark = [pytest.mark.xdist_group("ranks"), pytest.mark.slow]
Format = Literal["whole", "sharded"]
Strategy = Literal["single", "ddp", "fsdp"]
"""One process, or two ranks that each hold a copy of the model (DDP) or shards of it (FSDP2)."""


def new_model_and_optimizer(strategy: Strategy) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model, some of whose weights have an odd number of rows or one row, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 5), nn.Linear(5, 1))
    if strategy == "fsdp":
        fully_shard(model[0])
        fully_shard(model)
    return model, torch.optim.AdamW(parameter_groups(model), lr=0.01)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Train with the same batch on each rank."""
    for step in steps:
        model(torch.linspace(0, step + 1, 48).view(3, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
    """Return the snapshot of a model and its optimizer."""
    tensors, state = split_optimizer_state(model, optimizer)
    return Snapshot(model.state_dict(), tensors, {"optimizer": state})


def snapshot_after(num_steps: int) -> Snapshot:
    """Return the snapshot of one process after a number of updates."""
    model, optimizer = new_model_and_optimizer("single")
    train(model, optimizer, range(num_steps))
    return snapshot_of(model, optimizer)


def tensors_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def gather_tensors(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in tensors.items()}


def train_three_steps_and_save(folder: Path, strategy: Strategy, format_: Format) -> None:
    """Train three steps and save a checkpoint, alone or as a rank."""
    model, optimizer = new_model_and_optimizer(strategy)
    train(model, optimizer, range(3))
    with torch.no_grad():
        model(torch.ones(3, 16))  # leaves the root module of FSDP gathered until its shards are needed
    CheckpointStore(folder, Processes(), format=format_).save(3, snapshot_of(model, optimizer))


def resume_and_train_two_steps(folder: Path, strategy: Strategy, keep_sharded: bool) -> Snapshot:
    """Load a checkpoint, train two steps, and return the full tensors.

    If `keep_sharded`, the checkpoint is loaded with the model's own sharding, otherwise as full tensors.
    """
    model, optimizer = new_model_and_optimizer(strategy)
    like = dict(model.named_parameters()) if keep_sharded else None
    loaded = load(CheckpointStore(folder, Processes()).latest(), like, verified=True)
    if keep_sharded and strategy == "fsdp":
        for tensors in (loaded.model, loaded.optimizer):
            for name, tensor in tensors.items():
                if not name.endswith(":step"):
                    assert isinstance(tensor, DTensor), name
                    local = tensor.to_local()
                    assert local.untyped_storage().nbytes() == local.numel() * 4, f"{name} keeps more than its shard"
    load_model(model, loaded.model)
    restore_optimizer(model, optimizer, loaded.optimizer, loaded.state["optimizer"])
    train(model, optimizer, range(3, 5))
    done = snapshot_of(model, optimizer)
    return Snapshot(gather_tensors(done.model), gather_tensors(done.optimizer), {})


def save_with_all_strategies(folder: Path) -> dict[str, tuple[int, ...]]:
    """Save with each strategy and format, and return this rank's shapes of the sharded optimizer moments."""
    formats: tuple[Format, ...] = ("whole", "sharded")
    strategies: tuple[Strategy, ...] = ("ddp", "fsdp")
    for format_ in formats:
        for strategy in strategies:
            train_three_steps_and_save(folder / f"{strategy}-{format_}", strategy, format_)
    model, optimizer = new_model_and_optimizer("fsdp")
    train(model, optimizer, range(1))
    moments = split_optimizer_state(model, optimizer)[0]
    return {name: tuple(moment.to_local().shape) for name, moment in moments.items() if isinstance(moment, DTensor)}


def load_with_all_strategies(folder: Path) -> list[tuple[str, Snapshot]]:
    """Load every saved checkpoint with each strategy, and return a description and the result of each case."""
    strategies: tuple[Strategy, ...] = ("ddp", "fsdp")
    return [
        (
            f"{path.name} to {strategy}, sharded load: {keep_sharded}",
            resume_and_train_two_steps(path, strategy, keep_sharded),
        )
        for path in sorted(folder.iterdir())
        for strategy in strategies
        for keep_sharded in (True, False)
    ]


@pytest.mark.slow
def test_any_number_of_ranks_loads_checkpoints_of_any_other_number(ranks: Ranks, tmp_path: Path) -> None:
    moment_shapes_of_rank_0 = ranks(save_with_all_strategies, tmp_path)[0]
    train_three_steps_and_save(tmp_path / "single-whole", "single", "whole")
    train_three_steps_and_save(tmp_path / "single-sharded", "single", "sharded")
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 6

    after_three, after_five = snapshot_after(3), snapshot_after(5)
    for folder in folders:
        path = folder / "checkpoints" / "step_00000003"
        loaded = load(path)
        assert loaded.optimizer["0.weight:exp_avg"].shape == (16, 16)
        assert tensors_equal(loaded.model, after_three.model) and tensors_equal(
            loaded.optimizer, after_three.optimizer
        ), folder
        alone = resume_and_train_two_steps(folder, "single", True)
        assert tensors_equal(alone.model, after_five.model) and tensors_equal(alone.optimizer, after_five.optimizer), (
            folder
        )
        assert len(list(path.glob("*.distcp"))) == {"single-sharded": 1, "ddp-sharded": 2, "fsdp-sharded": 2}.get(
            folder.name, 0
        )
    for results in ranks(load_with_all_strategies, tmp_path):
        assert len(results) == 24
        for case, snapshot in results:
            assert tensors_equal(snapshot.model, after_five.model) and tensors_equal(
                snapshot.optimizer, after_five.optimizer
            ), case
    assert moment_shapes_of_rank_0["0.weight:exp_avg"] == (8, 16), "control: each rank has half of the rows"


def gather_on_main_only() -> str:
    processes = Processes()
    model, _ = new_model_and_optimizer("fsdp")
    tensor = model.state_dict()["0.weight"]
    if processes.is_main:
        try:
            tensor.full_tensor()
        except RuntimeError as error:
            return str(error)
    time.sleep(2.5)
    return ""


def test_control_gathering_only_in_the_main_process_times_out(ranks: Ranks) -> None:
    main = ranks.outcomes(gather_on_main_only, timeout=2.0)[0]
    assert main.seconds > 1.9 and (main.error or main.value)


def run_with_file_size_limit(rank: int, action: Callable[[], Any]) -> str:
    """Run an action with a file size limit of 1000 bytes on one rank; return the action's error, or "saved"."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if Processes().rank == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return "saved"


def fail_to_save(folder: Path, strategy: Strategy, format_: Format, rank: int) -> tuple[str, float, str, str]:
    store = CheckpointStore(folder, Processes(), format=format_)
    model, optimizer = new_model_and_optimizer(strategy)
    train(model, optimizer, range(1))
    store.save(1, snapshot_of(model, optimizer))
    started = time.monotonic()
    result = run_with_file_size_limit(rank, lambda: store.save(2, snapshot_of(model, optimizer)))
    seconds = time.monotonic() - started
    names = Processes().run_on_main(lambda: sorted(path.name for path in store.folder.iterdir()))
    latest = store.latest().name
    store.save(3, snapshot_of(model, optimizer))
    return result, seconds, f"{latest} {names}", store.latest().name


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("format_", "rank"), [("whole", 0), ("sharded", 0), ("sharded", 1)])
def test_a_save_that_fails_on_one_rank_fails_on_all(
    ranks: Ranks, tmp_path: Path, strategy: Strategy, format_: Format, rank: int
) -> None:
    outcomes = ranks(fail_to_save, tmp_path, strategy, format_, rank)
    failed, other = outcomes[rank], outcomes[1 - rank]
    assert failed[0].startswith("OSError") and "File too large" in failed[0]
    assert other[0].startswith(f"OtherProcessFailed: process {rank}: ") and "File too large" in other[0]
    assert failed[1] < 5 and other[1] < 5
    assert failed[2] == other[2] == "step_00000001 ['latest.json', 'step_00000001']"
    assert failed[3] == other[3] == "step_00000003"


def fail_to_publish(folder: Path) -> str:
    def publish(self: CheckpointStore, *arguments: object) -> None:
        raise OSError(28, "No space left on device")

    model, optimizer = new_model_and_optimizer("ddp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "_publish", publish)
        try:
            CheckpointStore(folder, Processes()).save(1, snapshot_of(model, optimizer))
        except OSError as error:
            return str(error)
        except OtherProcessFailed as error:
            return str(error)
    return "saved"


def test_a_checkpoint_that_cannot_be_published_fails_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    error = "[Errno 28] No space left on device"
    assert ranks(fail_to_publish, tmp_path) == [error, f"process 0: {error}"]


def gather_with_too_little_memory(folder: Path, fails: bool) -> tuple[str, list[str], float]:
    """Save, and if `fails`, let the main process run out of memory; the other rank must not wait for it."""
    processes = Processes()
    model, optimizer = new_model_and_optimizer("fsdp")
    store = CheckpointStore(folder, processes)
    kept = sorted(gather_full(model.state_dict(), keep=processes.is_main))
    original, started = torch.Tensor.to, time.monotonic()

    def without_memory(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if fails and options.get("copy") and tensor.shape == (16,):
            raise MemoryError("no memory is left")
        return original(tensor, *arguments, **options)

    result = "saved"
    if processes.is_main:
        torch.Tensor.to = without_memory
    try:
        store.save(1, snapshot_of(model, optimizer))
    except (MemoryError, OtherProcessFailed) as error:
        result = f"{type(error).__name__}: {error}"
    finally:
        torch.Tensor.to = original
    return result, kept, time.monotonic() - started


@pytest.mark.parametrize("fails", [True, False])
def test_only_the_main_process_keeps_gathered_tensors(ranks: Ranks, tmp_path: Path, fails: bool) -> None:
    main, other = ranks(gather_with_too_little_memory, tmp_path, fails)
    assert (main[0], other[0]) == (
        ("MemoryError: no memory is left", "OtherProcessFailed: process 0: no memory is left")
        if fails
        else ("saved", "saved")
    )
    assert main[1] == sorted(new_model_and_optimizer("single")[0].state_dict()) and other[1] == []
    assert max(main[2], other[2]) < 5


def save_unserializable_state(folder: Path) -> str:
    store = CheckpointStore(folder, Processes())
    try:
        store.save(1, Snapshot({"w": torch.ones(3)}, {}, {"bad": {1, 2}}))
    except (TypeError, OtherProcessFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "saved"


def test_an_unserializable_state_is_refused_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    main, other = ranks(save_unserializable_state, tmp_path)
    assert main == "TypeError: Object of type set is not JSON serializable"
    assert other == "OtherProcessFailed: process 0: Object of type set is not JSON serializable"
    assert not list(tmp_path.iterdir())


def save_without_agreement(folder: Path) -> str:
    """Save on rank 0 and synchronize afterwards without exchanging errors, as most programs do."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    started = time.monotonic()
    try:
        if dist.get_rank() == 0:
            run_with_file_size_limit(0, lambda: torch.save(torch.ones(10_000), folder / "model.pt"))
            time.sleep(3)  # time in which a program would report its error and end
        else:
            dist.all_reduce(torch.zeros(1), group=group)
    except RuntimeError:
        return f"waited {time.monotonic() - started:.1f} s"
    return "no error"


def test_control_without_agreement_the_other_rank_times_out(ranks: Ranks, tmp_path: Path) -> None:
    main, other = ranks(save_without_agreement, tmp_path)
    assert main == "no error" and other.startswith("waited ")
    assert float(other.split()[1]) > 1.9


def found_checkpoints(folder: Path) -> dict[str, Any]:
    """Return the checkpoints that this rank finds; only the main process gets the path of the folder."""
    processes = Processes()
    store = CheckpointStore(folder if processes.is_main else Path("/nowhere"), processes)
    found: dict[str, Any] = {"any": store.has_any(), "best": store.best() and store.best().name}
    try:
        found["latest"] = store.latest().name
    except (InputError, OtherProcessFailed) as error:
        found["latest"] = type(error).__name__, error.exit_code
    return found


def test_all_ranks_get_the_result_of_the_main_process(ranks: Ranks, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.save(step, snapshot_after(step))
    store.mark_best(1, {"val/loss": 0.5})
    main, other = ranks(found_checkpoints, tmp_path)
    assert main == other == {"any": True, "best": "step_00000001", "latest": "step_00000002"}
    main, other = ranks(found_checkpoints, tmp_path / "empty")
    assert main == {"any": False, "best": None, "latest": ("InputError", 2)}
    assert other == {"any": False, "best": None, "latest": ("OtherProcessFailed", 2)}


def save_twice(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for step in (1, 2):
        local = torch.full((1,), float(step))
        tensor = DTensor.from_local(local, mesh, [Shard(0)])
        CheckpointStore(folder, Processes(), format="sharded").save(step, Snapshot({"w": tensor}, {}, {"step": step}))
        dcp.save({"w": tensor}, checkpoint_id=folder / f"plain_{step}")


def test_shards_of_two_saves_are_not_a_checkpoint(
    ranks: Ranks, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranks(save_twice, tmp_path)
    first, second = (tmp_path / "checkpoints" / f"step_0000000{step}" for step in (1, 2))
    shutil.copy(first / "__1_0.distcp", second / "__1_0.distcp")
    assert find_damage(second) == "__1_0.distcp does not have the content that was written"
    with pytest.raises(InputError, match="no complete checkpoint"):
        load(second)
    assert CheckpointStore(tmp_path).latest() == first and "step_00000002 is damaged" in caplog.text
    assert load(first).model["w"].tolist() == [1.0, 1.0]

    mixture = read_shards(second, lambda name: True, lambda name: None)
    assert mixture["model.w"].tolist() == [2.0, 1.0], "control: without a check of the hashes the mixture can be read"
    rewrite_manifest(second)
    assert load(second).model["w"].tolist() == [2.0, 1.0], "control: with a matching manifest it is accepted"


def test_control_torch_reads_shards_of_two_saves_as_one(ranks: Ranks, tmp_path: Path) -> None:
    ranks(save_twice, tmp_path)
    shutil.copy(tmp_path / "plain_2" / "__1_0.distcp", tmp_path / "plain_1" / "__1_0.distcp")
    tensors = {"w": torch.empty(2)}
    dcp.load(tensors, checkpoint_id=tmp_path / "plain_1", no_dist=True)
    assert tensors["w"].tolist() == [1.0, 2.0]
