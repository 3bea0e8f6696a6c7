"""Seed torch's random generators, and save and restore their states."""

import base64
import hashlib
import logging

import torch

from wmtp.distributed.process_group import Processes

log = logging.getLogger(__name__)


def seed_torch(seed: int, rank: int = 0) -> None:
    """Seed torch's random generators, which draw the initial parameters and the dropout masks.

    The generators of each rank receive a different seed.
    """
    torch.manual_seed((seed + rank * 0x9E3779B97F4A7C15) % 2**63)


def generator_states() -> dict[str, str]:
    """Return the states of torch's random generators as base64 text, by device type (`cpu`, `cuda` or `mps`)."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def restore_generators(states_by_rank: list[dict[str, str]], processes: Processes) -> None:
    """Restore the states of this rank's random generators.

    States of device types that this machine does not have are ignored. If the number of ranks has changed since the
    states were saved, the generators are not restored. They are seeded from a hash of the CPU state of rank 0 instead.

    Args:
        states_by_rank: the results of `generator_states` on all ranks when the checkpoint was saved, in the order of
            the ranks.
        processes: the current process group.
    """
    if len(states_by_rank) != processes.size:
        digest = hashlib.sha256(states_by_rank[0]["cpu"].encode()).digest()
        seed_torch(int.from_bytes(digest[:7], "big"), processes.rank)
        if processes.is_main:
            log.warning(
                "saved with %d processes, resumed with %d: dropout masks are drawn from new seeds",
                len(states_by_rank),
                processes.size,
            )
        return
    states = states_by_rank[processes.rank]

    def _decode(device: str) -> torch.Tensor:
        """Return the saved state of the random generator of a device type."""
        return torch.frombuffer(bytearray(base64.b64decode(states[device])), dtype=torch.uint8)

    torch.set_rng_state(_decode("cpu"))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(_decode("cuda"))
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_decode("mps"))
