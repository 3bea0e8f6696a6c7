"""Where a model comes from: its tokenizer, its architecture, and the parameters that training starts from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch

from wmtp.data.tokenization import Tokenizer
from wmtp.models.architecture import Architecture
from wmtp.models.fingerprint import tensors_fingerprint
from wmtp.models.lora import Lora
from wmtp.models.mtp import MtpModel, empty_model

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
        """The longest text that the model can read at all; None: there is no limit."""
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
