"""Interface of model sources, which create a model for the start of training or to load a checkpoint into."""

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
from wmtp.models.lora import Lora, matrix_names
from wmtp.models.mtp import MtpModel, empty_model

log = logging.getLogger(__name__)
ModelIssue = tuple[str, str, str]
"""A config key below `model`, its value, and a description of the problem."""


class ModelSource(ABC):
    """A source from which a model can be created."""

    tokenizer: Tokenizer | None
    """Tokenizer of the model; None if the source is only validated and no model is created."""
    is_pretrained = False
    """Whether the initial parameters are pretrained, not random."""
    lora: Lora | None = None
    value_head_dim: int | None = None

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """H, the number of prediction heads of the created model."""

    @property
    def max_positions(self) -> int | None:
        """Maximum sequence length in tokens; None: no limit, or not known yet."""
        return None

    @abstractmethod
    def architecture(self) -> Architecture:
        """Return the architecture, the description of the model without its parameters.

        Raises:
            InputError: the description is missing or invalid.
        """

    @abstractmethod
    def load_base(self) -> MtpModel:
        """Load or initialize the model without adapters, in main memory.

        Random parameters are drawn from torch's global generator.

        Raises:
            InputError: files are missing or damaged, or tensors have the wrong shape.
        """

    def issues(self) -> Iterator[ModelIssue]:
        """Yield all issues of the source that can be found without loading weights."""
        yield from ()

    def files_to_save(self) -> dict[str, bytes]:
        """Return the files, by name, that a run saves, so that its checkpoints can be used without the source."""
        return {}

    def create(self) -> MtpModel:
        """Create the model for the start of training, with adapters.

        Raises:
            InputError: as in `load_base`, or the adapter targets name modules that do not exist.
        """
        if self.lora is None:
            return self.load_base()
        empty_model(self.architecture(), self.lora)  # raises for wrong names before the weights are loaded
        base = self.load_base()
        model = MtpModel(base.architecture, base.top_modules(), lora=self.lora, value_head_dim=self.value_head_dim)
        state = model.state_dict()
        model.base_fingerprint = tensors_fingerprint({name: state[name] for name in model.base_names})
        return model

    def empty(self) -> MtpModel:
        """Create a model into which a checkpoint is loaded.

        Parameters that checkpoints contain are not initialized. With adapters, the base is loaded, because checkpoints
        do not contain it.
        """
        if self.lora is not None:
            return self.create()
        model = empty_model(self.architecture(), value_head_dim=self.value_head_dim)
        model.to_empty(device=torch.get_default_device())
        model.positions = model.architecture.build_positions()
        return model


class PretrainedSource(ModelSource):
    """The source of a model with pretrained parameters in a folder; it can create more heads than are stored."""

    is_pretrained = True
    key = "model.path"
    """Config key of the folder, for messages."""
    path: Path
    requested_heads: int | None
    """Configured number of prediction heads; None: as many as are stored."""
    create_heads: bool
    """Whether heads that are not stored are created."""

    @property
    @abstractmethod
    def stored_heads(self) -> int:
        """Number of prediction heads in the folder that are of the configured kind."""

    @property
    def num_heads(self) -> int:
        """H, the number of prediction heads; at most `stored_heads` if `create_heads` is false."""
        requested = self.requested_heads or self.stored_heads
        return requested if self.create_heads else min(requested, self.stored_heads)

    def error(self, problem: str) -> InputError:
        """Return an error about the folder."""
        return InputError(f"{self.key}={self.path}: {problem}")

    def adapter_issues(self) -> Iterator[ModelIssue]:
        """Yield issues of adapters that do not match the trunk."""
        if self.lora is None:
            return
        with torch.device("meta"):
            trunk = nn.ModuleList(self.architecture().build_modules().trunk)
        if not trunk:
            yield "lora.rank", str(self.lora.rank), "the trunk has no blocks that could have adapters"
        elif unknown := self.lora.unknown_targets(trunk):
            available = ", ".join(matrix_names(trunk))
            yield "lora.targets", ",".join(unknown), f"the trunk has no such matrix; it has {available}"

    def log_head_counts(self) -> None:
        """Log a warning if the number of heads differs from the stored or from the configured number."""
        stored, created = self.stored_heads, self.num_heads
        if created < (self.requested_heads or created):
            log.warning(
                "model.num_heads=%s, but %s has %d, and model.create_heads=false: the model has %d",
                self.requested_heads, self.path, stored, created,
            )  # fmt: skip
        elif created > stored:
            log.warning(
                "%s has %d of %d heads; the other heads are new and start as head 1", self.path, stored, created
            )

    def check_embeddings(self, size: int) -> None:
        """Check that the model has an embedding for every token.

        Raises:
            InputError: the model has fewer embeddings than its tokenizer has tokens.
        """
        assert self.tokenizer is not None
        if size < self.tokenizer.vocab_size:
            raise self.error(f"has embeddings for {size} tokens, its tokenizer has {self.tokenizer.vocab_size}")


def weights_fingerprint(model: nn.Module, exclude_prefix: str | None = None) -> str:
    """Return a hash of the names and values of a model's tensors, without names that start with `exclude_prefix`."""
    tensors = model.state_dict().items()
    return tensors_fingerprint({n: x for n, x in tensors if exclude_prefix is None or not n.startswith(exclude_prefix)})


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of the names and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
