"""The process group of a run: this process's rank, and collectives."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from wmtp.errors import WmtpError

T = TypeVar("T")


class OtherProcessFailed(WmtpError):
    """A failure of another rank; that rank raises its own error."""

    def __init__(self, rank: int, message: str, exit_code: int) -> None:
        super().__init__(f"process {rank}: {message}")
        self.rank, self.message, self.exit_code = rank, message, exit_code

    def __reduce__(self) -> tuple[type, tuple[int, str, int]]:
        return OtherProcessFailed, (self.rank, self.message, self.exit_code)


class Processes:
    """Rank and size of the process group, and collectives on plain JSON values or on tensors of equal shape.

    All ranks must call the same methods in the same order. Without a process group, `size` is 1 and no method waits.
    """

    def __init__(self) -> None:
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    @classmethod
    def single_process(cls) -> "Processes":
        """Return a group of size 1 with only this process, even if there is a process group."""
        processes = cls()
        processes.rank, processes.size = 0, 1
        return processes

    @property
    def is_main(self) -> bool:
        """True on rank 0, the main process. Only the main process prints, tracks and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of all ranks' tensors, bitwise equal on all ranks."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def max(self, *numbers: float) -> list[float]:
        """Return the maximum over all ranks of each number."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        result: list[float] = found.tolist()
        return result

    def broadcast(self, tensor: Tensor, rank: int) -> Tensor:
        """Return the tensor of one rank; the other ranks pass a tensor of the same shape and type."""
        if self.size == 1:
            return tensor
        received = tensor.clone()
        dist.broadcast(received, rank)
        return received

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in order of rank. A value must be plain JSON."""
        if self.size == 1:
            return [value]
        encoded = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = int(self.max(len(encoded))[0])
        padded = torch.full((length,), ord(" "), dtype=torch.uint8)
        padded[: len(encoded)] = encoded
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        return [json.loads(bytes(part.tolist())) for part in gathered]

    def run_on_all(self, action: Callable[[], T]) -> T:
        """Run an action on every rank and return this rank's result. If it fails on one rank, all raise.

        Raises:
            OtherProcessFailed: the action succeeded here and failed on other ranks; `rank` is the lowest of them.
        """
        result, error = None, None
        try:
            result = action()
        except Exception as problem:  # noqa: BLE001 - raised again below, after the other ranks have received it
            error = problem
        failures = self.gather(error and [str(error) or type(error).__name__, getattr(error, "exit_code", 1)])
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure:
                raise OtherProcessFailed(rank, *failure)
        return result  # type: ignore[return-value]

    def run_on_main(self, action: Callable[[], T]) -> T:
        """Run an action in the main process and return its result on all ranks, which receive it as JSON.

        Raises:
            OtherProcessFailed: the action failed in the main process; raised on the other ranks.
        """
        result = self.run_on_all(lambda: action() if self.is_main else None)
        results: list[T] = [result] if self.size == 1 else self.gather(result)  # type: ignore[list-item]
        return results[0]

    def barrier(self) -> None:
        """Wait until all ranks have called this method."""
        self.max(0)


def join_group(device: torch.device, timeout: float) -> None:
    """Join the process group of the launcher's environment. Collectives fail after `timeout` seconds."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


def leave_group() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_rank() -> int:
    """Return the rank of this process among the processes of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))
