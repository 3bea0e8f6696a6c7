"""Interface of model sources. A model source creates a model that is then trained or loaded from a checkpoint."""

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
"""Three strings: a config key below `model`, the value of this key, and a description of the problem with the value."""


class ModelSource(ABC):
    """A source from which a model can be created."""

    tokenizer: Tokenizer | None
    """Tokenizer of the model. It can be None if the source is only validated and creates no model."""
    is_pretrained = False
    """Whether the initial parameters are pretrained. If false, they are random."""
    lora: Lora | None = None
    value_head_dim: int | None = None

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """H, the number of prediction heads of the created model."""

    @property
    def max_positions(self) -> int | None:
        """Maximum sequence length in tokens, or None if there is no limit or the limit is not known yet."""
        return None

    @abstractmethod
    def architecture(self) -> Architecture:
        """Return the architecture, which describes the model without its parameters.

        Raises:
            InputError: the description is missing or invalid.
        """

    @abstractmethod
    def load_base(self) -> MtpModel:
        """Load or initialize the model in main memory, without adapters.

        Random parameters are drawn from torch's global generator.

        Raises:
            InputError: files are missing or damaged, or tensors have the wrong shape.
        """

    def issues(self) -> Iterator[ModelIssue]:
        """Yield all issues of the source that can be found without loading weights."""
        yield from ()

    def files_to_save(self) -> dict[str, bytes]:
        """Return the contents of the files that a run saves, by file name.

        With these files, the checkpoints of a run without adapters can be used without the original files of the model.
        """
        return {}

    def create(self) -> MtpModel:
        """Create the model for the start of training, including its adapters.

        Raises:
            InputError: files are missing or damaged, tensors have the wrong shape, or the adapter targets name modules
                that do not exist.
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
        """Create a model into which a checkpoint can be loaded.

        Parameters that checkpoints contain are not initialized. If the model has adapters, its base weights are loaded,
        because checkpoints do not contain them.
        """
        if self.lora is not None:
            return self.create()
        model = empty_model(self.architecture(), value_head_dim=self.value_head_dim)
        model.to_empty(device=torch.get_default_device())
        model.positions = model.architecture.build_positions()
        return model


class PretrainedSource(ModelSource):
    """The source of a model whose pretrained parameters are stored in a folder.

    The created model can have more heads than the folder contains.
    """

    is_pretrained = True
    key = "model.path"
    """Config key that contains the path of the folder. It is used in error messages."""
    path: Path
    requested_heads: int | None
    """Configured number of prediction heads. None means the number of stored heads."""
    create_heads: bool
    """Whether heads that are not stored are created."""

    @property
    @abstractmethod
    def stored_heads(self) -> int:
        """Number of stored prediction heads. Additional heads are counted only if they have the configured kind."""

    @property
    def num_heads(self) -> int:
        """H, the number of prediction heads. If `create_heads` is false, it is at most `stored_heads`."""
        requested = self.requested_heads or self.stored_heads
        return requested if self.create_heads else min(requested, self.stored_heads)

    def error(self, problem: str) -> InputError:
        """Return an error whose message contains the config key, the path of the folder, and `problem`."""
        return InputError(f"{self.key}={self.path}: {problem}")

    def adapter_issues(self) -> Iterator[ModelIssue]:
        """Yield an issue if the configured adapters do not match the trunk."""
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
        """Log a warning if the model has more heads than are stored, or fewer heads than are configured."""
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
        """Check that a model with `size` embeddings has an embedding for every token of its tokenizer.

        Raises:
            InputError: the tokenizer has more than `size` tokens.
        """
        assert self.tokenizer is not None
        if size < self.tokenizer.vocab_size:
            raise self.error(f"has embeddings for {size} tokens, its tokenizer has {self.tokenizer.vocab_size}")


def weights_fingerprint(model: nn.Module, exclude_prefix: str | None = None) -> str:
    """Return a hash of the names and values of a model's tensors.

    Tensors whose names start with `exclude_prefix` are ignored.
    """
    tensors = model.state_dict().items()
    return tensors_fingerprint({n: x for n, x in tensors if exclude_prefix is None or not n.startswith(exclude_prefix)})


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of the names and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
