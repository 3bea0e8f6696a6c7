"""The choice of the next token: one rule for greedy decoding, sampling, drafts and their verification."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from wmtp.generation.settings import Decoding


def sample_tokens(
    logits: Float[Tensor, "*any token"],
    seeds: Int[Tensor, "*any"],
    positions: Int[Tensor, "*any"],
    settings: Decoding,
) -> Int[Tensor, "*any"]:
    """Return the token at each position: a function of its logits, the sample's seed and the position only.

    With temperature 0 it is the token with the largest logit. Otherwise it is the token with the largest sum of
    logit / temperature and Gumbel noise, which is a draw from the softmax (Gumbel-max trick), among the tokens that
    `top_p` allows.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if settings.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / settings.temperature
    scores = logits + gumbel_noise(seeds, positions, logits.shape[-1])
    if settings.top_p < 1:
        scores = scores.masked_fill(~top_p_mask(logits, settings.top_p), -torch.inf)
    return scores.argmax(dim=-1)


def top_p_mask(logits: Float[Tensor, "*any token"], top_p: float) -> Bool[Tensor, "*any token"]:
    """Return the smallest set of tokens with a probability of at least `top_p`; among equals, lower ids first.

    Source: Holtzman et al. 2020, The Curious Case of Neural Text Degeneration (arXiv 1904.09751), section 3.1.
    """
    sorted_probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    probability_before = sorted_probabilities.cumsum(dim=-1) - sorted_probabilities
    is_allowed = probability_before < top_p
    is_allowed[..., 0] = True
    return torch.zeros_like(is_allowed).scatter(-1, order, is_allowed)


INCREMENT = 0x9E3779B97F4A7C15 - 2**64
FIRST_FACTOR, SECOND_FACTOR = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
RANDOM_BITS = 23
"""Random bits of one uniform number; with the 0.5 that is added, they fill the significand of a float32."""


def gumbel_noise(
    seeds: Int[Tensor, "*any"], positions: Int[Tensor, "*any"], vocab_size: int
) -> Float[Tensor, "*any token"]:
    """Return standard Gumbel noise for every token of the vocabulary, from −2.8 to 16.6.

    The noise is a hash of counters, not the output of a generator with a state, so it is the same on every device,
    in every batch and in any order of positions. The noise of one seed and position is the stream of SplitMix64 that
    starts from a hash of both: Steele, Lea, Flood 2014, Fast Splittable Pseudorandom Number Generators
    (doi 10.1145/2660193.2660195), with the mixing function of Stafford's variant 13.
    """
    state = _mix(_mix(seeds + INCREMENT) + (positions + 1) * INCREMENT)
    tokens = torch.arange(1, vocab_size + 1, device=seeds.device)
    bits = _shift_right(_mix(state[..., None] + tokens * INCREMENT), 64 - RANDOM_BITS)
    uniform = (bits.float() + 0.5) * 2.0**-RANDOM_BITS
    return -(-uniform.log()).log()


def _mix(x: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """Apply a pseudorandom permutation of the 64-bit integers; products wrap around."""
    x = (x ^ _shift_right(x, 30)) * FIRST_FACTOR
    x = (x ^ _shift_right(x, 27)) * SECOND_FACTOR
    return x ^ _shift_right(x, 31)


def _shift_right(x: Int[Tensor, "*any"], count: int) -> Int[Tensor, "*any"]:
    """Shift right and fill with zeros; `>>` would repeat the sign bit."""
    return (x >> count) & ((1 << 64 - count) - 1)
