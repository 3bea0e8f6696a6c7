"""The choice of the next token.

The same function is used for greedy decoding, for sampling, for drafts and for the verification of drafts.
"""

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
    """Return the chosen token at each position.

    The choice depends only on the settings, the logits, the seed of the sample and the position. If the temperature is
    0, the token with the largest logit is chosen. Otherwise, the score of a token is the sum of logit / temperature and
    Gumbel noise, and the token with the largest score is chosen. Only tokens that `top_p` allows are considered. The
    choice is a sample from the softmax of logit / temperature over these tokens (Gumbel-max trick).
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
    """Return a mask of the tokens that `top_p` allows.

    These are the most likely tokens, and only as many as are needed for a total probability of at least `top_p`. If
    tokens are equally likely, those with lower ids are allowed first.

    Source: Holtzman et al. 2020, The Curious Case of Neural Text Degeneration (arXiv 1904.09751), section 3.1.
    """
    sorted_probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    probability_before = sorted_probabilities.cumsum(dim=-1) - sorted_probabilities
    is_allowed = probability_before < top_p
    is_allowed[..., 0] = True
    return torch.zeros_like(is_allowed).scatter(-1, order, is_allowed)


INCREMENT = 0x9E3779B97F4A7C15 - 2**64
"""The increment of SplitMix64, as a signed 64-bit integer."""
FIRST_FACTOR, SECOND_FACTOR = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
"""The two factors in the mixing function of SplitMix64, as signed 64-bit integers."""
RANDOM_BITS = 23
"""The number of random bits in a uniform random number.

`gumbel_noise` adds 0.5 to these bits. The sum has 24 bits, which is the precision of a float32.
"""


def gumbel_noise(
    seeds: Int[Tensor, "*any"], positions: Int[Tensor, "*any"], vocab_size: int
) -> Float[Tensor, "*any token"]:
    """Return standard Gumbel noise for every token of the vocabulary. The noise is between −2.8 and 16.6.

    The noise is computed from a hash of the seed, the position and the token. It does not depend on the state of a
    generator. It is therefore the same on every device, in every batch and in any order of positions. For each pair of
    a seed and a position, the hashes of the tokens are successive outputs of SplitMix64. The initial state of
    SplitMix64 is a hash of the seed and the position.

    Source: Steele, Lea, Flood 2014, Fast Splittable Pseudorandom Number Generators
    (doi 10.1145/2660193.2660195), with the mixing function of Stafford's variant 13.
    """
    state = _mix(_mix(seeds + INCREMENT) + (positions + 1) * INCREMENT)
    tokens = torch.arange(1, vocab_size + 1, device=seeds.device)
    bits = _shift_right(_mix(state[..., None] + tokens * INCREMENT), 64 - RANDOM_BITS)
    uniform = (bits.float() + 0.5) * 2.0**-RANDOM_BITS
    return -(-uniform.log()).log()


def _mix(x: Int[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """Apply a pseudorandom permutation of the 64-bit integers to each element. Products wrap around at 64 bits."""
    x = (x ^ _shift_right(x, 30)) * FIRST_FACTOR
    x = (x ^ _shift_right(x, 27)) * SECOND_FACTOR
    return x ^ _shift_right(x, 31)


def _shift_right(x: Int[Tensor, "*any"], count: int) -> Int[Tensor, "*any"]:
    """Shift right by `count` bits and fill with zeros. The operator `>>` would repeat the sign bit."""
    return (x >> count) & ((1 << 64 - count) - 1)
