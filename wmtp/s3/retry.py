"""Functions that repeat failed requests to a store. `S3Folder` receives one of them and calls it for every request."""

import logging
from collections.abc import Callable
from typing import Protocol, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from wmtp.runtime.background import format_error
from wmtp.s3.errors import StoreError

log = logging.getLogger(__name__)
ATTEMPTS = 10
Result = TypeVar("Result")


class Retry(Protocol):
    """Type of a function that makes a request to the S3 store. It may repeat the request if the request fails."""

    def __call__(self, call: Callable[[], Result], /) -> Result:
        """Call the function `call` and return its result."""


def retry_few_times(call: Callable[[], Result], /) -> Result:
    """Call a function and return its result. If the function raises `StoreError`, repeat the call.

    Raises:
        StoreError: `ATTEMPTS` calls have failed. The pauses between them take nine seconds at most.
    """
    retrying = Retrying(
        retry=retry_if_exception_type(StoreError),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_random_exponential(multiplier=0.1, max=1.5),
        before_sleep=_log_failure,
        reraise=True,
    )
    return retrying(call)


def _log_failure(attempt: RetryCallState) -> None:
    """Log a failed attempt. Only the first one is a warning, which appears in the terminal."""
    error = attempt.outcome.exception() if attempt.outcome else None
    if isinstance(error, Exception):
        level = logging.WARNING if attempt.attempt_number == 1 else logging.INFO
        log.log(level, "a request is tried again: %s", format_error(error))
