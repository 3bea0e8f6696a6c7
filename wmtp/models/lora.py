"""Low-rank adapters of the trunk, implemented with peft. No other module imports peft.

Source: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), section 4.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from wmtp.errors import InputError
from wmtp.field_types import Positive

ADAPTER_SUBSTRING = "lora_"
"""A substring that the name of every adapter tensor contains."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """The settings of low-rank adapters for the trunk.

    An adapter adds ΔW = alpha / rank · B·A to a frozen matrix W of the trunk. The matrices A and B are trained.
    """

    rank: Positive | None = None
    """Number of columns of B. None means that the model has no adapters and all parameters are trained."""
    alpha: Positive | None = None
    """Numerator of the factor alpha / rank. None means twice the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] | None = None
    """Last components of the names of the modules that get adapters. None means all matrices of the trunk."""

    def inject(self, trunk: nn.ModuleList) -> None:
        """Add adapters to the blocks of the trunk in place.

        Raises:
            InputError: `targets` contains a name that no matrix of the trunk has.
        """
        from peft import LoraConfig, inject_adapter_in_model  # imports transformers, which takes seconds

        available = matrix_names(trunk)
        if unknown := self.unknown_targets(trunk):
            listed = ", ".join(available)
            raise InputError(f"model.lora.targets={','.join(unknown)}: the trunk has no such matrix; it has {listed}")
        targets = self.targets or available
        assert self.rank is not None
        inject_adapter_in_model(
            LoraConfig(
                r=self.rank, lora_alpha=self.alpha or 2 * self.rank, lora_dropout=self.dropout, bias="none",
                target_modules=[name for name, layer in named_matrices(trunk) if name.rpartition(".")[2] in targets],
                fan_in_fan_out=any(is_transposed(layer) for _, layer in named_matrices(trunk)),
            ),
            trunk,
        )  # fmt: skip

    def unknown_targets(self, trunk: nn.ModuleList) -> list[str]:
        """Return a sorted list of the names in `targets` that no matrix of the trunk has."""
        return sorted(set(self.targets or ()) - set(matrix_names(trunk)))


def is_transposed(layer: nn.Module) -> bool:
    """Return whether a linear layer stores its weight with the shape (inputs, outputs), as in GPT-2."""
    return type(layer).__name__ == "Conv1D"


def named_matrices(trunk: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the name and the module of every linear layer in the trunk."""
    return [(name, m) for name, m in trunk.named_modules() if isinstance(m, nn.Linear) or is_transposed(m)]


def matrix_names(trunk: nn.Module) -> list[str]:
    """Return a sorted list of the distinct last components of the names of the trunk's linear layers."""
    return sorted({name.rpartition(".")[2] for name, _ in named_matrices(trunk)})


def effective_weight(layer: Any) -> Tensor:
    """Return the weight of a linear layer after adding the weight updates of its active adapters."""
    if not hasattr(layer, "get_base_layer"):
        plain: Tensor = layer.weight
        return plain
    weight: Tensor = layer.get_base_layer().weight
    for name in layer.active_adapters:
        weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight


def merge_adapters(module: nn.Module) -> None:
    """Merge every adapter into the weight of its layer in place, and remove the adapter."""
    for name, child in list(module.named_children()):
        adapted: Any = child
        if hasattr(adapted, "get_base_layer"):
            adapted.merge(safe_merge=True)
            setattr(module, name, adapted.get_base_layer())
        else:
            merge_adapters(child)
