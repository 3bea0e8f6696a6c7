"""Controls. A control replaces the weights of another algorithm by random weights with a similar distribution.

An algorithm can be better than uniform weights although it is not better than its control. Then the reason for the
improvement is not that the algorithm gives large weights to the important tokens.
"""

import hashlib
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from wmtp.algorithms.base import Algorithm, Observations, UpdateAlgorithm, clip_weights
from wmtp.data.split import TokenizedSplit
from wmtp.distributed.process_group import Processes
from wmtp.errors import InputError
from wmtp.ops.metric_sums import moments


class Control(UpdateAlgorithm):
    """A wrapper of another algorithm. It replaces the weights by weights that are independent of their targets."""

    def __init__(self, *, of: Algorithm, seed: int = 0) -> None:
        """Wrap the algorithm `of`. `seed` is the seed of the control's random numbers."""
        self.of, self.seed = of, seed
        for name in Algorithm.__annotations__:  # what the wrapped algorithm needs, and the range of its weights
            setattr(self, name, getattr(of, name))
        self.uses_losses = "none" if of.uses_losses == "none" else "all"

    @property
    def name(self) -> str:
        """The kind of control and the name of the wrapped algorithm."""
        return f"{type(self).__name__} of {self.of.name}"

    @property
    def settings(self) -> dict[str, Any]:
        """The seed, and the name and the settings of the wrapped algorithm."""
        return {"of": self.of.name, "seed": self.seed} | {f"of.{name}": x for name, x in self.of.settings.items()}

    def update_weights(self, observed: Sequence[Observations], processes: Processes) -> list[Float[Tensor, "head _ _"]]:
        """Return weights that are distributed like the wrapped algorithm's, but independent of the targets."""
        weights = [
            clip_weights(weight, each.valid, self.of.weight_min, self.of.weight_max)
            for weight, each in zip(self.of.update_weights(observed, processes), observed, strict=True)
        ]
        return self.uninformative(weights, observed, processes)

    def draws(
        self, observed: Observations, distribution: Callable[..., Tensor]
    ) -> Float[Tensor, "head batch position"]:
        """Return a random number for each valid target, and 0 for the others.

        Each sample has its own generator, so the draws depend only on the seed and on the sample, not on how an update
        is split into micro-batches and ranks. The name of the sample is hashed, because torch uses only 32 bits of a
        seed. `distribution` is torch.rand or torch.randn.
        """
        valid = observed.valid.cpu()
        draws = torch.zeros(valid.shape)
        for row, name in enumerate(observed.samples):
            digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
            mask = valid[:, row]
            draws[:, row][mask] = distribution(int(mask.sum()), generator=generator)
        return draws.to(observed.valid.device)

    @abstractmethod
    def uninformative(
        self, weights: Sequence[Tensor], observed: Sequence[Observations], processes: Processes
    ) -> list[Float[Tensor, "head _ _"]]:
        """Return weights that are independent of their targets. Their distribution is similar to that of `weights`."""

    def prepare(self, data: TokenizedSplit) -> None:
        """Compute the constants of the wrapped algorithm."""
        self.of.prepare(data)

    def finish_update(self) -> None:
        """Update the state of the wrapped algorithm."""
        self.of.finish_update()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the wrapped algorithm."""
        return {"of": self.of.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the wrapped algorithm."""
        self.of.load_state_dict(state["of"])


class Shuffled(Control):
    """A control that permutes the weights of each head among the valid targets of each sequence."""

    def __init__(self, *, of: Algorithm, seed: int = 0) -> None:
        """Wrap the algorithm `of`. `seed` is the seed of the permutations.

        Raises:
            InputError: all targets of a sequence have the same weight, so permutations change nothing.
        """
        super().__init__(of=of, seed=seed)
        if of.weighs_solutions:
            raise InputError(
                f"shuffled would change nothing, because {of.name} gives all targets of a solution the same weight; "
                "choose algo=random instead"
            )

    def uninformative(
        self, weights: Sequence[Tensor], observed: Sequence[Observations], processes: Processes
    ) -> list[Float[Tensor, "head _ _"]]:
        """Return the same weights, permuted within each sequence and head.

        The heads keep their own weights, because their losses and therefore their weights differ in size.
        """
        return [
            permuted(weight, each.valid, self.draws(each, torch.rand))
            for weight, each in zip(weights, observed, strict=True)
        ]


def permuted(
    weights: Float[Tensor, "head batch position"],
    valid: Bool[Tensor, "head batch position"],
    keys: Float[Tensor, "head batch position"],
) -> Float[Tensor, "head batch position"]:
    """Return weights that are permuted among the valid positions of each row of each head, in the order of `keys`."""
    ordered = torch.argsort(~valid, stable=True, dim=-1)  # valid targets first, in their order …
    drawn = torch.argsort(keys.masked_fill(~valid, 2.0), dim=-1)  # … and in random order
    return torch.zeros_like(weights).scatter(-1, ordered, weights.gather(-1, drawn))


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
        self, weights: Sequence[Tensor], observed: Sequence[Observations], processes: Processes
    ) -> list[Float[Tensor, "head _ _"]]:
        """Return log-normal random numbers. Their expected mean and variance are those of the weights of the update."""
        drawn = [torch.zeros_like(weight) for weight in weights]
        normal = [self.draws(each, torch.randn) for each in observed]
        heads = len(weights[0]) if self.of.uses_losses != "none" else 1  # weights from losses are scaled head by head
        for group in torch.arange(len(weights[0])).tensor_split(heads):
            masks = [each.valid[group] for each in observed]
            mean, variance = moments([weight[group] for weight in weights], masks, processes) or (0.0, 0.0)
            if mean == 0:  # no target, or no weight above 0
                continue
            log_variance = math.log1p(variance / mean**2)
            shift = math.log(mean) - log_variance / 2
            for new, draws in zip(drawn, normal, strict=True):
                new[group] = torch.exp(draws[group] * math.sqrt(log_variance) + shift)
        return [new.where(weight.isfinite(), torch.nan) for new, weight in zip(drawn, weights, strict=True)]
