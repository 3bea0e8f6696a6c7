"""Where in S3, and how to talk to it; never with which keys."""

import re
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator

ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.\-]{1,61}[a-z0-9])(?:/(.*))?")
KEYS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, in the environment or in .env"
SECRETS = f"holds a user or a password; name them in {KEYS}"


def split_address(url: str) -> tuple[str, str]:
    """The bucket of an address, and its prefix with a slash at its end.

    Raises:
        ValueError: it is no address, or holds more than one; it is not in the message.
    """
    first = url.removeprefix("s3://").partition("/")[0]
    if url.startswith("s3://") and ("@" in first or ":" in first):
        raise ValueError(SECRETS)
    match = ADDRESS.fullmatch(url.rstrip("/"))
    if match is None:
        raise ValueError("must be s3://bucket or s3://bucket/prefix; a bucket has 3 to 63 of a-z, 0-9, '-' and '.'")
    return match[1], f"{match[2]}/" if match[2] else ""


def checked_endpoint(url: str) -> str:
    """The address of a store. Raises `ValueError`, without the address, if it is none or holds more than one."""
    parts = urlsplit(url)
    if "@" in url:
        raise ValueError(SECRETS)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("must be an address such as https://host:port")
    return url


def shown(text: str) -> str:
    """A text without the user and the password of an address in it."""
    return re.sub(r"://\S*@", "://…@", text)


def _checked_address(url: str) -> str:
    split_address(url)
    return url.rstrip("/")


Address = Annotated[str, AfterValidator(_checked_address)]
"""`s3://bucket/prefix`, without a slash at its end."""
Endpoint = Annotated[str, AfterValidator(checked_endpoint)]
AddressingStyle = Literal["auto", "path", "virtual"]
Checksums = Literal["when_supported", "when_required"]


@dataclass(frozen=True, kw_only=True)
class S3Options:
    """How to talk to a store. Its keys come from where boto3 finds them, and never from a config."""

    endpoint_url: Endpoint | None = None
    addressing_style: AddressingStyle = "auto"
    checksums: Checksums = "when_supported"
