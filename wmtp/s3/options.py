"""URLs and connection options of S3 stores. A URL or option that contains credentials is rejected."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator

from wmtp.field_types import PositiveFloat

S3_URL = re.compile(r"s3://([a-z0-9][a-z0-9.\-]{1,61}[a-z0-9])(?:/(.*))?")
CREDENTIAL_VARIABLES = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in the environment or in .env"
CREDENTIALS_IN_URL = f"holds a user or a password; set {CREDENTIAL_VARIABLES}, instead"


def split_url(url: str) -> tuple[str, str]:
    """Split an S3 URL into the name of the bucket and the prefix of keys. The prefix is empty or ends with a slash.

    >>> split_url("s3://bucket/runs")
    ('bucket', 'runs/')

    Raises:
        ValueError: the URL is not an S3 URL, or it contains credentials. The error message does not contain the URL.
    """
    first = url.removeprefix("s3://").partition("/")[0]
    if url.startswith("s3://") and ("@" in first or ":" in first):
        raise ValueError(CREDENTIALS_IN_URL)
    match = S3_URL.fullmatch(url.rstrip("/"))
    if match is None:
        raise ValueError("must be s3://bucket or s3://bucket/prefix; a bucket has 3 to 63 of a-z, 0-9, '-' and '.'")
    return match[1], f"{match[2]}/" if match[2] else ""


def check_endpoint(url: str) -> str:
    """Check the endpoint URL of an S3 store, and return the URL unchanged.

    Raises:
        ValueError: the URL is not an HTTP URL, or it contains credentials. The error message does not contain the URL.
    """
    parts = urlsplit(url)
    if "@" in url:
        raise ValueError(CREDENTIALS_IN_URL)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL such as https://host:port")
    return url


def redact(text: str) -> str:
    """Replace the user and the password in each URL of a text with `…`, and return the new text."""
    return re.sub(r"://\S*@", "://…@", text)


def _check_url(url: str) -> str:
    split_url(url)
    return url.rstrip("/")


S3Url = Annotated[str, AfterValidator(_check_url)]
"""Type of a config value that is an S3 URL, such as `s3://bucket/prefix`. A trailing slash is removed."""
Endpoint = Annotated[str, AfterValidator(check_endpoint)]


@dataclass(frozen=True, kw_only=True)
class S3Options:
    """Connection options of an S3 store. They contain no credentials, which boto3 reads from the environment."""

    endpoint_url: Endpoint | None = None
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    checksums: Literal["when_supported", "when_required"] = "when_supported"


@dataclass(frozen=True, kw_only=True)
class S3Settings(S3Options):
    """Settings of the copies of runs in S3. `url` is the URL below which each run has a folder.

    At the end of a run, `CheckpointUploader.close` waits `stall_seconds` at most for a store that does not respond, and
    `close_seconds` at most for a store that responds.
    """

    url: S3Url
    stall_seconds: PositiveFloat = 30.0
    close_seconds: PositiveFloat = 1200.0
