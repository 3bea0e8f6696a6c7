"""Where randomness comes from, and how it is written down."""

import base64
import hashlib
import logging

import torch

from wmtp.distributed.process_group import Processes

log = logging.getLogger(__name__)


def seed_torch(seed: int, rank: int = 0) -> None:
    """Seed torch's generators, which initialise parameters and draw dropout; for each process others."""
    torch.manual_seed((seed + rank * 0x9E3779B97F4A7C15) % 2**63)


def generator_states() -> dict[str, str]:
    """The state of torch's generators on every device, as text."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def restore_generators(of_processes: list[dict[str, str]], processes: Processes) -> None:
    """Continue the generators where each process's `generator_states` were; devices that are not here are left out.

    Another number of processes draws from new generators, seeded by the state of the first.
    """
    if len(of_processes) != processes.size:
        digest = hashlib.sha256(of_processes[0]["cpu"].encode()).digest()
        seed_torch(int.from_bytes(digest[:7], "big"), processes.rank)
        if processes.is_main:
            log.warning(
                "saved by %d processes, resumed by %d: dropout is drawn anew", len(of_processes), processes.size
            )
        return
    states = of_processes[processes.rank]

    def decoded(device: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(states[device])), dtype=torch.uint8)

    torch.set_rng_state(decoded("cpu"))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(decoded("cuda"))
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(decoded("mps"))
