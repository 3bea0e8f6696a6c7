"""A causal language model with additional heads that predict later tokens. It requires only torch and transformers."""

from typing import Any

import torch
import torch.nn.functional as F
import transformers  # noqa: F401 - module of the base class of the class that an export appends
from torch import Tensor, nn


class MtpHeads:
    """A mixin that adds the prediction heads 2 … H to a causal language model.

    At position t, head k predicts the token at position t + k. The config key `mtp_num_heads` is H, the number of all
    heads. The config key `mtp_head_kind` is the kind of the additional heads. "transformer" heads are blocks parallel
    to the last block. "medusa" heads are residual layers on the state from which head 1's logits are computed.
    """

    def __init__(self: Any, config: Any) -> None:
        parent: Any = super()
        parent.__init__(config)
        num_extra = getattr(config, "mtp_num_heads", 1) - 1
        heads: list[nn.Module]
        if getattr(config, "mtp_head_kind", "transformer") == "medusa":
            size = config.hidden_size
            heads = [nn.ModuleDict({"linear": nn.Linear(size, size, bias=False)}) for _ in range(num_extra)]
        else:
            layers = self._layers()
            heads = [type(layers[-1])(config, len(layers) - 1) for _ in range(num_extra)]
        self.extra_heads = nn.ModuleList(heads)
        self.post_init()

    @classmethod
    def from_pretrained(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load the model as in transformers, but raise an error if heads are missing.

        transformers itself would initialize missing heads.

        Raises:
            ValueError: the files do not contain all heads that the config declares.
        """
        parent: Any = super()
        model, info = parent.from_pretrained(*args, output_loading_info=True, **kwargs)
        if missing := sorted(name for name in info["missing_keys"] if name.startswith("extra_heads.")):
            raise ValueError(f"the config declares {model.config.mtp_num_heads} heads; not in the files: {missing}")
        return (model, info) if output_loading_info else model

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_all_heads: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Run the model, and return its output.

        If `return_all_heads` is true, the logits of the output have the shape [batch, position, head,
        vocabulary]. Otherwise only head 1 is run, and the logits have the shape [batch, position, vocabulary].

        Raises:
            ValueError: `return_all_heads` is used with `past_key_values`, but the additional heads have no cache.
        """
        parent: Any = super()
        kwargs |= {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "inputs_embeds": inputs_embeds, "labels": labels, "logits_to_keep": logits_to_keep,
        }  # fmt: skip
        if not return_all_heads:
            return parent.forward(past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        if past_key_values is not None:
            raise ValueError("return_all_heads=True reads whole texts; leave past_key_values out")
        calls: list[tuple[Any, Any]] = []
        states: list[Tensor] = []
        norm = self._norm()
        hooks = [
            self._layers()[-1].register_forward_pre_hook(lambda _, *call: calls.append(call), with_kwargs=True),
            norm.register_forward_hook(lambda _, args, output: states.append(output)),
        ]
        try:
            out = parent.forward(use_cache=False, **(kwargs | {"return_dict": True}))
        finally:
            for hook in hooks:
                hook.remove()
        if getattr(self.config, "mtp_head_kind", "transformer") == "medusa":
            extra_states = [states[0] + F.silu(head["linear"](states[0])) for head in self.extra_heads]
        else:
            arguments, keywords = calls[0]
            extra_states = [norm(head(*arguments, **keywords)) for head in self.extra_heads]
        selected = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        out.logits = torch.stack([out.logits, *(self.lm_head(state[:, selected]) for state in extra_states)], dim=-2)
        return out

    def _layers(self: Any) -> Any:
        body = self.base_model
        return body.h if hasattr(body, "h") else body.layers

    def _norm(self: Any) -> Any:
        body = self.base_model
        return body.ln_f if hasattr(body, "ln_f") else body.norm
