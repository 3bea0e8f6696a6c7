"""A block that wraps a decoder layer of transformers. Importing this module does not import the library."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from wmtp.models.architecture import Context

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class DecoderBlock(nn.Module):
    """A block that wraps a decoder layer of the transformers library."""

    def __init__(self, layer: nn.Module, attention: str, config: "PreTrainedConfig") -> None:
        super().__init__()
        self.layer = layer
        attention_module: Any = layer.get_submodule(attention)
        self.head_dim: int = attention_module.head_dim
        self.num_kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.window = layer_window(config, attention_module.layer_idx)

    def forward(self, x: Float[Tensor, "batch position dim"], context: Context) -> Float[Tensor, "batch position dim"]:
        """Return the output of the decoder layer for complete sequences, without a cache.

        A position attends to itself and to earlier positions. If the layer has a sliding window, a position attends
        only to positions in this window. Padding must be on the right.
        """
        mask = None
        if self.window is not None and x.shape[1] > self.window:
            positions = torch.arange(x.shape[1], device=x.device)
            mask = window_mask(positions[None], x.shape[1], self.window)
        return self.forward_cached(x, context, mask, None)

    def forward_cached(
        self,
        x: Float[Tensor, "batch position dim"],
        context: Context,
        mask: Bool[Tensor, "#batch 1 position slot"] | None,
        cache: object | None,
    ) -> Float[Tensor, "batch position dim"]:
        """Return the output of the decoder layer. The keys and values of earlier positions can be in a cache.

        Args:
            x: the residual stream.
            context: the position-dependent input of the layer.
            mask: True where a position attends to a key slot; None for causal attention.
            cache: an object whose method `update` stores new keys and values; None for no cache.
        """
        out: Tensor = self.layer(
            x, attention_mask=mask, position_embeddings=context, past_key_values=cache, use_cache=cache is not None
        )
        return out


def window_mask(
    positions: Int[Tensor, "batch query"], length: int, window: int | None
) -> Bool[Tensor, "batch 1 query slot"]:
    """Return the attention mask of queries over key slots. An element is True if the query attends to the slot.

    `positions` contains the positions of the queries. There are `length` slots, and slot i contains the key of
    position i. `window` is the size of the sliding window in positions, or None if there is no sliding window.
    """
    distance = positions[:, None, :, None] - torch.arange(length, device=positions.device)
    is_visible = distance >= 0
    return is_visible if window is None else is_visible & (distance < window)


def layer_window(config: "PreTrainedConfig", layer: int) -> int | None:
    """Return the size of a layer's sliding window in positions, or None if the layer has no sliding window."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window
