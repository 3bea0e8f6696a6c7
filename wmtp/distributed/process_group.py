"""The processes that train together: who this one is, and what they tell each other."""

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
    """Another process could not do its part; its own error says why."""

    def __init__(self, rank: int, message: str, exit_code: int) -> None:
        super().__init__(f"process {rank}: {message}")
        self.rank, self.message, self.exit_code = rank, message, exit_code

    def __reduce__(self) -> tuple[type, tuple[int, str, int]]:
        return OtherProcessFailed, (self.rank, self.message, self.exit_code)


class Processes:
    """This process, number `rank` of `size`. What it is told by the others is plain JSON, or tensors of one shape.

    Every method here must be called by all processes, in the same order. A process alone waits for nobody.
    """

    def __init__(self) -> None:
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    @classmethod
    def alone(cls) -> "Processes":
        """This process without the others, if there are any."""
        processes = cls()
        processes.rank, processes.size = 0, 1
        return processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, tracks and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor; the same bits on all."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def largest(self, *numbers: float) -> list[float]:
        """The largest of every process's numbers, one by one."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        result: list[float] = found.tolist()
        return result

    def broadcast(self, tensor: Tensor, rank: int) -> Tensor:
        """The tensor of one process; the others give one of the same shape and type."""
        if self.size == 1:
            return tensor
        received = tensor.clone()
        dist.broadcast(received, rank)
        return received

    def gather(self, value: Any) -> list[Any]:
        """What every process has to say, by rank."""
        if self.size == 1:
            return [value]
        written = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = int(self.largest(len(written))[0])
        padded = torch.full((length,), ord(" "), dtype=torch.uint8)
        padded[: len(written)] = written
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        return [json.loads(bytes(part.tolist())) for part in gathered]

    def together(self, action: Callable[[], T]) -> T:
        """What this process's action returns; if it failed in one of them, it has failed in all.

        Raises:
            OtherProcessFailed: in the processes that did their part, naming the first that did not.
        """
        result, error = None, None
        try:
            result = action()
        except Exception as problem:  # noqa: BLE001 - it is raised again below, once the others know of it
            error = problem
        failures = self.gather(error and [str(error) or type(error).__name__, getattr(error, "exit_code", 1)])
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure:
                raise OtherProcessFailed(rank, *failure)
        return result  # type: ignore[return-value]

    def from_main(self, action: Callable[[], T]) -> T:
        """What the main process's action returns, as JSON to the others, which wait for it.

        Raises:
            OtherProcessFailed: in the others, if the action failed.
        """
        result = self.together(lambda: action() if self.is_main else None)
        told: list[T] = [result] if self.size == 1 else self.gather(result)  # type: ignore[list-item]
        return told[0]

    def wait(self) -> None:
        """Until all are here."""
        self.largest(0)


def join(device: torch.device, timeout: float) -> None:
    """Meet the processes that the launcher's environment names. A wait for one of them ends after `timeout` seconds."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


def leave() -> None:
    """Part from the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))
