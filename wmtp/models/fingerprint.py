"""Which weights a network has, in a few letters."""

import hashlib

import torch
from torch import nn


def weights_fingerprint(model: nn.Module, without: str = "-") -> str:
    """A hash of every tensor of a network by name, except those whose name begins with `without`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith(without):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
