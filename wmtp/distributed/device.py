"""The machine and the precision that a process computes with, alone or with others."""

import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from wmtp.distributed.parallelize import Strategy
from wmtp.distributed.process_group import Processes, local_rank
from wmtp.field_types import Positive, PositiveFloat

Device = Literal["auto", "cpu", "cuda", "mps"]


class Hardware:
    """Where and how to compute. `auto` takes a CUDA GPU, else Apple's MPS, else the CPU."""

    def __init__(
        self,
        *,
        device: Device = "auto",
        precision: Literal["fp32", "bf16"] = "fp32",
        num_processes: Positive = 1,
        strategy: Strategy = "single",
        reduce_each_micro_batch: bool = False,
        activation_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002 - torch's word
        timeout: PositiveFloat = 1800.0,
    ) -> None:
        """Find the device of this process.

        With `reduce_each_micro_batch` gradients are summed over processes after every micro-batch instead of once
        an update: more traffic, but under fsdp a process never holds all of the gradients. `timeout` is how many
        seconds a process waits for another one. A process alone shares its model with none, whatever the `strategy`.
        """
        self.device = device_of(device)
        self.processes = Processes()
        self.precision = precision
        self.strategy: Strategy = strategy if self.processes.size > 1 else "single"
        self.reduce_each_micro_batch = reduce_each_micro_batch
        self.activation_checkpointing, self.compile = activation_checkpointing, compile

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


def device_of(wish: Device) -> torch.device:
    """The device of this process: of several GPUs the one that has its number."""
    kind = found_devices()[0] if wish == "auto" else wish
    return torch.device(kind, local_rank()) if kind == "cuda" else torch.device(kind)


def found_devices() -> list[str]:
    """The kinds of device this machine has, the fastest first."""
    devices = []
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [*devices, "cpu"]


def hardware_problems(device: str, num_processes: int, strategy: str) -> list[tuple[str, str]]:
    """What of the asked-for hardware is not there, or makes no sense: (key, problem) pairs."""
    found = found_devices()
    there = ", ".join(f"{torch.cuda.device_count()} cuda" if name == "cuda" else name for name in found)
    outer, here = os.environ.get("WORLD_SIZE"), int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))
    kind = found[0] if device == "auto" else device
    problems = []
    if kind not in found:
        problems.append(("device", f"this machine has no {kind} device; found: {there} ({os.cpu_count()} cores)"))
    elif kind == "cuda" and here > torch.cuda.device_count():
        remedy = "; more machines need torchrun on each" if outer is None else ""
        problems.append(("num_processes", f"needs one GPU each; found: {there}{remedy}"))
    if outer is not None and int(outer) != num_processes:
        problems.append(("num_processes", f"torchrun has started {outer}; both must agree"))
    if num_processes > 1 and kind == "mps":
        problems.append(("num_processes", "an MPS device serves one process"))
    if num_processes > 1 and strategy == "single":
        problems.append(("strategy", "is of one process; several need ddp or fsdp"))
    return problems
