"""Convert the state of a model and an optimizer to named tensors and plain JSON, and load such a state."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wmtp.distributed.sharded_io import shard_like

Tensors = dict[str, Tensor]
OBJECTIVE = "objective:"
"""Prefix of the names of the objective's tensors."""


@dataclass
class Snapshot:
    """A complete training state, which consists of tensors and plain JSON.

    The tensors are stored by name. A tensor may be sharded over the ranks (DTensor). `optimizer` contains the tensors
    of the optimizer, and those of the objective, whose names start with "objective:".
    """

    model: Tensors
    optimizer: Tensors
    state: dict[str, Any]

    def objective_state(self) -> dict[str, Any]:
        """Return the state of the objective, which `split_objective_state` has split."""
        tensors = {n.removeprefix(OBJECTIVE): tensor for n, tensor in self.optimizer.items() if n.startswith(OBJECTIVE)}
        return {**self.state["objective"], **tensors}


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return the names that the model gives to the optimizer's parameters, in the order of the optimizer."""
    names: dict[int, str] = {}
    for name, parameter in model.state_dict(keep_vars=True).items():  # state_dict also reshards gathered parameters
        names.setdefault(id(parameter), name)
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def split_optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """Split the state of an optimizer into tensors and plain JSON.

    Returns:
        The tensors, each with the name `<parameter>:<key>`, and the options and plain values of the optimizer.
    """
    names = parameter_names(model, optimizer)
    state = optimizer.state_dict()
    tensors: Tensors = {}
    plain: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            kept = tensors if isinstance(value, Tensor) else plain
            kept[f"{names[index]}:{key}"] = value
    return tensors, {"plain": plain, "groups": state["param_groups"]}


def split_objective_state(state: dict[str, Any]) -> tuple[Tensors, dict[str, Any]]:
    """Split the state of an objective into tensors, whose names get the prefix "objective:", and plain JSON."""
    tensors = {OBJECTIVE + name: value for name, value in state.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in state.items() if not isinstance(value, Tensor)}


def restore_optimizer(model: nn.Module, optimizer: Optimizer, tensors: Tensors, state: dict[str, Any]) -> None:
    """Load the tensors and the plain JSON from `split_optimizer_state` into an optimizer.

    Tensors of the objective are left out. If a parameter of the model is sharded, its full tensors are sharded in the
    same way before they are loaded.
    """
    indices = {name: index for index, name in enumerate(parameter_names(model, optimizer))}
    live = model.state_dict()
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(OBJECTIVE)}
    tensors = {name: shard_like(tensor, find_live_parameter(name, live)) for name, tensor in tensors.items()}
    entries: dict[int, dict[str, Any]] = {}
    for full_name, value in (tensors | state["plain"]).items():
        name, _, key = full_name.rpartition(":")
        entries.setdefault(indices[name], {})[key] = value
    for group in state["groups"]:  # JSON has lists where torch's options are tuples
        group.update({key: tuple(value) for key, value in group.items() if key != "params" and isinstance(value, list)})
    optimizer.load_state_dict({"state": entries, "param_groups": state["groups"]})


def load_model(model: nn.Module, tensors: Tensors, known: Collection[str] = ()) -> None:
    """Load tensors into the parameters and buffers of a model.

    If a parameter of the model is sharded, its full tensor is sharded in the same way before it is loaded.

    Args:
        model: the model to change.
        tensors: tensors by name. Their names and shapes must be those of the model's parameters and buffers.
        known: names that `tensors` may lack. A parameter or buffer that `tensors` lacks keeps its value.

    Raises:
        RuntimeError: the names or the shapes of the tensors differ from those of the model.
    """
    live = model.state_dict()
    kept = {name: live[name] for name in known}
    loaded = {name: shard_like(tensor, live.get(name)) for name, tensor in tensors.items()}
    with torch.no_grad():
        model.load_state_dict(kept | loaded, strict=True)


def find_live_parameter(name: str, live: Mapping[str, Tensor]) -> Tensor | None:
    """Return the parameter in memory to which a stored tensor belongs, or None if there is no such parameter.

    Args:
        name: name of the stored tensor, which is `<parameter>` or `<parameter>:<key>`.
        live: parameters in memory, by name.
    """
    return live.get(name, live.get(name.rpartition(":")[0]))
