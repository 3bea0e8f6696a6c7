"""Noise that is a function of what it is for: a sample's seed, a position and a token."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
