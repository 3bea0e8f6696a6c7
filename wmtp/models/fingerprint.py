"""Which weights a network has, in a few letters."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def weights_fingerprint(model: nn.Module, without: str = "-") -> str:
    """A hash of every tensor of a network by name, except those whose name begins with `without`."""
    return tensors_fingerprint({n: tensor for n, tensor in model.state_dict().items() if not n.startswith(without)})


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of some tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
