"""Create boto3 clients, and convert the exceptions of boto3."""

import logging
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from wmtp.errors import InputError
from wmtp.s3.errors import StoreError, StoreUnreachable, to_error
from wmtp.s3.multipart import MAX_CONCURRENT_PARTS
from wmtp.s3.options import CREDENTIAL_VARIABLES, S3Options, redact

CONNECT_SECONDS, READ_SECONDS = 5, 20
"""Limits of one request: seconds to connect, and seconds to wait for a response."""
VERBOSE_LOGGERS = ("boto3", "botocore", "urllib3")
"""Names of loggers that write request headers at level DEBUG. These headers contain access tokens."""


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


@contextmanager
def translate_errors(url: str, action: str) -> Iterator[None]:
    """Convert the exceptions that boto3 raises in this context to `InputError` or `StoreError`.

    `url` is the URL of the store for the error message. `action` is a verb for the message, such as "write". It says
    what the request should do.
    """
    from botocore.exceptions import BotoCoreError, ClientError, ConnectionError, HTTPClientError  # noqa: A004

    try:
        yield
    except ClientError as error:
        raise to_error(url, action, error.response) from error
    except (ConnectionError, HTTPClientError) as error:
        raise StoreUnreachable(f"{url}: does not answer: {_format_error(error)}") from error
    except BotoCoreError as error:
        if "Credential" in type(error).__name__ or "Token" in type(error).__name__:
            raise InputError(f"{url}: {error}; set {CREDENTIAL_VARIABLES}, or AWS_PROFILE") from error
        raise StoreError(f"{url}: {_format_error(error)}") from error


def _format_error(error: Exception) -> str:
    return redact(textwrap.shorten(f"{type(error).__name__}: {error}", 300))
