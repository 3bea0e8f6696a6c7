"""S3 URLs and connection options. Keys are never part of either."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator

S3_URL = re.compile(r"s3://([a-z0-9][a-z0-9.\-]{1,61}[a-z0-9])(?:/(.*))?")
KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in the environment or in .env"
CREDENTIALS_IN_URL = f"holds a user or a password; set {KEYS}, instead"


def split_url(url: str) -> tuple[str, str]:
    """Return the bucket of an S3 URL, and its prefix with a trailing slash (or an empty string).

    Raises:
        ValueError: not an S3 URL, or it holds credentials. The message does not repeat the URL.
    """
    first = url.removeprefix("s3://").partition("/")[0]
    if url.startswith("s3://") and ("@" in first or ":" in first):
        raise ValueError(CREDENTIALS_IN_URL)
    match = S3_URL.fullmatch(url.rstrip("/"))
    if match is None:
        raise ValueError("must be s3://bucket or s3://bucket/prefix; a bucket has 3 to 63 of a-z, 0-9, '-' and '.'")
    return match[1], f"{match[2]}/" if match[2] else ""


def check_endpoint(url: str) -> str:
    """Return the URL of a store unchanged.

    Raises:
        ValueError: not an HTTP URL, or it holds credentials. The message does not repeat the URL.
    """
    parts = urlsplit(url)
    if "@" in url:
        raise ValueError(CREDENTIALS_IN_URL)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be a URL such as https://host:port")
    return url


def redact(text: str) -> str:
    """Return a text with the user and password of every URL removed."""
    return re.sub(r"://\S*@", "://…@", text)


def _check_url(url: str) -> str:
    split_url(url)
    return url.rstrip("/")


S3Url = Annotated[str, AfterValidator(_check_url)]
"""`s3://bucket/prefix`, without a trailing slash."""
Endpoint = Annotated[str, AfterValidator(check_endpoint)]
AddressingStyle = Literal["auto", "path", "virtual"]
Checksums = Literal["when_supported", "when_required"]


@dataclass(frozen=True, kw_only=True)
class S3Options:
    """Connection options of a store. boto3 finds the keys itself; they never are in a config."""

    endpoint_url: Endpoint | None = None
    addressing_style: AddressingStyle = "auto"
    checksums: Checksums = "when_supported"
