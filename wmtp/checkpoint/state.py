"""What a checkpoint holds of each object: tensors for safetensors, the rest as plain JSON."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from wmtp.distributed.sharded_io import cut_like

Tensors = dict[str, Tensor]


@dataclass
class Snapshot:
    """A whole training state: two sets of named tensors and plain JSON.

    Tensors that are spread over processes (DTensor) stand for whole ones.
    """

    model: Tensors
    optimizer: Tensors
    state: dict[str, Any]


def parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """The model's name of each parameter, in the optimizer's order."""
    names: dict[int, str] = {}
    for name, parameter in model.state_dict(keep_vars=True).items():  # which brings gathered parameters back to parts
        names.setdefault(id(parameter), name)
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def split_optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """The optimizer's tensors as `<parameter>:<key>`, and its options and plain values as JSON."""
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
    """Put back what `split_optimizer_state` gave; whole tensors of parameters that are spread are cut."""
    indices = {name: index for index, name in enumerate(parameter_names(model, optimizer))}
    live = model.state_dict()
    tensors = {name: cut_like(tensor, live_counterpart(name, live)) for name, tensor in tensors.items()}
    entries: dict[int, dict[str, Any]] = {}
    for full_name, value in (tensors | state["plain"]).items():
        name, _, key = full_name.rpartition(":")
        entries.setdefault(indices[name], {})[key] = value
    for group in state["groups"]:  # JSON has lists where torch's options are tuples
        group.update({key: tuple(value) for key, value in group.items() if key != "params" and isinstance(value, list)})
    optimizer.load_state_dict({"state": entries, "param_groups": state["groups"]})


def load_model(model: nn.Module, tensors: Tensors, known: Collection[str] = ()) -> None:
    """Fill a model; every name and shape must agree. Whole tensors of parameters that are spread are cut.

    Tensors that are `known` already need not be among those given.
    """
    live = model.state_dict()
    there = {name: live[name] for name in known}
    filled = {name: cut_like(tensor, live.get(name)) for name, tensor in tensors.items()}
    with torch.no_grad():
        model.load_state_dict(there | filled, strict=True)


def live_counterpart(name: str, live: Mapping[str, Tensor]) -> Tensor | None:
    """The parameter that a stored tensor is, or in `<parameter>:<key>` belongs to."""
    return live.get(name, live.get(name.rpartition(":")[0]))
