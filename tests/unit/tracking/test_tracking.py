import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from wmtp.runtime.json_lines import read_json_lines
from wmtp.tracking.console import ConsoleTracker, format_metrics, format_time
from wmtp.tracking.jsonl import MetricsFile
from wmtp.tracking.system_metrics import Gpus, SystemSampler

TRAINED = {"train/loss": 1.25, "train/head_1_loss": 1.0, "train/head_2_loss": 1.5, "train/tokens_per_second": 12345.6}


def test_metrics_are_lines_of_valid_json_also_with_nonfinite_values(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path)
    metrics.log(1, 0, TRAINED)
    metrics.log(2, 0, {"train/loss": math.nan})
    metrics.close("FINISHED")
    first, second = read_json_lines(tmp_path / "metrics.jsonl")
    assert first | TRAINED == first
    assert set(first) == {"step", "epoch", "time", *TRAINED}
    assert second["train/loss"] == "nan"
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_resumed_run_writes_no_step_twice(tmp_path: Path) -> None:
    before = MetricsFile(tmp_path)
    for step in range(1, 8):
        before.log(step, 0, {"train/loss": float(step)})
    before.close("FAILED")
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "tra')  # cut off by a crash
    after = MetricsFile(tmp_path, resume_step=5)
    after.log(6, 0, {"train/loss": 6.0})
    after.close("FINISHED")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_resuming_replaces_the_metrics_atomically_and_syncs_them_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control only renames; after a power failure, its file may be empty."""
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(tmp_path)
    for step in range(1, 8):
        metrics.log(step, 0, {"train/loss": step / 3, "train/grad_norm": math.inf})
    metrics.close("FAILED")
    before = path.read_bytes()

    def calls(rewrite: Callable[[], object]) -> list[str]:
        operations, sync, replace = [], os.fsync, os.replace
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda *args: (operations.append("fsync"), sync(*args)))
            patch.setattr(os, "replace", lambda *args: (operations.append("replace"), replace(*args)))
            rewrite()
        return operations

    def rename_only() -> None:
        (tmp_path / "staged").write_bytes(before)
        os.replace(tmp_path / "staged", path)

    assert calls(rename_only) == ["replace"]
    assert calls(lambda: MetricsFile(tmp_path, resume_step=5)) == ["fsync", "replace", "fsync"]
    assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:5]), "a remaining line changed"

    def fail_disk_full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", fail_disk_full)
    with pytest.raises(OSError, match="No space"):
        MetricsFile(tmp_path, resume_step=1)
    assert path.read_bytes() == before


def test_without_a_terminal_lines_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = ConsoleTracker(Console(), num_updates=20, updates_per_epoch=10, first_step=0)
    tracker.log(10, 1, TRAINED)
    tracker.close("FINISHED")
    line = capsys.readouterr().out
    assert line.startswith(
        "epoch 1/2  update 10/20  train loss 1.2500  heads 1.000 1.500  12,346 tokens/s  elapsed 0:00  left 0:00"
    )
    assert line.count("\n") == 1
    assert "\x1b" not in line


@pytest.mark.parametrize("width", [80, 120])
def test_the_progress_bar_fits_the_width_of_the_terminal(width: int, tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w") as file:
        console = Console(file=file, force_terminal=True, width=width)
        tracker = ConsoleTracker(console, num_updates=1000, updates_per_epoch=400, first_step=0)
        tracker.log(990, 2, TRAINED | {f"train/head_{k}_loss": 10.0 for k in range(1, 5)})
        tracker.log(990, 2, {"val/loss": 1.0, "val/head_1_loss": 1.0})
        tracker.close("FINISHED")
    screen = (tmp_path / "screen").read_text()
    assert "epoch 3/3  update 990/1000" in screen and "0:00:0" in screen, "the elapsed time"
    assert "99%" in screen
    assert max(len(Console().render_str(line).plain) for line in format_metrics(TRAINED).splitlines()) <= width


@pytest.mark.parametrize(("seconds", "text"), [(59, "0:59"), (3599, "59:59"), (3600, "1:00:00"), (90_061, "25:01:01")])
def test_a_long_time_is_shown_in_hours(seconds: float, text: str) -> None:
    """Without hours, the last two are "60:00", which reads like 60 hours, and "1501:01"."""
    assert format_time(seconds) == text


def test_every_heads_loss_is_printed() -> None:
    values = {"val/loss": 1.0} | {f"val/head_{k}_loss": float(k) for k in range(1, 9)}
    assert format_metrics(values).endswith("heads 1.000 2.000 3.000 4.000 5.000 6.000 7.000 8.000")


def sample_system(folder: Path, count: int, first_step: int = 0) -> list[dict[str, float]]:
    """Sample until system.jsonl has `count` lines, and return all its lines."""
    path, sampler = folder / "system.jsonl", SystemSampler(folder, 0.02, first_step)
    deadline = time.monotonic() + 20
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    sampler.stop()
    return read_json_lines(path)


def test_system_metrics_are_sampled_and_a_resumed_run_continues_their_steps(tmp_path: Path) -> None:
    first = sample_system(tmp_path, 3)
    with (tmp_path / "system.jsonl").open("a") as file:
        file.write('{"step": 77, "ti')  # cut off by a crash
    both = sample_system(tmp_path, len(first) + 3)
    assert [line["step"] for line in both] == list(range(len(both))) and both[: len(first)] == first
    values = both[-1]
    assert 0 < values["system/process_memory_usage_megabytes"] < values["system/system_memory_usage_megabytes"]
    assert 0 <= values["system/cpu_utilization_percentage"] <= 100
    (tmp_path / "elsewhere").mkdir()
    assert sample_system(tmp_path / "elsewhere", 1, first_step=9)[0]["step"] == 9


def test_gpu_metrics_have_the_names_of_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's library is replaced by a fake whose GPUs, like some real ones, do not report their power."""

    class NVMLError(Exception):
        pass

    def not_supported(handle: object) -> float:
        raise NVMLError("not supported")

    library = ModuleType("pynvml")
    library.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    vars(library).update(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 2, nvmlDeviceGetHandleByIndex=str,
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=20e9, total=80e9),
        nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=97), nvmlDeviceGetPowerUsage=not_supported,
        nvmlDeviceGetEnforcedPowerLimit=not_supported,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", library)
    one = {"memory_usage_megabytes": 20000.0, "memory_usage_percentage": 25.0, "utilization_percentage": 97.0}
    assert Gpus().usage() == {f"gpu_{i}_{name}": value for i in range(2) for name, value in one.items()}


def test_a_write_error_ends_only_the_system_metrics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "system.jsonl").mkdir()
    sampler = SystemSampler(tmp_path, 0.02)
    sampler._thread.join(10)
    assert "system metrics are no longer recorded: IsADirectoryError" in caplog.text
