"""Choose the device, the precision and the parallelism of a run."""

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
    """The hardware options of a run.

    `device=auto` selects the first available device in this order: a CUDA GPU, Apple's MPS, the CPU.
    """

    def __init__(
        self,
        *,
        device: Device = "auto",
        precision: Literal["fp32", "bf16"] = "fp32",
        num_processes: Positive = 1,
        strategy: Strategy = "single",
        reduce_each_micro_batch: bool = False,
        activation_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002 - name of torch's function
        timeout: PositiveFloat = 1800.0,
    ) -> None:
        """Select the device of this process.

        Args:
            device: type of the device. `auto` selects the fastest device of this machine.
            precision: number format of matrix products. The parameters are always fp32.
            num_processes: number of ranks.
            strategy: "ddp" or "fsdp" if there are several ranks. With one rank, this option has no effect.
            reduce_each_micro_batch: True to average the gradients over the ranks after every micro-batch, False to do
                so once per update. True needs more communication. With fsdp, however, no rank then stores full
                gradients.
            activation_checkpointing: True to recompute activations in the backward pass instead of storing them.
            compile: True to compile the model's blocks with torch.compile.
            timeout: seconds after which a collective operation of the ranks fails.
        """
        self.device = resolve_device(device)
        self.processes = Processes()
        self.precision = precision
        self.strategy: Strategy = strategy if self.processes.size > 1 else "single"
        self.reduce_each_micro_batch = reduce_each_micro_batch
        self.activation_checkpointing, self.compile = activation_checkpointing, compile

    def autocast(self) -> AbstractContextManager[object]:
        """Return a context in which matrix products have the chosen precision."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def peak_memory(self) -> int:
        """Return the peak memory use in bytes.

        On a CUDA GPU, this is the peak memory of this process's tensors on the GPU. On other devices, it is the peak
        main memory of this process.
        """
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def resolve_device(device: Device) -> torch.device:
    """Return the device of this process. The index of a CUDA GPU is the rank of this process within its machine."""
    kind = wanted_device(device)
    return torch.device(kind, local_rank()) if kind == "cuda" else torch.device(kind)


def found_devices() -> list[str]:
    """Return the device types of this machine, fastest first."""
    devices = []
    if torch.cuda.is_available():
        devices.append("cuda")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [*devices, "cpu"]


def missing_hardware(device: str, num_processes: int) -> tuple[str, str] | None:
    """Return the hardware option that this machine cannot satisfy, with a description of its problem; None if all are.

    All processes of a machine need a GPU each.
    """
    found, kind = found_devices(), wanted_device(device)
    available = ", ".join(f"{torch.cuda.device_count()} cuda" if name == "cuda" else name for name in found)
    if kind not in found:
        return "device", f"this machine has no {kind} device; found: {available} ({os.cpu_count()} cores)"
    if kind == "cuda" and int(os.environ.get("LOCAL_WORLD_SIZE", num_processes)) > torch.cuda.device_count():
        remedy = "; more machines need torchrun on each" if "WORLD_SIZE" not in os.environ else ""
        return "num_processes", f"needs one GPU each; found: {available}{remedy}"
    return None


def wanted_device(device: str) -> str:
    """Return the type of device that a config asks for. With `auto`, this is the fastest device of this machine."""
    return found_devices()[0] if device == "auto" else device


def hardware_issues(device: str, num_processes: int, strategy: str) -> list[tuple[str, str]]:
    """Return the hardware options that this machine cannot satisfy or that contradict each other.

    Returns:
        The name of each such option, with a description of its problem.
    """
    missing, world_size = missing_hardware(device, num_processes), os.environ.get("WORLD_SIZE")
    problems = [] if missing is None else [missing]
    if world_size is not None and int(world_size) != num_processes:
        problems.append(
            (
                "num_processes",
                f"WORLD_SIZE={world_size} in the environment says that {world_size} processes were started; set "
                f"hardware.num_processes={world_size} or, if they were not started, run: unset RANK WORLD_SIZE",
            )
        )
    if num_processes > 1 and wanted_device(device) == "mps":
        problems.append(("num_processes", "must be 1 on an MPS device"))
    if num_processes > 1 and strategy == "single":
        problems.append(("strategy", "single is for one process; several processes need ddp or fsdp"))
    return problems
