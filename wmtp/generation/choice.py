"""Which token follows: one rule for greedy decoding, for sampling, for drafts and for their verification."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wmtp.generation.noise import gumbel
from wmtp.generation.settings import Decoding


def choose(
    logits: Float[Tensor, "*any token"],
    seeds: Int[Tensor, "*any"],
    positions: Int[Tensor, "*any"],
    settings: Decoding,
) -> Int[Tensor, "*any"]:
    """The token at each position: a function of its logits, the sample's seed and the position alone.

    Greedy: the largest logit. Sampled: the largest sum of logit / temperature and Gumbel noise, which is a
    draw from the softmax (Gumbel-max), among the tokens that `top_p` admits.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / settings.temperature
    scores = logits + gumbel(seeds, positions, logits.shape[-1])
    if settings.top_p < 1:
        scores = scores.masked_fill(~most_likely(logits, settings.top_p), -torch.inf)
    return scores.argmax(dim=-1)


def most_likely(logits: Float[Tensor, "*any token"], top_p: float) -> Bool[Tensor, "*any token"]:
    """The smallest set of tokens with at least the probability `top_p`; of equal tokens the first come first.

    Source: Holtzman et al. 2020, The Curious Case of Neural Text Degeneration (arXiv 1904.09751), section 3.1.
    """
    sorted_probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    likelier = sorted_probabilities.cumsum(dim=-1) - sorted_probabilities
    is_in = likelier < top_p
    is_in[..., 0] = True
    return torch.zeros_like(is_in).scatter(-1, order, is_in)
