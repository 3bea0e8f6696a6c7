"""Settings of text generation: temperature, stop strings, limits and speculation."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from wmtp.field_types import Positive

NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings that determine how completions are generated.

    If `temperature` is 0, decoding is greedy. Otherwise, tokens are sampled from the smallest set of tokens with a
    total probability of at least `top_p`. A completion ends before the first stop string, at the end token, after
    `max_new_tokens` tokens, or when the context is full. If `max_new_tokens` is None, only the context limits the
    number of tokens. If `speculative` is true, heads 2 … H draft tokens, and head 1 verifies them. This does not change
    the completions. `batch_size` is the maximum number of sequences that are decoded at the same time.
    """

    temperature: NonNegativeFloat = 0.0
    top_p: Share = 1.0
    max_new_tokens: Positive | None = None
    stop: tuple[NonEmpty, ...] = ()
    speculative: bool = True
    batch_size: Positive = 64
