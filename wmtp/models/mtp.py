"""The multi-token model: one trunk, H parallel heads of one block each, one unembedding for all.

Source: Gloeckle et al. 2024, Better & Faster Large Language Models via Multi-token Prediction
(arXiv 2404.19737), section 2. Head 1 is the trunk's own last block, so that the weights of a
one-head model are a subset of those of a model with more heads.
"""

import math
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wmtp.annotations import Positive, PositiveFloat
from wmtp.models.transformer import Block, Rotation, rotation
from wmtp.models.value_head import ValueHead
from wmtp.runtime.parallel import whole


class Outputs(NamedTuple):
    """What a forward gives: the heads' normed hidden states, and the values if the model has a value head."""

    states: Float[Tensor, "head batch position dim"]
    values: Float[Tensor, "batch position"] | None


class MtpModel(nn.Module):
    """A decoder whose head k = 1 … H predicts, at position t, the token at t + k."""

    def __init__(
        self,
        vocab_size: int,
        *,
        dim: Positive,
        num_layers: Positive,
        num_heads: Positive,
        num_attention_heads: Positive,
        num_kv_heads: Positive,
        hidden_dim: Positive,
        rope_theta: PositiveFloat = 10_000.0,
        norm_eps: PositiveFloat = 1e-5,
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        value_head_dim: Positive | None = None,
    ) -> None:
        """Build a randomly initialised model.

        `num_layers` is the depth of the one-head model: `num_layers − 1` trunk blocks and one head;
        every further head adds one block. `num_heads` is H, not the heads of the attention.
        `value_head_dim` is the width inside the value head, if `add_value_head` makes one; None: it is linear.
        """
        super().__init__()
        self.dim, self.value_head_dim = dim, value_head_dim
        self.settings: dict[str, int | float | None] = {
            "dim": dim, "num_layers": num_layers, "num_heads": num_heads, "num_attention_heads": num_attention_heads,
            "num_kv_heads": num_kv_heads, "hidden_dim": hidden_dim, "rope_theta": rope_theta, "norm_eps": norm_eps,
            "dropout": dropout, "value_head_dim": value_head_dim,
        }  # fmt: skip
        self.head_dim, self.num_kv_heads, self.rope_theta = dim // num_attention_heads, num_kv_heads, rope_theta

        def block() -> Block:
            return Block(dim, num_attention_heads, num_kv_heads, hidden_dim, norm_eps, dropout)

        self.embedding = nn.Embedding(vocab_size, dim)
        self.trunk = nn.ModuleList(block() for _ in range(num_layers - 1))
        self.heads = nn.ModuleList(block() for _ in range(num_heads))
        self.norm = nn.RMSNorm(dim, eps=norm_eps)
        self.unembedding = nn.Linear(dim, vocab_size, bias=False)
        self.value_head: ValueHead | None = None
        self.activation_checkpointing = False
        self._initialise(num_layers)

    def _initialise(self, num_layers: int) -> None:
        """Deviation 1 for embeddings, 1/√inputs for matrices, 1/√(2·depth) of that where they write to the stream.

        A fixed small deviation (0.02) suits wide models only: in narrow ones attention then learns to
        copy names and numbers far later.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 1.0 if parameter is self.embedding.weight else parameter.shape[1] ** -0.5
                nn.init.normal_(parameter, std=std / math.sqrt(2 * num_layers) if "output" in name else std)

    @property
    def unembedding_weight(self) -> Float[Tensor, "vocabulary dim"]:
        """The whole matrix from states to logits, with gradient, also where processes hold parts of it."""
        return whole(self.unembedding.weight)

    @property
    def num_heads(self) -> int:
        """H, the number of tokens predicted at each position."""
        return len(self.heads)

    @property
    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def add_value_head(self) -> None:
        """Give the model a new value head on the trunk's hidden states."""
        self.value_head = ValueHead(self.dim, hidden_dim=self.value_head_dim).to(self.unembedding.weight.device)

    def trunk_states(self, tokens: Int[Tensor, "batch position"]) -> Float[Tensor, "batch position dim"]:
        """The trunk's hidden states, which every head and the value head start from."""
        turn = self._turns(tokens)
        x: Tensor = self.embedding(tokens)
        for block in self.trunk:
            x = self._run(block, x, turn)
        return x

    def forward(
        self,
        tokens: Int[Tensor, "batch position"],
        num_heads: int | None = None,
        hidden_states: Float[Tensor, "batch position dim"] | None = None,
    ) -> Outputs:
        """States of the first `num_heads` heads (None: all; 0: the trunk alone runs), and the values.

        `hidden_states` are the trunk's, where they are known already. `unembedding` turns states into logits.
        """
        x = self.trunk_states(tokens) if hidden_states is None else hidden_states
        values = None if self.value_head is None else self.value_head(x)
        heads = self.heads[:num_heads]
        if not len(heads):
            return Outputs(x.new_empty(0, *x.shape), values)
        turn = self._turns(tokens)
        return Outputs(self.norm(torch.stack([self._run(head, x, turn) for head in heads])), values)

    def _run(self, block: nn.Module, x: Tensor, turn: Rotation) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, x, turn, use_reentrant=False)
            return out
        result: Tensor = block(x, turn)
        return result

    def _turns(self, tokens: Int[Tensor, "batch position"]) -> Rotation:
        return rotation(torch.arange(tokens.shape[1], device=tokens.device)[None], self.head_dim, self.rope_theta)


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
    with torch.device("meta"):  # nothing is drawn, and no memory taken, for what is replaced at once
        copy = MtpModel(len(tensors["embedding.weight"]), **model.settings)  # type: ignore[arg-type]
        if model.value_head is not None:
            copy.add_value_head()
    copy.load_state_dict(tensors, assign=True)
    return copy.train(model.training)
