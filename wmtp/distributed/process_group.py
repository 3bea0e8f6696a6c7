"""Communicate between the ranks of a process group with collective operations."""

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from wmtp.errors import WmtpError

T = TypeVar("T")


class OtherProcessFailed(WmtpError):
    """An error that reports the failure of another rank. The other rank raises the original error."""

    def __init__(self, rank: int, message: str, exit_code: int) -> None:
        super().__init__(f"process {rank}: {message}")
        self.rank, self.message, self.exit_code = rank, message, exit_code

    def __reduce__(self) -> tuple[type, tuple[int, str, int]]:
        return OtherProcessFailed, (self.rank, self.message, self.exit_code)


class Processes:
    """The rank of this process, the number of ranks (`size`), and collective operations between the ranks.

    All ranks must call the same methods in the same order. Without a process group, `size` is 1, and no method waits
    for another process.
    """

    def __init__(self) -> None:
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    @classmethod
    def single_process(cls) -> "Processes":
        """Return a group that contains only this process, even if this process has joined a larger process group."""
        processes = cls()
        processes.rank, processes.size = 0, 1
        return processes

    @property
    def is_main(self) -> bool:
        """True on rank 0, which is the main process. Only it prints, records metrics and writes run files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the tensors that the ranks pass. The result is bitwise equal on all ranks."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def max(self, *numbers: float) -> list[float]:
        """Return, for each argument, the maximum of the numbers that the ranks pass."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        result: list[float] = found.tolist()
        return result

    def broadcast(self, tensor: Tensor, rank: int) -> Tensor:
        """Return the tensor that `rank` passes. The other ranks must pass any tensor of the same shape and dtype."""
        if self.size == 1:
            return tensor
        received = tensor.clone()
        dist.broadcast(received, rank)
        return received

    def gather(self, value: Any) -> list[Any]:
        """Return the values that the ranks pass, in the order of the ranks. Each value must be plain JSON."""
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
        """Run an action on every rank, and return its result on this rank.

        If the action fails on a rank, all ranks raise an error.

        Raises:
            OtherProcessFailed: the action succeeded on this rank, but failed on other ranks. The error's `rank` is the
                lowest rank on which the action failed.
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
        """Run an action in the main process and return its result on all ranks. The result must be plain JSON.

        Raises:
            OtherProcessFailed: the action failed in the main process (raised on the other ranks).
        """
        result = self.run_on_all(lambda: action() if self.is_main else None)
        results: list[T] = [result] if self.size == 1 else self.gather(result)  # type: ignore[list-item]
        return results[0]

    def barrier(self) -> None:
        """Wait until all ranks have called this method."""
        self.max(0)


def local_rank() -> int:
    """Return the rank of this process among the processes of the run on the same machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))
