"""Where randomness comes from, and how it is written down."""

import base64

import torch


def seed_torch(seed: int) -> None:
    """Seed torch's generators, which initialise parameters and draw dropout."""
    torch.manual_seed(seed)


def generator_states() -> dict[str, str]:
    """The state of torch's generators on every device, as text."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return {device: base64.b64encode(state.numpy().tobytes()).decode() for device, state in states.items()}


def restore_generators(states: dict[str, str]) -> None:
    """Continue the generators where `generator_states` found them; devices that are not here are left out."""

    def decoded(device: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(states[device])), dtype=torch.uint8)

    torch.set_rng_state(decoded("cpu"))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(decoded("cuda"))
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(decoded("mps"))
