"""Record the usage of CPU, memory, disk and GPUs during training in system.jsonl.

The metrics have the names that MLflow uses for system metrics.
"""

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from wmtp.runtime.json_lines import drop_torn_line
from wmtp.tracking.tail import step_of

FILE_NAME = "system.jsonl"
PREFIX = "system/"
MEGABYTE = 1e6

log = logging.getLogger(__name__)


class SystemSampler:
    """Background thread that appends one line of system metrics to a run's system.jsonl every `seconds` seconds.

    The lines are numbered, and the number of a line is stored as its step.
    """

    def __init__(self, folder: Path, seconds: float, first_step: int = 0) -> None:
        """Start the thread. If system.jsonl exists, new lines are appended.

        Args:
            folder: the run's folder.
            seconds: time between two lines.
            first_step: smallest step that the first new line may have.
        """
        self.path, self.seconds, self.first_step = folder / FILE_NAME, seconds, first_step
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the background thread."""
        self._stopped.set()
        self._thread.join(self.seconds)

    def _sample(self) -> None:
        try:
            lines = drop_torn_line(self.path)
            step = max(self.first_step, step_of(lines[-1]) + 1 if lines else 0)
            gpus, process = Gpus(), psutil.Process()
            psutil.cpu_percent()  # the next call returns the usage since this call
            with self.path.open("a") as file:
                while not self._stopped.wait(self.seconds):
                    usage = {
                        f"{PREFIX}{name}": value for name, value in (machine_usage(process) | gpus.usage()).items()
                    }
                    file.write(json.dumps({"step": step, "epoch": 0, "time": time.time()} | usage) + "\n")
                    file.flush()
                    step += 1
        except Exception as error:  # noqa: BLE001 - training does not need these metrics
            log.warning("system metrics are no longer recorded: %s: %s", type(error).__name__, error)


class Gpus:
    """The NVIDIA GPUs of this machine. If the NVIDIA driver is not available, there are no GPUs."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        import pynvml  # imported late, so that only the sampling thread waits for it

        self._nvml = pynvml
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            log.info("GPU metrics are not available: %s", error)
            return
        self._handles = [self._nvml.nvmlDeviceGetHandleByIndex(i) for i in range(self._nvml.nvmlDeviceGetCount())]

    def usage(self) -> dict[str, float]:
        """Return the memory usage (in MB and %), the utilization (in %) and the power (in W and %) of each GPU.

        A metric that a GPU does not report is left out.
        """
        values: dict[str, float] = {}
        for i, handle in enumerate(self._handles):
            for query in (self._memory, self._utilization, self._power):
                try:
                    values |= {f"gpu_{i}_{name}": round(value, 1) for name, value in query(handle).items()}
                except self._nvml.NVMLError as error:
                    log.debug("GPU %d does not report all metrics: %s", i, error)
        return values

    def _memory(self, handle: Any) -> dict[str, float]:
        memory = self._nvml.nvmlDeviceGetMemoryInfo(handle)
        return {
            "memory_usage_megabytes": memory.used / MEGABYTE,
            "memory_usage_percentage": memory.used / memory.total * 100,
        }

    def _utilization(self, handle: Any) -> dict[str, float]:
        return {"utilization_percentage": float(self._nvml.nvmlDeviceGetUtilizationRates(handle).gpu)}

    def _power(self, handle: Any) -> dict[str, float]:
        used, limit = self._nvml.nvmlDeviceGetPowerUsage(handle), self._nvml.nvmlDeviceGetEnforcedPowerLimit(handle)
        return {"power_usage_watts": used / 1000, "power_usage_percentage": used / limit * 100}


def machine_usage(process: psutil.Process) -> dict[str, float]:
    """Return the CPU, memory and disk usage of this machine, and the memory usage of `process`.

    Percentages and megabytes are separate metrics. For the disk, the megabytes are the free space.
    """
    memory, disk = psutil.virtual_memory(), psutil.disk_usage("/")
    values = {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.used / memory.total * 100,
        "process_memory_usage_megabytes": process.memory_info().rss / MEGABYTE,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / MEGABYTE,
    }
    return {name: round(value, 1) for name, value in values.items()}
