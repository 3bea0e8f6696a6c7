"""Connect to a bucket, repeat failed requests, and convert the exceptions of boto3."""

import logging
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from wmtp.errors import InputError
from wmtp.s3.errors import ObjectMissing, StoreError, StoreUnreachable, UploadNotFound, to_error
from wmtp.s3.options import CREDENTIAL_VARIABLES, S3Options, check_endpoint, redact, split_url
from wmtp.s3.retry import Retry, retry_few_times

CONNECT_SECONDS, READ_SECONDS = 5, 20
"""Limits of one request: seconds to connect, and seconds to wait for a response."""
MAX_CONCURRENT_PARTS = 4
"""Number of threads that send the parts of a large file."""
VERBOSE_LOGGERS = ("boto3", "botocore", "urllib3")
"""Names of loggers that write request headers at level DEBUG. These headers contain access tokens."""
Result = TypeVar("Result")


def no_progress(count: int, /) -> None:
    """Do nothing. This function is used where the progress of a transfer is not needed."""


class S3Connection:
    """Connection to a bucket. Its methods make requests whose keys start with the same prefix.

    Only this class repeats failed requests.
    """

    def __init__(
        self,
        url: str,
        options: S3Options | None = None,
        *,
        retry: Retry = retry_few_times,
        on_progress: Callable[[int], None] = no_progress,
    ) -> None:
        """Create the boto3 client. No request is sent.

        Args:
            url: `s3://bucket` or `s3://bucket/prefix`.
            options: connection options of the store.
            retry: function that makes the requests. It decides how often and for how long a failed one is repeated.
            on_progress: function that is called with the number of uploaded bytes after each part of an upload. While a
                part is sent, it is called with 0, which shows that the request has not stalled.

        Raises:
            InputError: the URL or an option is invalid, or the AWS profile does not exist.
        """
        options = options or S3Options()
        try:
            self.bucket, self.prefix = split_url(url)
        except ValueError as error:
            raise InputError(f"{redact(url)}: {error}") from error
        self.url = url.rstrip("/")
        self.display_url = self.url
        """URL for use in messages. It includes the endpoint if the S3 store does not belong to AWS."""
        if options.endpoint_url is not None:
            try:
                check_endpoint(options.endpoint_url)
            except ValueError as error:
                raise InputError(f"{redact(options.endpoint_url)}: {error}") from error
        self._retry, self.on_progress = retry, on_progress
        self.client = create_client(self.display_url, options)
        endpoint = str(self.client.meta.endpoint_url)
        if not endpoint.endswith(".amazonaws.com"):
            self.display_url = f"{self.url} at {redact(endpoint)}"

    def repeat(
        self,
        call: Callable[..., Result],
        *args: Any,
        retried: type[Exception] | tuple[type[Exception], ...] = (StoreError, InputError),
        **options: Any,
    ) -> Result:
        """Make a request with the function `retry` of the constructor, and return its result.

        `retry` never sees exceptions after which a repetition is useless: missing objects and uploads, and exceptions
        of other types than `retried`.
        """

        def _attempt() -> tuple[Result | None, Exception | None]:
            """Make the request, and return its result and the error that must not be retried."""
            try:
                return call(*args, **options), None
            except Exception as error:
                if isinstance(error, retried) and not isinstance(error, (ObjectMissing, UploadNotFound)):
                    raise
                return None, error

        result, error = self._retry(_attempt)
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    @contextmanager
    def translate_errors(self, action: str) -> Iterator[None]:
        """Convert the exceptions that boto3 raises in this context to `InputError` or `StoreError`.

        `action` is a verb for the error message, such as "write". It says what the request should do.
        """
        from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError  # noqa: A004

        try:
            yield
        except ClientError as error:
            raise to_error(self.display_url, action, error.response) from error
        except (ConnectionError, HTTPClientError) as error:
            raise StoreUnreachable(f"{self.display_url}: does not answer: {_format_error(error)}") from error
        except BotoCoreError as error:
            if "Credential" in type(error).__name__ or "Token" in type(error).__name__:
                raise InputError(f"{self.display_url}: {error}; set {CREDENTIAL_VARIABLES}, or AWS_PROFILE") from error
            raise StoreError(f"{self.display_url}: {_format_error(error)}") from error

    def get_field(self, response: dict[str, Any], name: str) -> str:
        """Return a field of a response of boto3.

        Raises:
            InputError: the field is missing. This happens if the endpoint is a web server but not an S3 store.
        """
        if name not in response:
            problem = "does not answer as an S3 store does; see checkpoint.s3.endpoint_url and AWS_ENDPOINT_URL_S3"
            raise InputError(f"{self.display_url}: {problem}")
        return str(response[name])


def create_client(url: str, options: S3Options) -> Any:
    """Return a boto3 client that makes each request once. `url` is the URL of the store for error messages.

    Raises:
        InputError: an option is invalid, or the AWS profile does not exist.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    for name in VERBOSE_LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        retries={"total_max_attempts": 1},
        max_pool_connections=MAX_CONCURRENT_PARTS + 2,
        tcp_keepalive=True,
        s3={"addressing_style": options.addressing_style},
        request_checksum_calculation=options.checksums,
        response_checksum_validation=options.checksums,
    )
    try:
        return boto3.session.Session().client("s3", endpoint_url=options.endpoint_url, config=config)
    except BotoCoreError as error:
        raise InputError(f"{url}: {error}; set {CREDENTIAL_VARIABLES}, or AWS_PROFILE") from error
    except ValueError as error:
        remedy = "set checkpoint.s3.endpoint_url, or AWS_ENDPOINT_URL_S3, to one such as https://host:port"
        raise InputError(f"{url}: {redact(str(error))}; {remedy}") from error


def _format_error(error: Exception) -> str:
    return redact(textwrap.shorten(f"{type(error).__name__}: {error}", 300))
