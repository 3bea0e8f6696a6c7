"""Which token follows: one rule for greedy decoding, for sampling, for drafts and for their verification."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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


INCREMENT = 0x9E3779B97F4A7C15 - 2**64
FIRST_FACTOR, SECOND_FACTOR = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
RANDOM_BITS = 23
"""With the half that is added, as many as the significand of a float32 holds."""


def gumbel(seeds: Int[Tensor, "*any"], positions: Int[Tensor, "*any"], vocab_size: int) -> Float[Tensor, "*any token"]:
    """Standard Gumbel noise for every token of the vocabulary, from −2.8 to 16.6.

    Counters are hashed instead of a generator being advanced, so the noise is the same on every device,
    in every batch and in whatever order positions are visited. The noise of one seed and position is the
    stream of SplitMix64 from a state that is itself such a hash: Steele, Lea, Flood 2014, Fast Splittable
    Pseudorandom Number Generators (doi 10.1145/2660193.2660195), mixing function of Stafford's variant 13.
    """
    state = _mix(_mix(seeds + INCREMENT) + (positions + 1) * INCREMENT)
    tokens = torch.arange(1, vocab_size + 1, device=seeds.device)
    bits = _shift_right(_mix(state[..., None] + tokens * INCREMENT), 64 - RANDOM_BITS)
    uniform = (bits.float() + 0.5) * 2.0**-RANDOM_BITS
    return -(-uniform.log()).log()


def _mix(x: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """A permutation of the 64-bit integers that looks random; products wrap."""
    x = (x ^ _shift_right(x, 30)) * FIRST_FACTOR
    x = (x ^ _shift_right(x, 27)) * SECOND_FACTOR
    return x ^ _shift_right(x, 31)


def _shift_right(x: Int[Tensor, "*any"], count: int) -> Int[Tensor, "*any"]:
    """Shift zeros in from the left; `>>` would repeat the sign."""
    return (x >> count) & ((1 << 64 - count) - 1)
