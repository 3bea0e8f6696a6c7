"""The multi-token model: one trunk, H parallel heads, one unembedding for all.

Source: Gloeckle et al. 2024, Better & Faster Large Language Models via Multi-token Prediction
(arXiv 2404.19737), section 2. Head 1 is the last block of the one-head model, whose weights are therefore a
subset of those of a model with more heads.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wmtp.distributed.parallelize import whole
from wmtp.models.architecture import Architecture, Context, Parts
from wmtp.models.heads import ValueHead
from wmtp.models.lora import ADAPTER, Lora


class Outputs(NamedTuple):
    """What a forward gives: the heads' normed hidden states, and the values if the model has a value head."""

    states: Float[Tensor, "head batch position dim"]
    values: Float[Tensor, "batch position"] | None


class MtpModel(nn.Module):
    """A decoder whose head k = 1 … H predicts, at position t, the token at t + k."""

    def __init__(
        self,
        architecture: Architecture,
        parts: Parts | None = None,
        *,
        lora: Lora | None = None,
        value_head_dim: int | None = None,
    ) -> None:
        """Build a model of new parts, or of those given, which must be of this architecture.

        `lora` adds adapters to the trunk, beside which only heads and value head train. `value_head_dim` is the
        width inside the value head, if `add_value_head` makes one; None: it is linear.

        Raises:
            InputError: the adapters name modules that the trunk does not have.
        """
        super().__init__()
        parts = parts or architecture.parts()
        self.architecture, self.lora, self.value_head_dim = architecture, lora, value_head_dim
        self.embedding = parts.embedding
        self.positions = parts.positions
        self.trunk = nn.ModuleList(parts.trunk)
        self.heads = nn.ModuleList(parts.heads)
        self.norm = parts.norm
        self.unembedding = parts.unembedding
        self.value_head: ValueHead | None = None
        self.activation_checkpointing = False
        self.base_fingerprint: str | None = None
        """A hash of the parameters that adapters leave as they are, where a source has set it."""
        if lora is not None:
            lora.inject(self.trunk)
            self.train_all()

    @property
    def unembedding_weight(self) -> Float[Tensor, "vocabulary dim"]:
        """The whole matrix from states to logits, with gradient, also where processes hold parts of it."""
        return whole((self.embedding if self.unembedding is None else self.unembedding).weight)

    @property
    def num_heads(self) -> int:
        """H, the number of tokens predicted at each position."""
        return len(self.heads)

    @property
    def num_parameters(self) -> int:
        """How many numbers the model has."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def base(self) -> frozenset[str]:
        """Names of the tensors that come with a pretrained model and stay as they are; none without adapters."""
        if self.lora is None:
            return frozenset()
        trained = ("heads.", "value_head.")
        return frozenset(n for n in self.state_dict() if not n.startswith(trained) and ADAPTER not in n)

    def parts(self) -> Parts:
        """The modules that it is made of."""
        return Parts(self.embedding, self.positions, [*self.trunk], [*self.heads], self.norm, self.unembedding)

    def train_all(self) -> None:
        """Let everything have gradients that is to be trained."""
        base = self.base
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name not in base)

    def stored(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint holds: all but the `base`."""
        base = self.base
        return {name: tensor for name, tensor in self.state_dict().items() if name not in base}

    def add_value_head(self) -> None:
        """Give the model a new value head on the trunk's hidden states."""
        self.value_head = ValueHead(self.architecture.dim, hidden_dim=self.value_head_dim).to(
            self.embedding.weight.device
        )

    def trunk_states(self, tokens: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position dim"]:
        """The trunk's hidden states, which every head and the value head start from."""
        positions = _positions(tokens)
        x: Tensor = self.positions.embed(self.embedding(tokens), positions)
        context = self.positions(positions, x)
        for block in self.trunk:
            x = self._run(block, x, context)
        return x

    def forward(
        self,
        tokens: Int[Tensor, "batch position"],
        num_heads: int | None = None,
        hidden_states: Float[Tensor, "batch position dim"] | None = None,
    ) -> Outputs:
        """States of the first `num_heads` heads (None: all; 0: the trunk alone runs), and the values.

        `hidden_states` are the trunk's, where they are known already. `unembedding_weight` turns states into logits.
        """
        x = self.trunk_states(tokens) if hidden_states is None else hidden_states
        values = None if self.value_head is None else self.value_head(x)
        heads = [*self.heads[:num_heads]]
        if not heads:
            return Outputs(x.new_empty(0, *x.shape), values)
        context = self.positions(_positions(tokens), x)
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
    """A model on the meta device, where nothing is drawn and no memory taken, but for what no checkpoint has."""
    with torch.device("meta"):
        model = MtpModel(architecture, lora=lora, value_head_dim=value_head_dim)
    model.positions = architecture.positions()
    return model


def undivided(model: MtpModel, keep: bool) -> MtpModel | None:
    """The model as one process can use it by itself; None for those that do not `keep` it.

    Where processes hold parts of it, all of them must ask, and it is a copy.
    """
    if not any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        return model if keep else None
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        tensor = whole(parameter.detach())
        if keep:
            tensors[name] = tensor
    if not keep:
        return None
    copy = empty_model(model.architecture, model.lora, model.value_head_dim)
    copy.positions.to(tensors["embedding.weight"].device)
    if model.value_head is not None:
        with torch.device("meta"):
            copy.value_head = ValueHead(model.architecture.dim, hidden_dim=model.value_head_dim)
    copy.load_state_dict(tensors, assign=True)
    return copy.train(model.training)
