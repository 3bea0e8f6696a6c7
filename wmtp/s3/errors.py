"""Exceptions for the error responses of a store."""

import textwrap
from typing import Any

from wmtp.errors import InputError
from wmtp.s3.options import KEYS

REFUSED_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
REFUSED_ACTIONS = {"AccessDenied", "403", "AllAccessDisabled", "AccountProblem", "MethodNotAllowed"}
OTHER_REGION = {"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
NOT_FOUND = {"NoSuchKey", "404"}
"""Error codes of a store, grouped by cause."""


class StoreError(OSError):
    """A request to the store failed. A retry may succeed."""


class StoreUnreachable(StoreError):
    """The store does not respond, or responds with a server error."""


class UploadNotFound(StoreError):
    """The store has no such multipart upload: it was aborted, or it is already complete."""


class ObjectMissing(StoreError):
    """The object does not exist."""


def to_error(where: str, action: str, response: dict[str, Any]) -> InputError | StoreError:
    """Return the exception for an error response of the store, with a message of one line.

    Args:
        where: URL for the message.
        action: verb for the message, such as "write".
        response: the response of boto3's `ClientError`.
    """
    code, status = str(response["Error"].get("Code")), response["ResponseMetadata"]["HTTPStatusCode"]
    message = f"{code}: {textwrap.shorten(str(response['Error'].get('Message')), 200)}"
    if code in REFUSED_KEYS:
        return InputError(f"{where}: the store does not accept the keys ({code}); set {KEYS}")
    if code in REFUSED_ACTIONS:
        remedy = f"grant this permission, or use another location or other keys ({KEYS})"
        return InputError(f"{where}: the keys that are set may not {action} there ({code}); {remedy}")
    if code == "NoSuchBucket":
        return InputError(f"{where}: there is no such bucket; create it, or name another")
    if code in OTHER_REGION:
        return InputError(f"{where}: the bucket is in another region ({message}); set AWS_REGION")
    if code == "RequestTimeTooSkewed":
        return InputError(f"{where}: the clock of this machine is wrong ({code}); set it")
    if code in NOT_FOUND:
        return ObjectMissing(f"{where}: {message}")
    if code == "NoSuchUpload":
        return UploadNotFound(f"{where}: {message}")
    is_server_error = status >= 500 and code != "NotImplemented"
    return (StoreUnreachable if is_server_error else StoreError)(f"{where}: {message}")
