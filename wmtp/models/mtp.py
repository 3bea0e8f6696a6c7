"""The multi-token model, which has one trunk, H parallel prediction heads, and one unembedding for all heads.

Source: Gloeckle et al. 2024, Better & Faster Large Language Models via Multi-token Prediction
(arXiv 2404.19737), section 2. Head 1 is the last block of the model with one head. Therefore the weights of the
model with one head are a subset of the weights of a model with more heads.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wmtp.distributed.parallelize import full_tensor
from wmtp.models.architecture import Architecture, Context, Modules
from wmtp.models.lora import ADAPTER_SUBSTRING, Lora
from wmtp.models.value_heads import ActionValueHead, BlockValueHead, StateValueHead, ValueHead, ValueKind


class Outputs(NamedTuple):
    """The result of a forward pass.

    `states` contains the normalized hidden states of the heads. `values` contains the outputs of the value head, which
    are values or their logits (see `ValueLoss`). It is None if the model has no value head.
    """

    states: Float[Tensor, "head batch position dim"]
    values: Float[Tensor, "batch position"] | None


class MtpModel(nn.Module):
    """A decoder with H prediction heads. At position t, head k predicts the token at position t + k (k = 1 … H)."""

    def __init__(
        self,
        architecture: Architecture,
        modules: Modules | None = None,
        *,
        lora: Lora | None = None,
        value_head_dim: int | None = None,
    ) -> None:
        """Build a model.

        Args:
            architecture: the architecture.
            modules: the modules, which must match the architecture; None to build new modules.
            lora: the settings of the trunk's adapters, or None. With adapters, only adapters, heads and value head
                are trained.
            value_head_dim: the hidden width of the value head that `add_value_head` creates; None for a linear head.

        Raises:
            InputError: the adapter targets name modules that the trunk does not have.
        """
        super().__init__()
        modules = modules or architecture.build_modules()
        self.architecture, self.lora, self.value_head_dim = architecture, lora, value_head_dim
        self.embedding = modules.embedding
        self.positions = modules.positions
        self.trunk = nn.ModuleList(modules.trunk)
        self.heads = nn.ModuleList(modules.heads)
        self.norm = modules.norm
        self.unembedding = modules.unembedding
        self.value_head: ValueHead | None = None
        self.value_kind: ValueKind = "state"
        self.class_embedding: nn.Embedding | None = None
        self.activation_checkpointing = False
        self.base_fingerprint: str | None = None
        """Hash of the frozen base parameters. The model source sets it if the model has adapters."""
        if lora is not None:
            lora.inject(self.trunk)
            self.set_trainable()

    @property
    def unembedding_weight(self) -> Float[Tensor, "vocabulary dim"]:
        """The matrix that maps hidden states to logits. Gradients flow through it.

        If the matrix is sharded, it is gathered from all ranks.
        """
        return full_tensor((self.embedding if self.unembedding is None else self.unembedding).weight)

    @property
    def num_heads(self) -> int:
        """H, the number of prediction heads."""
        return len(self.heads)

    @property
    def num_parameters(self) -> int:
        """Total number of parameters."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def base_names(self) -> frozenset[str]:
        """Names of the frozen pretrained tensors of a model with adapters. Without adapters, the set is empty."""
        if self.lora is None:
            return frozenset()
        trained = ("heads.", "value_head.", "class_embedding.")
        return frozenset(n for n in self.state_dict() if not n.startswith(trained) and ADAPTER_SUBSTRING not in n)

    def top_modules(self) -> Modules:
        """Return the top-level modules of the model."""
        return Modules(self.embedding, self.positions, [*self.trunk], [*self.heads], self.norm, self.unembedding)

    def set_trainable(self) -> None:
        """Make all parameters trainable, except those in `base_names`, which are frozen."""
        base_names = self.base_names
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in base_names)

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint contains. These are all tensors except the tensors in `base_names`."""
        base_names = self.base_names
        return {name: tensor for name, tensor in self.state_dict().items() if name not in base_names}

    def add_value_head(self, kind: ValueKind = "state") -> ValueHead:
        """Add a new value head and return it. Its input is the hidden states of the trunk.

        The block of a head of the kind "block" is a copy of the block of prediction head 1.
        """
        dim, hidden_dim = self.architecture.dim, self.value_head_dim
        head: ValueHead
        if kind == "action":
            head = ActionValueHead(dim, self.embedding.num_embeddings)
        elif kind == "block":
            head = BlockValueHead(self.heads[0], dim, hidden_dim=hidden_dim)
        else:
            head = StateValueHead(dim, hidden_dim=hidden_dim)
        self.value_head, self.value_kind = head.to(self.embedding.weight.device), kind
        return self.value_head

    def add_class_embedding(self) -> None:
        """Make the model class-conditional: the vector of a sample's class is added to all its token embeddings.

        There are two classes, incorrect (0) and correct (1). Their vectors are 0 at first, so that the model begins as
        the model without classes.
        """
        embedding = nn.Embedding(2, self.architecture.dim, device=self.embedding.weight.device)
        nn.init.zeros_(embedding.weight)
        self.class_embedding = embedding.to(self.embedding.weight.dtype)

    def trunk_states(
        self, tokens: Int[Tensor, "batch position"], classes: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch position dim"]:
        """Return the hidden states that the trunk computes from token ids, and from classes if it has these."""
        positions = _positions(tokens)
        x: Tensor = self.positions.embed(self.embedding(tokens), positions)
        if self.class_embedding is not None:
            assert classes is not None
            x = x + self.class_embedding(classes)[:, None]
        context = self.positions(positions, x)
        for block in self.trunk:
            x = self._run(block, x, context)
        return x

    def forward(
        self,
        tokens: Int[Tensor, "batch position"],
        num_heads: int | None = None,
        hidden_states: Float[Tensor, "batch position dim"] | None = None,
        classes: Int[Tensor, " batch"] | None = None,
    ) -> Outputs:
        """Return the hidden states of the heads, and the outputs of the value head if the model has one.

        The logits are `states @ unembedding_weight.T`.

        Args:
            tokens: the token ids.
            num_heads: the number of heads to run, starting with head 1. None runs all heads. 0 runs only the trunk
                and the value head.
            hidden_states: the hidden states of the trunk, if they are known already; None to compute them.
            classes: the class of each sample, if the model is class-conditional (see `add_class_embedding`).
        """
        x = self.trunk_states(tokens, classes) if hidden_states is None else hidden_states
        context = self.positions(_positions(tokens), x)
        values = None if self.value_head is None else self.value_head(x, tokens, context)
        heads = [*self.heads[:num_heads]]
        if not heads:
            return Outputs(x.new_empty(0, *x.shape), values)
        if self.architecture.head_kind == "medusa":
            first = self.norm(self._run(heads[0], x, context))
            return Outputs(torch.stack([first, *(head(first) for head in heads[1:])]), values)
        return Outputs(self.norm(torch.stack([self._run(head, x, context) for head in heads])), values)

    def _run(self, block: nn.Module, x: Tensor, context: Context) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, x, context, use_reentrant=False)
            return out
        result: Tensor = block(x, context)
        return result


def _positions(tokens: Int[Tensor, "batch position"]) -> Int[Tensor, "1 position"]:
    return torch.arange(tokens.shape[1], device=tokens.device)[None]


def empty_model(architecture: Architecture, lora: Lora | None = None, value_head_dim: int | None = None) -> MtpModel:
    """Build a model on the meta device, where its parameters need no memory.

    Only the position module is on the default device, because checkpoints do not contain its buffers.
    """
    with torch.device("meta"):
        model = MtpModel(architecture, lora=lora, value_head_dim=value_head_dim)
    model.positions = architecture.build_positions()
    return model


def unsharded_copy(model: MtpModel, keep: bool) -> MtpModel | None:
    """Return a model whose parameters are not sharded, so that one rank can use it without the other ranks.

    If `keep` is false, the result is None. If the parameters of `model` are sharded, the result is a copy, and all
    ranks must call this function. Otherwise the result is `model` itself.
    """
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return model if keep else None
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        tensor = full_tensor(parameter.detach())
        if keep:
            tensors[name] = tensor
    if not keep:
        return None
    copy = empty_model(model.architecture, model.lora, model.value_head_dim)
    copy.positions.to(tensors["embedding.weight"].device)
    with torch.device("meta"):
        if model.value_head is not None:
            copy.add_value_head(model.value_kind)
        if model.class_embedding is not None:
            copy.add_class_embedding()
    copy.load_state_dict(tensors, assign=True)
    return copy.train(model.training)
