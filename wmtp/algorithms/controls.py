"""Controls: weights that look like another algorithm's and carry none of its information.

A weighting that beats uniform training but not its own control has won by something other than
knowing which tokens matter.
"""

import hashlib
import math
from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations, clipped
from wmtp.distributed.process_group import Processes


class Control(Algorithm):
    """Wraps another algorithm and takes everything but the weights' meaning from it."""

    def __init__(self, *, of: Algorithm, seed: int = 0) -> None:
        """`seed` decides the control's own randomness."""
        self.of = of
        self.weight_min, self.weight_max, self.value_coef = of.weight_min, of.weight_max, of.value_coef
        self.needs_values, self.needs_reference, self.reference = of.needs_values, of.needs_reference, of.reference
        self.min_heads, self.needs_truth = of.min_heads, of.needs_truth
        self.uses_losses = "none" if of.uses_losses == "none" else "all"
        self.seed = seed

    @property
    def name(self) -> str:
        """The kind of control, and of what."""
        return f"{type(self).__name__} of {self.of.name}"

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """The wrapped algorithm's weights without their meaning."""
        weights = clipped(self.of.weights(observed), observed.valid, self.of.weight_min, self.of.weight_max)
        # one generator for each micro-batch, so that the draws are the same however processes share them; of its seed
        # torch takes 32 bits, and the epoch stands above them in the number
        digest = hashlib.sha256(f"{self.seed} {observed.number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        return self.emptied(weights, observed, generator)

    @abstractmethod
    def emptied(
        self, weights: Float[Tensor, "head batch position"], observed: Observations, generator: torch.Generator
    ) -> Float[Tensor, "head batch position"]:
        """Weights of like distribution that say nothing of their targets."""

    def finish_update(self, processes: Processes) -> None:
        """Tell the wrapped algorithm."""
        self.of.finish_update(processes)

    def forget_update(self) -> None:
        """Tell the wrapped algorithm."""
        self.of.forget_update()

    def state_dict(self) -> dict[str, Any]:
        """The wrapped algorithm's state."""
        return {"of": self.of.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on weighting."""
        self.of.load_state_dict(state["of"])


class Shuffled(Control):
    """Another algorithm's weights, permuted among the valid targets of each sequence."""

    def emptied(
        self, weights: Float[Tensor, "head batch position"], observed: Observations, generator: torch.Generator
    ) -> Float[Tensor, "head batch position"]:
        """The same weights at other targets of the same sequence."""
        by_sample = weights.transpose(0, 1).flatten(1)
        valid = observed.valid.transpose(0, 1).flatten(1)
        keys = torch.rand(valid.shape, generator=generator).to(weights.device)
        ordered = torch.argsort(~valid, stable=True, dim=1)  # the valid targets first, as they stand …
        drawn = torch.argsort(keys.masked_fill(~valid, 2.0), dim=1)  # … and in random order
        shuffled = torch.zeros_like(by_sample).scatter(1, ordered, by_sample.gather(1, drawn))
        return shuffled.view(weights.shape[1], weights.shape[0], weights.shape[2]).transpose(0, 1)


class Random(Control):
    """Log-normal weights with the mean and the deviation of another algorithm's."""

    def __init__(self, *, of: Algorithm, seed: int = 0) -> None:
        """`seed` decides the draws. Their own range is wide: clipped to the wrapped one, they would vary less."""
        super().__init__(of=of, seed=seed)
        self.weight_min, self.weight_max = 0.0, math.inf

    def emptied(
        self, weights: Float[Tensor, "head batch position"], observed: Observations, generator: torch.Generator
    ) -> Float[Tensor, "head batch position"]:
        """exp of a normal draw whose parameters give the wanted moments."""
        chosen = weights[observed.valid]
        if not len(chosen):
            return weights
        mean, variance = chosen.mean().item(), chosen.var(correction=0).item()
        log_variance = math.log1p(variance / mean**2)
        normal = torch.randn(weights.shape, generator=generator).to(weights.device)
        return torch.exp(normal * math.sqrt(log_variance) + math.log(mean) - log_variance / 2)
