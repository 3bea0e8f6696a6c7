"""Settings of decoding."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from wmtp.field_types import Positive

NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings of decoding.

    With `temperature` 0 the most likely token is taken. Above 0, tokens are sampled from the smallest set with a
    probability of at least `top_p`. A completion ends before the first of the strings in `stop`, at the end token,
    after `max_new_tokens` tokens (None: no such limit), or where the context is full. With `speculative`, heads
    2 … H draft tokens that head 1 verifies; the completions are the same. `batch_size` is the number of sequences
    that are decoded at the same time.
    """

    temperature: NonNegativeFloat = 0.0
    top_p: Share = 1.0
    max_new_tokens: Positive | None = None
    stop: tuple[NonEmpty, ...] = ()
    speculative: bool = True
    batch_size: Positive = 64
