"""Controls. A control replaces the weights of another algorithm by random weights with a similar distribution.

An algorithm can be better than uniform weights although it is not better than its control. Then the reason for the
improvement is not that the algorithm gives large weights to the important tokens.
"""

import hashlib
import math
from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations, clip_weights
from wmtp.distributed.process_group import Processes


class Control(Algorithm):
    """A wrapper of another algorithm. It replaces the weights by weights that are independent of their targets."""

    def __init__(self, *, of: Algorithm, seed: int = 0) -> None:
        """Wrap the algorithm `of`. `seed` is the seed of the control's random numbers."""
        self.of = of
        self.weight_min, self.weight_max, self.value_coef = of.weight_min, of.weight_max, of.value_coef
        self.needs_values, self.needs_reference, self.reference = of.needs_values, of.needs_reference, of.reference
        self.min_heads, self.needs_token_labels = of.min_heads, of.needs_token_labels
        self.uses_losses = "none" if of.uses_losses == "none" else "all"
        self.seed = seed

    @property
    def name(self) -> str:
        """The kind of control and the name of the wrapped algorithm."""
        return f"{type(self).__name__} of {self.of.name}"

    def weights(self, observed: Observations) -> Float[Tensor, "head batch position"]:
        """Return weights that are distributed like the wrapped algorithm's, but independent of the targets."""
        weights = clip_weights(self.of.weights(observed), observed.valid, self.of.weight_min, self.of.weight_max)
        # With one generator per micro-batch, the draws do not depend on the number of processes. The number of the
        # micro-batch is hashed, because torch uses only 32 bits of a seed, and the epoch is in its higher bits.
        digest = hashlib.sha256(f"{self.seed} {observed.number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        return self.uninformative(weights, observed, generator)

    @abstractmethod
    def uninformative(
        self, weights: Float[Tensor, "head batch position"], observed: Observations, generator: torch.Generator
    ) -> Float[Tensor, "head batch position"]:
        """Return weights that are independent of their targets. Their distribution is similar to that of `weights`."""

    def finish_update(self, processes: Processes) -> None:
        """Update the state of the wrapped algorithm."""
        self.of.finish_update(processes)

    def discard_update(self) -> None:
        """Discard the statistics that the wrapped algorithm has of an update that was skipped."""
        self.of.discard_update()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped algorithm."""
        return {"of": self.of.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the wrapped algorithm."""
        self.of.load_state_dict(state["of"])


class Shuffled(Control):
    """A control that permutes the weights among the valid targets of each sequence."""

    def uninformative(
        self, weights: Float[Tensor, "head batch position"], observed: Observations, generator: torch.Generator
    ) -> Float[Tensor, "head batch position"]:
        """Return the same weights, permuted within each sequence."""
        by_sample = weights.transpose(0, 1).flatten(1)
        valid = observed.valid.transpose(0, 1).flatten(1)
        keys = torch.rand(valid.shape, generator=generator).to(weights.device)
        ordered = torch.argsort(~valid, stable=True, dim=1)  # valid targets first, in their order …
        drawn = torch.argsort(keys.masked_fill(~valid, 2.0), dim=1)  # … and in random order
        shuffled = torch.zeros_like(by_sample).scatter(1, ordered, by_sample.gather(1, drawn))
        return shuffled.view(weights.shape[1], weights.shape[0], weights.shape[2]).transpose(0, 1)


class Random(Control):
    """A control that draws log-normal weights with the mean and the variance of the wrapped algorithm's weights."""

    def __init__(self, *, of: Algorithm, seed: int = 0) -> None:
        """Wrap the algorithm `of`. `seed` is the seed of the random weights.

        Random weights are not clipped to the range of the wrapped algorithm, because they would then vary less than
        the weights of that algorithm.
        """
        super().__init__(of=of, seed=seed)
        self.weight_min, self.weight_max = 0.0, math.inf

    def uninformative(
        self, weights: Float[Tensor, "head batch position"], observed: Observations, generator: torch.Generator
    ) -> Float[Tensor, "head batch position"]:
        """Return log-normal random numbers. Their expected mean and variance are those of `weights`."""
        chosen = weights[observed.valid]
        if not len(chosen):
            return weights
        mean, variance = chosen.mean().item(), chosen.var(correction=0).item()
        log_variance = math.log1p(variance / mean**2)
        normal = torch.randn(weights.shape, generator=generator).to(weights.device)
        return torch.exp(normal * math.sqrt(log_variance) + math.log(mean) - log_variance / 2)
