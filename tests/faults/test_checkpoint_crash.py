"""Tests that kill a save at each system call, or make it fail on the disk: earlier checkpoints stay complete."""

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

from tests.support.forking import fork
from tests.unit.checkpoint.test_store import FORMATS, snapshot
from wmtp.checkpoint import formats
from wmtp.checkpoint.state import Snapshot
from wmtp.checkpoint.store import CheckpointStore, find_damage, load
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
    """Run `before` before each call of `os` that syncs or renames files. Return a function that undoes this."""
    originals = {name: getattr(os, name) for name in CALLS}

    def watched(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            names = arguments if name in ("rename", "replace") else arguments[:1]
            before(" ".join([name, *map(name_of, names)]))
            return originals[name](*arguments, **options)

        return call

    for name in CALLS:
        setattr(os, name, watched(name))
    return lambda: [setattr(os, name, original) for name, original in originals.items()] and None


def in_child(action: Callable[[], object]) -> int:
    """Run a function in a child process. Return its exit code, or minus the signal that killed it."""
    process = fork(lambda: action() and None)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def kill_before_call(number: int) -> Callable[[str], None]:
    """Return a function that kills this process before the call with a given number."""
    calls_made = 0

    def before(call: str) -> None:
        nonlocal calls_made
        calls_made += 1
        if calls_made == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return before


def owning_store(folder: Path, format_: Format, keep_last: int = 2) -> CheckpointStore:
    """Return the store of a process that may write to the folder."""
    return CheckpointStore(folder, Processes(), keep_last=keep_last, format=format_)


def save_steps_10_and_20(folder: Path, format_: Format) -> Path:
    """Save two checkpoints, and return the folder."""
    store = owning_store(folder, format_)
    store.save(10, snapshot(10))
    store.save(20, snapshot(20))
    return folder


def calls_while_saving_step_30(folder: Path, format_: Format) -> list[str]:
    """Save step 30, and return the calls that sync or rename files."""
    calls: list[str] = []
    stop = watch_calls(calls.append)
    try:
        owning_store(folder, format_).save(30, snapshot(30))
    finally:
        stop()
    return calls


TENSOR_CALLS = {
    "whole": ["fsync model.safetensors", "fsync optimizer.safetensors"],
    "sharded": ["mkdir .staging-step_00000030", "fsync shards.json", "fsync __0_0.distcp", "fsync shards.json"],
}
"""Calls that write the tensors. In the sharded format, torch creates the folder again although it exists."""


@FORMATS
def test_files_are_synced_before_the_rename(tmp_path: Path, format_: Format) -> None:
    calls = calls_while_saving_step_30(save_steps_10_and_20(tmp_path, format_), format_)
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
    base = save_steps_10_and_20(tmp_path / "base", format_)
    shutil.copytree(base, tmp_path / "dry")
    calls = calls_while_saving_step_30(tmp_path / "dry", format_)
    renamed = next(number for number, call in enumerate(calls, 1) if call.startswith("rename .staging"))
    assert len(calls) >= 12
    for number in range(1, len(calls) + 1):
        folder = shutil.copytree(base, tmp_path / str(number))

        def save_and_die(folder: Path = folder, number: int = number) -> None:
            watch_calls(kill_before_call(number))
            owning_store(folder, format_).save(30, snapshot(30))

        assert in_child(save_and_die) == -signal.SIGKILL
        visible = list((folder / "checkpoints").glob("step_*"))
        assert [find_damage(path) for path in visible] == [None] * len(visible), "every visible checkpoint is complete"
        caplog.clear()
        store = owning_store(folder, format_)
        latest = store.latest()
        assert latest.name == ("step_00000020" if number <= renamed else "step_00000030"), calls[number - 1]
        assert load(latest, verified=True).state["value"] == int(latest.name[-2:])
        assert not list(store.folder.glob(".*")), f"temporary files are left after a kill at {calls[number - 1]}"
        if 1 < number <= renamed:
            assert ".staging-step_00000030 was left by an interrupted save" in caplog.text
        store.save(40, snapshot(40))
        assert find_damage(store.latest()) is None and store.latest().name == "step_00000040"


def test_previous_checkpoint_is_used_after_a_kill_within_a_file(tmp_path: Path) -> None:
    save_steps_10_and_20(tmp_path, "whole")

    def write_half(tensors: Any, path: Path) -> None:
        save_file(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    def save_and_die() -> None:
        formats.save_file = write_half
        owning_store(tmp_path, "whole").save(30, snapshot(30))

    assert in_child(save_and_die) == -signal.SIGKILL
    assert owning_store(tmp_path, "whole").latest().name == "step_00000020"


def test_control_save_in_place_leaves_an_incomplete_checkpoint(tmp_path: Path) -> None:
    def save(step: int) -> None:
        folder = tmp_path / f"step_{step}"
        os.mkdir(folder)  # noqa: PTH102 - the test watches this call
        for name in ("model", "optimizer"):
            save_file(snapshot(step).model, folder / f"{name}.safetensors")
            with (folder / f"{name}.safetensors").open("rb") as file:
                os.fsync(file.fileno())

    num_incomplete = 0
    for number in range(1, 4):
        shutil.rmtree(tmp_path / "step_30", ignore_errors=True)
        assert in_child(lambda number=number: (watch_calls(kill_before_call(number)), save(30))) == -signal.SIGKILL
        if (tmp_path / "step_30").exists():
            num_incomplete += {path.stem for path in (tmp_path / "step_30").iterdir()} != {"model", "optimizer"}
    assert num_incomplete == 1


@FORMATS
def test_a_step_is_never_missing_while_it_is_saved_again(tmp_path: Path, format_: Format) -> None:
    owning_store(tmp_path / "base", format_, keep_last=1).save(30, snapshot(1))
    shutil.copytree(tmp_path / "base", tmp_path / "dry")
    calls = calls_while_saving_step_30(tmp_path / "dry", format_)
    seen = set()
    for number in range(1, len(calls) + 1):
        folder = shutil.copytree(tmp_path / "base", tmp_path / str(number))

        def save_and_die(folder: Path = folder, number: int = number) -> None:
            watch_calls(kill_before_call(number))
            owning_store(folder, format_, keep_last=1).save(30, snapshot(30))

        assert in_child(save_and_die) == -signal.SIGKILL
        assert CheckpointStore(folder).has_any()
        read_only_value = load(CheckpointStore(folder).latest()).state["value"]
        latest = owning_store(folder, format_).latest()
        assert latest.name == "step_00000030" and load(latest).state["value"] == read_only_value
        assert [path.name for path in latest.parent.glob("*step_*")] == ["step_00000030"]
        seen.add(read_only_value)
    assert seen == {1, 30}
    owning_store(tmp_path / "dry", format_).save(30, snapshot(31))
    assert load(CheckpointStore(tmp_path / "dry").latest()).state["value"] == 31


def test_control_removing_the_old_checkpoint_first_leaves_no_checkpoint(tmp_path: Path) -> None:
    store = owning_store(tmp_path, "whole")
    store.save(30, snapshot(1))

    def save_and_die() -> None:
        shutil.rmtree(store.folder / "step_00000030")
        watch_calls(kill_before_call(1))
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


def large_snapshot(value: float) -> Snapshot:
    """Return a snapshot of about two megabytes."""
    return Snapshot({"w": torch.full((500_000,), value)}, {"w:exp_avg": torch.ones(10)}, {})


def errno_of_large_save(store: CheckpointStore) -> int:
    """Return the errno with which the save of a large snapshot fails."""
    try:
        store.save(2, large_snapshot(2))
    except OSError as error:
        return next(number for number in (27, 28) if error.errno == number or f"os error {number}" in str(error))
    return 0


@FORMATS
def test_file_size_limit_is_reported_and_the_old_checkpoint_loads(tmp_path: Path, format_: Format) -> None:
    store = owning_store(tmp_path, format_)
    store.save(1, snapshot(1))

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        os._exit(errno_of_large_save(store))

    assert in_child(save) == 27
    assert not list(store.folder.glob(".*")), "the incomplete checkpoint is removed"
    assert load(store.latest()).state["value"] == 1


@FORMATS
def test_full_disk_is_reported_and_the_old_checkpoint_loads(small_disk: Path, format_: Format) -> None:
    store = owning_store(small_disk, format_)
    store.save(1, snapshot(1))
    assert errno_of_large_save(store) == 28
    assert load(store.latest()).state["value"] == 1
    store.save(3, snapshot(3))
    assert load(store.latest()).state["value"] == 3


def test_control_overwritten_file_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(large_snapshot(1).model, path)
    whole_size = path.stat().st_size

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        torch.save(large_snapshot(2).model, path)

    assert in_child(save) == 1
    assert path.stat().st_size < whole_size
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=True)


STRACE = shutil.which("strace")
RENAMES = "?rename,?renameat,?renameat2"


def save_under_strace(folder: Path, format_: Format, *options: str) -> tuple[int, list[str]]:
    """Save step 30 in a process that strace traces. Return its exit code and its system calls."""
    ready, go = os.pipe()

    def save() -> int:
        os.read(ready, 1)
        try:
            owning_store(folder, format_).save(30, snapshot(30))
        except OSError:
            return 5
        return 0

    process = fork(save)
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
        tracer_errors = tracer.stderr.read()
    os.close(ready)
    os.close(go)
    if not log.exists() or "attach" in tracer_errors:
        pytest.skip(f"strace is not allowed to trace processes here: {tracer_errors.strip()}")
    return code, log.read_text().splitlines()


def call_letters(lines: list[str]) -> str:
    """Return one letter for each system call.

    f: fsync of a file, m: fsync of the manifest, d: fsync of a folder, r: rename, x: removal.
    """
    letters = ""
    for line in lines:
        call = line.partition("(")[0]
        letter = {"fsync": "f", "rmdir": "x", "unlinkat": "x"}.get(call, "r" if call.startswith("rename") else "")
        if call == "fsync":
            letter = (
                "m"
                if "manifest.json>" in line
                else "f"
                if Path(line.partition("<")[2].partition(">")[0]).suffix
                else "d"
            )
        letters += letter
    return letters


EXPECTED_LETTERS = {"whole": "frfrfm" + "drd" + "frd" + "rxxxxx", "sharded": "ffffm" + "drd" + "frd" + "rxxxxx"}
"""Letters of a save by format. safetensors itself renames each of its two files."""


def injected_faults(lines: list[str]) -> Iterator[tuple[str, int, int]]:
    """Yield each fault to inject, and the exit code and the latest step that are expected after it."""
    calls_made: dict[str, int] = {}
    calls = call_letters(lines).rstrip("x")
    renamed = calls.index("dr") + 1
    for number, line in enumerate(lines[: len(calls)]):
        call = line.partition("(")[0]
        calls_made[call] = calls_made.get(call, 0) + 1
        step = 20 if number <= renamed else 30
        errno_name = "EIO" if call == "fsync" else "ENOSPC"
        last = number == len(calls) - 1  # a failed removal of the old checkpoint does not end training
        yield f"{call}:error={errno_name}:when={calls_made[call]}", 0 if last else 5, step
        yield f"{call}:signal=SIGKILL:when={calls_made[call]}", -signal.SIGKILL, step


@pytest.mark.skipif(STRACE is None, reason="strace is not installed; another test checks the order of calls without it")
def test_an_error_or_kill_at_any_system_call_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    formats: tuple[Format, ...] = ("sharded", "whole")
    for format_ in formats:
        base = save_steps_10_and_20(tmp_path / format_, format_)
        code, lines = save_under_strace(shutil.copytree(base, tmp_path / f"dry-{format_}"), format_)
        assert (code, call_letters(lines)) == (0, EXPECTED_LETTERS[format_]), lines
        for fault, expected, step in injected_faults(lines):
            folder = shutil.copytree(base, tmp_path / f"{format_}-{fault}")
            code, _ = save_under_strace(folder, format_, "-e", f"inject={fault}")
            latest = owning_store(folder, format_).latest()
            assert (code, latest.name) == (expected, f"step_000000{step}"), (format_, fault)
            assert find_damage(latest) is None


def test_control_a_save_without_fsync_has_no_fsync_call(tmp_path: Path) -> None:
    calls: list[str] = []
    stop = watch_calls(calls.append)
    try:
        save_file(snapshot(1).model, tmp_path / "model.tmp")
        os.replace(tmp_path / "model.tmp", tmp_path / "model")
    finally:
        stop()
    assert calls == ["replace model.tmp model"] and load_file(tmp_path / "model")
