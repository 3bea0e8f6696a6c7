"""S3 URLs and connection options. Neither of them may contain credentials."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator

S3_URL = re.compile(r"s3://([a-z0-9][a-z0-9.\-]{1,61}[a-z0-9])(?:/(.*))?")
CREDENTIAL_VARIABLES = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in the environment or in .env"
CREDENTIALS_IN_URL = f"holds a user or a password; set {CREDENTIAL_VARIABLES}, instead"


def split_url(url: str) -> tuple[str, str]:
    """Return the bucket and the key prefix of an S3 URL. The prefix is empty or ends with a slash.

    >>> split_url("s3://bucket/runs")
    ('bucket', 'runs/')

    Raises:
        ValueError: the URL is not an S3 URL, or it contains credentials. The message does not repeat the URL.
    """
    first = url.removeprefix("s3://").partition("/")[0]
    if url.startswith("s3://") and ("@" in first or ":" in first):
        raise ValueError(CREDENTIALS_IN_URL)
    match = S3_URL.fullmatch(url.rstrip("/"))
    if match is None:
        raise ValueError("must be s3://bucket or s3://bucket/prefix; a bucket has 3 to 63 of a-z, 0-9, '-' and '.'")
    return match[1], f"{match[2]}/" if match[2] else ""


def check_endpoint(url: str) -> str:
    """Check the endpoint URL of a store, and return it unchanged.

    Raises:
        ValueError: the URL is not an HTTP URL, or it contains credentials. The message does not repeat the URL.
    """
    parts = urlsplit(url)
    if "@" in url:
        raise ValueError(CREDENTIALS_IN_URL)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL such as https://host:port")
    return url


def redact(text: str) -> str:
    """Return a text in which `…` replaces the user and the password of every URL."""
    return re.sub(r"://\S*@", "://…@", text)


def _check_url(url: str) -> str:
    split_url(url)
    return url.rstrip("/")


S3Url = Annotated[str, AfterValidator(_check_url)]
"""S3 URL in a config, `s3://bucket/prefix`. A trailing slash is removed."""
Endpoint = Annotated[str, AfterValidator(check_endpoint)]
AddressingStyle = Literal["auto", "path", "virtual"]
Checksums = Literal["when_supported", "when_required"]


@dataclass(frozen=True, kw_only=True)
class S3Options:
    """Connection options of a store. Credentials are not options: boto3 reads them from the environment."""

    endpoint_url: Endpoint | None = None
    addressing_style: AddressingStyle = "auto"
    checksums: Checksums = "when_supported"
