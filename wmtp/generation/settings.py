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
    """Settings of the decoding of completions.

    With `temperature` 0, decoding is greedy. Above 0, tokens are sampled from the smallest set of tokens with a total
    probability of at least `top_p`. A completion ends before the first string of `stop`, at the end token, after
    `max_new_tokens` tokens (None: no such limit), or when the context is full. If `speculative` is true, heads 2 … H
    draft tokens that head 1 verifies; the completions do not change. `batch_size` is the maximum number of sequences
    that are decoded at the same time.
    """

    temperature: NonNegativeFloat = 0.0
    top_p: Share = 1.0
    max_new_tokens: Positive | None = None
    stop: tuple[NonEmpty, ...] = ()
    speculative: bool = True
    batch_size: Positive = 64
