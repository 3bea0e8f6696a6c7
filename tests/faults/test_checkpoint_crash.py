"""Tests of saves that are killed, or fail on the disk, at each step: earlier checkpoints stay complete."""

import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit.checkpoint.test_store import FORMATS, snapshot
from wmtp.checkpoint import formats
from wmtp.checkpoint.state import Snapshot
from wmtp.checkpoint.store import CheckpointStore, damage, load
from wmtp.distributed.process_group import Processes

Format = Literal["whole", "sharded"]
CALLS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir")


pytestmark = pytest.mark.slow


def name_of(path: Any, dir_fd: int | None = None) -> str:
    """Return the name of a path or of an open file, without the process id in it."""
    if isinstance(path, int):
        path = Path(f"/proc/self/fd/{path}").readlink()
    return Path(path).name.replace(f".{os.getpid()}.", ".")


def watch_calls(before: Callable[[str], None]) -> Callable[[], None]:
    """Call `before` before each call that syncs or changes names. Return a function that undoes this."""
    originals = {name: getattr(os, name) for name in CALLS}

    def watched(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            told = arguments if name in ("rename", "replace") else arguments[:1]
            before(" ".join([name, *map(name_of, told)]))
            return originals[name](*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, watched(name))
    return lambda: [setattr(os, name, original) for name, original in originals.items()] and None


def in_child(action: Callable[[], object]) -> int:
    """Run a function in a child process. Return its exit code, or minus the signal that killed it."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_at(number: int) -> Callable[[str], None]:
    """Return a function that kills this process before the call with a given number."""
    made = 0

    def before(call: str) -> None:
        nonlocal made
        made += 1
        if made == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def owner(folder: Path, format_: Format, keep_last: int = 2) -> CheckpointStore:
    return CheckpointStore(folder, Processes(), keep_last=keep_last, format=format_)


def ten_and_twenty(folder: Path, format_: Format) -> Path:
    store = owner(folder, format_)
    store.save(10, snapshot(10))
    store.save(20, snapshot(20))
    return folder


def calls_of_saving_thirty(folder: Path, format_: Format) -> list[str]:
    calls: list[str] = []
    stop = watch_calls(calls.append)
    try:
        owner(folder, format_).save(30, snapshot(30))
    finally:
        stop()
    return calls


TENSOR_CALLS = {
    "whole": ["fsync model.safetensors", "fsync optimizer.safetensors"],
    "sharded": ["mkdir .staging-step_00000030", "fsync shards.json", "fsync __0_0.distcp", "fsync shards.json"],
}
"""Torch creates the folder again, although it exists."""


@FORMATS
def test_files_are_synced_before_the_rename(tmp_path: Path, format_: Format) -> None:
    calls = calls_of_saving_thirty(ten_and_twenty(tmp_path, format_), format_)
    assert calls[:-5] == [
        "mkdir .staging-step_00000030",
        "fsync state.json",
        *TENSOR_CALLS[format_],
        "fsync manifest.json",
        "fsync .staging-step_00000030",
        "rename .staging-step_00000030 step_00000030",
        "fsync checkpoints",
        "fsync .latest.json.tmp",
        "replace .latest.json.tmp latest.json",
        "fsync checkpoints",
        "rename step_00000010 .removed-step_00000010",
    ]
    removal = calls[-5:]
    assert all(call.startswith("unlink ") for call in removal[:-1]) and removal[-1] == "rmdir .removed-step_00000010"


@FORMATS
def test_complete_checkpoint_is_found_after_a_kill_at_any_call(
    tmp_path: Path, format_: Format, caplog: pytest.LogCaptureFixture
) -> None:
    base = ten_and_twenty(tmp_path / "base", format_)
    shutil.copytree(base, tmp_path / "dry")
    calls = calls_of_saving_thirty(tmp_path / "dry", format_)
    renamed = next(number for number, call in enumerate(calls, 1) if call.startswith("rename .staging"))
    assert len(calls) >= 12
    for number in range(1, len(calls) + 1):
        folder = shutil.copytree(base, tmp_path / str(number))

        def save_and_die(folder: Path = folder, number: int = number) -> None:
            watch_calls(killed_at(number))
            owner(folder, format_).save(30, snapshot(30))

        assert in_child(save_and_die) == -signal.SIGKILL
        visible = list((folder / "checkpoints").glob("step_*"))
        assert [damage(path) for path in visible] == [None] * len(visible), "every visible checkpoint is complete"
        caplog.clear()
        store = owner(folder, format_)
        latest = store.latest()
        assert latest.name == ("step_00000020" if number <= renamed else "step_00000030"), calls[number - 1]
        assert load(latest, verified=True).state["value"] == int(latest.name[-2:])
        assert not list(store.folder.glob(".*")), f"left over at {calls[number - 1]}"
        if 1 < number <= renamed:
            assert ".staging-step_00000030 was left by an interrupted save" in caplog.text
        store.save(40, snapshot(40))
        assert damage(store.latest()) is None and store.latest().name == "step_00000040"


def test_previous_checkpoint_is_used_after_a_kill_within_a_file(tmp_path: Path) -> None:
    ten_and_twenty(tmp_path, "whole")

    def half(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die() -> None:
        formats.save_file = half
        owner(tmp_path, "whole").save(30, snapshot(30))

    assert in_child(save_and_die) == -signal.SIGKILL
    assert owner(tmp_path, "whole").latest().name == "step_00000020"


def test_control_save_in_place_leaves_an_incomplete_checkpoint(tmp_path: Path) -> None:
    def save(step: int) -> None:
        folder = tmp_path / f"step_{step}"
        os.mkdir(folder)  # noqa: PTH102 - the call that is watched
        for name in ("model", "optimizer"):
            save_file(snapshot(step).model, folder / f"{name}.safetensors")
            with (folder / f"{name}.safetensors").open("rb") as file:
                os.fsync(file.fileno())

    half = 0
    for number in range(1, 4):
        shutil.rmtree(tmp_path / "step_30", ignore_errors=True)
        assert in_child(lambda number=number: (watch_calls(killed_at(number)), save(30))) == -signal.SIGKILL
        if (tmp_path / "step_30").exists():
            half += {path.stem for path in (tmp_path / "step_30").iterdir()} != {"model", "optimizer"}
    assert half == 1


@FORMATS
def test_step_that_is_saved_again_is_never_missing(tmp_path: Path, format_: Format) -> None:
    owner(tmp_path / "base", format_, keep_last=1).save(30, snapshot(1))
    shutil.copytree(tmp_path / "base", tmp_path / "dry")
    calls = calls_of_saving_thirty(tmp_path / "dry", format_)
    seen = set()
    for number in range(1, len(calls) + 1):
        folder = shutil.copytree(tmp_path / "base", tmp_path / str(number))

        def save_and_die(folder: Path = folder, number: int = number) -> None:
            watch_calls(killed_at(number))
            owner(folder, format_, keep_last=1).save(30, snapshot(30))

        assert in_child(save_and_die) == -signal.SIGKILL
        assert CheckpointStore(folder).has_any()
        onlooker = load(CheckpointStore(folder).latest()).state["value"]
        latest = owner(folder, format_).latest()
        assert latest.name == "step_00000030" and load(latest).state["value"] == onlooker
        assert [path.name for path in latest.parent.glob("*step_*")] == ["step_00000030"]
        seen.add(onlooker)
    assert seen == {1, 30}
    owner(tmp_path / "dry", format_).save(30, snapshot(31))
    assert load(CheckpointStore(tmp_path / "dry").latest()).state["value"] == 31


def test_control_removing_the_old_one_first_leaves_none(tmp_path: Path) -> None:
    store = owner(tmp_path, "whole")
    store.save(30, snapshot(1))

    def save_and_die() -> None:
        shutil.rmtree(store.folder / "step_00000030")
        watch_calls(killed_at(1))
        store.save(30, snapshot(30))

    assert in_child(save_and_die) == -signal.SIGKILL
    assert not CheckpointStore(tmp_path).has_any()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def large(value: float) -> Snapshot:
    return Snapshot({"w": torch.full((500_000,), value)}, {"w:exp_avg": torch.ones(10)}, {})


def refused(store: CheckpointStore) -> int:
    """Return the errno with which a large save fails."""
    try:
        store.save(2, large(2))
    except OSError as error:
        return next(number for number in (27, 28) if error.errno == number or f"os error {number}" in str(error))
    return 0


@FORMATS
def test_file_size_limit_is_reported_and_the_old_checkpoint_loads(tmp_path: Path, format_: Format) -> None:
    store = owner(tmp_path, format_)
    store.save(1, snapshot(1))

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        os._exit(refused(store))

    assert in_child(save) == 27
    assert not list(store.folder.glob(".*")), "the incomplete checkpoint is removed"
    assert load(store.latest()).state["value"] == 1


@FORMATS
def test_full_disk_is_reported_and_the_old_checkpoint_loads(small_disk: Path, format_: Format) -> None:
    store = owner(small_disk, format_)
    store.save(1, snapshot(1))
    assert refused(store) == 28
    assert load(store.latest()).state["value"] == 1
    store.save(3, snapshot(3))
    assert load(store.latest()).state["value"] == 3


def test_control_overwritten_file_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(large(1).model, path)
    whole_size = path.stat().st_size

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        torch.save(large(2).model, path)

    assert in_child(save) == 1
    assert path.stat().st_size < whole_size
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=True)


STRACE = shutil.which("strace")
RENAMES = "?rename,?renameat,?renameat2"


def save_under_strace(folder: Path, format_: Format, *options: str) -> tuple[int, list[str]]:
    """Save step 30 in a process under strace. Return its exit code and its system calls."""
    ready, go = os.pipe()

    def save() -> None:
        os.read(ready, 1)
        owner(folder, format_).save(30, snapshot(30))

    process = os.fork()
    if process == 0:
        code = 1
        try:
            save()
            code = 0
        except OSError:
            code = 5
        finally:
            os._exit(code)
    log = folder / "strace"
    command = [str(STRACE), "-qq", "-y", "-o", str(log), "-e", f"trace=fsync,{RENAMES},?rmdir,?unlinkat", *options]
    with subprocess.Popen([*command, "-p", str(process)], stderr=subprocess.PIPE, text=True) as tracer:
        status = Path(f"/proc/{process}/status")
        deadline = time.monotonic() + 10
        while "TracerPid:\t0\n" in status.read_text() and tracer.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        os.write(go, b".")
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert tracer.stderr is not None
        said = tracer.stderr.read()
    os.close(ready)
    os.close(go)
    if not log.exists() or "attach" in said:
        pytest.skip(f"strace may not watch processes here: {said.strip()}")
    return code, log.read_text().splitlines()


def shape_of(lines: list[str]) -> str:
    """Return one letter for each call: f fsync of a file, m of the manifest, d of a folder, r rename, x removal."""
    letters = ""
    for line in lines:
        call = line.partition("(")[0]
        kind = {"fsync": "f", "rmdir": "x", "unlinkat": "x"}.get(call, "r" if call.startswith("rename") else "")
        if call == "fsync":
            kind = (
                "m"
                if "manifest.json>" in line
                else "f"
                if Path(line.partition("<")[2].partition(">")[0]).suffix
                else "d"
            )
        letters += kind
    return letters


SEEN = {"whole": "frfrfm" + "drd" + "frd" + "rxxxxx", "sharded": "ffffm" + "drd" + "frd" + "rxxxxx"}
"""safetensors itself renames each of its two files."""


def faults(lines: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield, for each system call, the fault that is injected, the exit code and the latest step afterwards."""
    made: dict[str, int] = {}
    calls = shape_of(lines).rstrip("x")
    renamed = calls.index("dr") + 1
    for number, line in enumerate(lines[: len(calls)]):
        call = line.partition("(")[0]
        made[call] = made.get(call, 0) + 1
        step = 20 if number <= renamed else 30
        problem = "EIO" if call == "fsync" else "ENOSPC"
        last = number == len(calls) - 1  # a failed removal of the old one does not end training
        yield f"{call}:error={problem}:when={made[call]}", 0 if last else 5, step
        yield f"{call}:signal=SIGKILL:when={made[call]}", -signal.SIGKILL, step


@pytest.mark.skipif(STRACE is None, reason="strace is not installed; the order is also tested without it")
def test_order_of_system_calls_and_their_errors_keep_the_previous_checkpoint(tmp_path: Path) -> None:
    formats: tuple[Format, ...] = ("sharded", "whole")
    for format_ in formats:
        base = ten_and_twenty(tmp_path / format_, format_)
        code, lines = save_under_strace(shutil.copytree(base, tmp_path / f"dry-{format_}"), format_)
        assert (code, shape_of(lines)) == (0, SEEN[format_]), lines
        for fault, expected, step in faults(lines):
            folder = shutil.copytree(base, tmp_path / f"{format_}-{fault}")
            code, _ = save_under_strace(folder, format_, "-e", f"inject={fault}")
            latest = owner(folder, format_).latest()
            assert (code, latest.name) == (expected, f"step_000000{step}"), (format_, fault)
            assert damage(latest) is None


def test_control_without_fsync_no_sync_is_traced(tmp_path: Path) -> None:
    calls: list[str] = []
    stop = watch_calls(calls.append)
    try:
        save_file(snapshot(1).model, tmp_path / "model.tmp")
        os.replace(tmp_path / "model.tmp", tmp_path / "model")
    finally:
        stop()
    assert calls == ["replace model.tmp model"] and load_file(tmp_path / "model")
