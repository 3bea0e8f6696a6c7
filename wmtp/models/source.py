"""Where a model comes from: its tokenizer, its architecture, and the parameters that training starts from."""

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from wmtp.data.tokenizer import Tokenizer
from wmtp.errors import InputError
from wmtp.models.architecture import Architecture
from wmtp.models.lora import Lora, matrices
from wmtp.models.mtp import MtpModel, empty_model

log = logging.getLogger(__name__)
Problem = tuple[str, str, str]
"""A key below `model`, its value, and what is wrong with it."""


class ModelSource(ABC):
    """A model that can be made."""

    tokenizer: Tokenizer | None
    """None where the source is only looked at: no model is made of it then."""
    is_pretrained = False
    """Whether its parameters have learned something."""
    lora: Lora | None = None
    value_head_dim: int | None = None

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """H, as it will be."""

    @property
    def max_positions(self) -> int | None:
        """The longest text that the model can read at all; None: there is no limit, or none is known yet."""
        return None

    @abstractmethod
    def architecture(self) -> Architecture:
        """All but the parameters.

        Raises:
            InputError: what describes it is missing or wrong.
        """

    @abstractmethod
    def begin(self) -> MtpModel:
        """The model as training begins, without adapters, in main memory; what is drawn, torch's generator draws.

        Raises:
            InputError: its files are missing, damaged, or of another shape.
        """

    def problems(self) -> Iterator[Problem]:
        """What is wrong with it, as far as that can be told before weights are loaded."""
        yield from ()

    def files(self) -> dict[str, bytes]:
        """What a run keeps of the source, so that its checkpoints can be used without it."""
        return {}

    def new(self) -> MtpModel:
        """The model as training begins, with its adapters.

        Raises:
            InputError: as `begin`, or the adapters name modules that are not there.
        """
        if self.lora is None:
            return self.begin()
        empty_model(self.architecture(), self.lora)  # wrong names are told before anything is loaded
        begun = self.begin()
        model = MtpModel(begun.architecture, begun.parts(), lora=self.lora, value_head_dim=self.value_head_dim)
        state = model.state_dict()
        model.base_fingerprint = tensors_fingerprint({name: state[name] for name in model.base})
        return model

    def blank(self) -> MtpModel:
        """The model with memory for all parameters, to be filled from a checkpoint; what that lacks is there."""
        if self.lora is not None:
            return self.new()
        model = empty_model(self.architecture(), value_head_dim=self.value_head_dim)
        model.to_empty(device=torch.get_default_device())
        model.positions = model.architecture.positions()
        return model


class PretrainedSource(ModelSource):
    """A model whose parameters lie in a folder, and which may get more heads than it has there."""

    is_pretrained = True
    key = "model.path"
    """Where the user named the folder."""
    path: Path
    wanted_heads: int | None
    """None: as many as there are."""
    create_heads: bool

    @property
    @abstractmethod
    def stored_heads(self) -> int:
        """How many heads the folder has, of the kind that is asked for."""

    @property
    def num_heads(self) -> int:
        """As it was asked for, or as many as there are."""
        wanted = self.wanted_heads or self.stored_heads
        return wanted if self.create_heads else min(wanted, self.stored_heads)

    def error(self, problem: str) -> InputError:
        """What is wrong with the folder."""
        return InputError(f"{self.key}={self.path}: {problem}")

    def adapter_problems(self) -> Iterator[Problem]:
        """Adapters that the trunk has no place for."""
        if self.lora is None:
            return
        with torch.device("meta"):
            trunk = nn.ModuleList(self.architecture().parts().trunk)
        if not trunk:
            yield "lora.rank", str(self.lora.rank), "the trunk has no blocks that could have adapters"
        elif unknown := self.lora.unknown_targets(trunk):
            there = ", ".join(matrices(trunk))
            yield "lora.targets", ",".join(unknown), f"the trunk has no such matrix; it has {there}"

    def announce_heads(self) -> None:
        """Say that the model has other heads than its folder, or than were asked for."""
        stored, made = self.stored_heads, self.num_heads
        if made < (self.wanted_heads or made):
            log.warning(
                "model.num_heads=%s, but %s has %d, and model.create_heads=false: the model has %d",
                self.wanted_heads, self.path, stored, made,
            )  # fmt: skip
        elif made > stored:
            log.warning("%s has %d of %d heads; the others are new, and begin as head 1", self.path, stored, made)

    def require_embeddings(self, size: int) -> None:
        """Raises `InputError` where the model has fewer embeddings than its tokenizer has tokens."""
        assert self.tokenizer is not None
        if size < self.tokenizer.vocab_size:
            raise self.error(f"has embeddings for {size} tokens, its tokenizer has {self.tokenizer.vocab_size}")


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
