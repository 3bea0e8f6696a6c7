"""Low-rank adapters of the trunk, by peft; the only module that knows it.

Source: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models (arXiv 2106.09685), section 4.
"""

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn

from wmtp.errors import InputError
from wmtp.field_types import Positive

ADAPTER = "lora_"
"""Is in the name of every tensor of an adapter."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters ΔW = alpha / rank · B·A beside the matrices of the trunk, whose own numbers stay as they are."""

    rank: Positive | None = None
    """Columns of B; None: no adapters, everything is trained."""
    alpha: Positive | None = None
    """None: twice the rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] | None = None
    """The last part of the names of the modules that get one; None: all matrices of the trunk."""

    def inject(self, trunk: nn.ModuleList) -> None:
        """Put adapters into the blocks, in place.

        Raises:
            InputError: a target names no matrix of the trunk.
        """
        from peft import LoraConfig, inject_adapter_in_model  # imports transformers, which takes seconds

        there = matrices(trunk)
        if unknown := self.unknown_targets(trunk):
            listed = ", ".join(there)
            raise InputError(f"model.lora.targets={','.join(unknown)}: the trunk has no such matrix; it has {listed}")
        targets = self.targets or there
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
        """The targets that name no matrix of the trunk."""
        return sorted(set(self.targets or ()) - set(matrices(trunk)))


def is_transposed(layer: nn.Module) -> bool:
    """Whether a matrix has its inputs as rows, as GPT-2's do."""
    return type(layer).__name__ == "Conv1D"


def named_matrices(trunk: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that multiply by a matrix, with their names."""
    return [(name, m) for name, m in trunk.named_modules() if isinstance(m, nn.Linear) or is_transposed(m)]


def matrices(trunk: nn.Module) -> list[str]:
    """The last parts of the names of the layers that multiply by a matrix."""
    return sorted({name.rpartition(".")[2] for name, _ in named_matrices(trunk)})


def effective_weight(layer: Any) -> Tensor:
    """The matrix that a linear layer multiplies by, its adapter included."""
    if not hasattr(layer, "get_base_layer"):
        plain: Tensor = layer.weight
        return plain
    weight: Tensor = layer.get_base_layer().weight
    for name in layer.active_adapters:
        weight = weight + layer.get_delta_weight(name).to(weight.dtype)
    return weight


def merge(module: nn.Module) -> None:
    """Add every adapter to the matrix that it stands beside, in place, and take it out."""
    for name, child in list(module.named_children()):
        adapted: Any = child
        if hasattr(adapted, "get_base_layer"):
            adapted.merge(safe_merge=True)
            setattr(module, name, adapted.get_base_layer())
        else:
            merge(child)
