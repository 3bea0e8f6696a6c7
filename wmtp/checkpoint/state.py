"""Convert models and optimizers to named tensors and plain JSON, and load them again."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wmtp.distributed.sharded_io import shard_like

Tensors = dict[str, Tensor]


@dataclass
class Snapshot:
    """A complete training state: named tensors of the model and of the optimizer, and plain JSON.

    A tensor may be sharded over the ranks (DTensor).
    """

    model: Tensors
    optimizer: Tensors
    state: dict[str, Any]


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return the names of the optimizer's parameters in the model, in the optimizer's order."""
    names: dict[int, str] = {}
    for name, parameter in model.state_dict(keep_vars=True).items():  # state_dict also reshards gathered parameters
        names.setdefault(id(parameter), name)
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def split_optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """Return the optimizer's tensors as `<parameter>:<key>`, and its options and plain values as JSON."""
    names = parameter_names(model, optimizer)
    state = optimizer.state_dict()
    tensors: Tensors = {}
    plain: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            kept = tensors if isinstance(value, Tensor) else plain
            kept[f"{names[index]}:{key}"] = value
    return tensors, {"plain": plain, "groups": state["param_groups"]}


def restore_optimizer(model: nn.Module, optimizer: Optimizer, tensors: Tensors, state: dict[str, Any]) -> None:
    """Load the result of `split_optimizer_state` into an optimizer. Full tensors of sharded parameters are sharded."""
    indices = {name: index for index, name in enumerate(parameter_names(model, optimizer))}
    live = model.state_dict()
    tensors = {name: shard_like(tensor, find_live_parameter(name, live)) for name, tensor in tensors.items()}
    entries: dict[int, dict[str, Any]] = {}
    for full_name, value in (tensors | state["plain"]).items():
        name, _, key = full_name.rpartition(":")
        entries.setdefault(indices[name], {})[key] = value
    for group in state["groups"]:  # JSON has lists where torch's options are tuples
        group.update({key: tuple(value) for key, value in group.items() if key != "params" and isinstance(value, list)})
    optimizer.load_state_dict({"state": entries, "param_groups": state["groups"]})


def load_model(model: nn.Module, tensors: Tensors, known: Collection[str] = ()) -> None:
    """Load tensors into a model. Full tensors of sharded parameters are sharded.

    Names and shapes must be those of the model. Parameters in `known` keep their values, and `tensors` may lack them.

    Raises:
        RuntimeError: names or shapes differ.
    """
    live = model.state_dict()
    kept = {name: live[name] for name in known}
    loaded = {name: shard_like(tensor, live.get(name)) for name, tensor in tensors.items()}
    with torch.no_grad():
        model.load_state_dict(kept | loaded, strict=True)


def find_live_parameter(name: str, live: Mapping[str, Tensor]) -> Tensor | None:
    """Return the live parameter to which a stored tensor `<parameter>` or `<parameter>:<key>` belongs, or None."""
    return live.get(name, live.get(name.rpartition(":")[0]))
