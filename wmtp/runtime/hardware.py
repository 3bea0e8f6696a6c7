"""The device a process trains on, and the precision it computes in."""

import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from wmtp.annotations import Positive

Device = Literal["auto", "cpu", "cuda", "mps"]


class Hardware:
    """Where and how to compute. `auto` takes a CUDA GPU, else Apple's MPS, else the CPU."""

    def __init__(
        self,
        *,
        device: Device = "auto",
        precision: Literal["fp32", "bf16"] = "fp32",
        num_processes: Positive = 1,
        strategy: Literal["single", "ddp", "fsdp"] = "single",
    ) -> None:
        self.device = torch.device(found_devices()[0] if device == "auto" else device)
        self.precision = precision
        self.num_processes = num_processes
        self.strategy = strategy

    def autocast(self) -> AbstractContextManager[object]:
        """Inside, matrix products run in the chosen precision; parameters stay fp32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def peak_memory(self) -> int:
        """Bytes: the most that tensors took on the GPU, or that the process took elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def found_devices() -> list[str]:
    """The kinds of device this machine has, the fastest first."""
    devices = []
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [*devices, "cpu"]


def hardware_problems(device: str, num_processes: int, strategy: str) -> list[tuple[str, str]]:
    """What of the asked-for hardware is not there: (key, problem) pairs."""
    found = found_devices()
    there = ", ".join(f"{torch.cuda.device_count()} cuda" if name == "cuda" else name for name in found)
    problems = []
    if device != "auto" and device not in found:
        problems.append(("device", f"this machine has no {device} device; found: {there} ({os.cpu_count()} cores)"))
    elif device == "cuda" and num_processes > torch.cuda.device_count():
        problems.append(("num_processes", f"needs one GPU each; found: {there}"))
    if num_processes > 1 or strategy != "single":
        problems.append(("num_processes", "this version trains in one process (num_processes=1, strategy=single)"))
    return problems
