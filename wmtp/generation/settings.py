"""How completions are chosen."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from wmtp.field_types import Positive

NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
NonEmpty = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How completions are chosen.

    `temperature` 0 takes the most likely token; above it, tokens are drawn from the smallest set that has
    at least the probability `top_p`. A completion ends before the first of the strings in `stop`, with the
    end token, after `max_new_tokens`, or where the context is full (None: only there). With `speculative`,
    heads 2 … H draft what head 1 then verifies; the completions are the same. `batch_size` sequences are
    decoded at once.
    """

    temperature: NonNegativeFloat = 0.0
    top_p: Share = 1.0
    max_new_tokens: Positive | None = None
    stop: tuple[NonEmpty, ...] = ()
    speculative: bool = True
    batch_size: Positive = 64
