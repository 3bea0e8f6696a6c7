"""Define exceptions for errors of an S3 store, and convert error responses of the store to exceptions."""

import textwrap
from typing import Any

from wmtp.errors import InputError
from wmtp.s3.options import CREDENTIAL_VARIABLES

INVALID_CREDENTIALS = {
    "InvalidAccessKeyId",
    "SignatureDoesNotMatch",
    "ExpiredToken",
    "InvalidToken",
    "TokenRefreshRequired",
}
ACCESS_DENIED = {"AccessDenied", "403", "AllAccessDisabled", "AccountProblem", "MethodNotAllowed"}
WRONG_REGION = {"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
NOT_FOUND = {"NoSuchKey", "404"}
"""Error codes that mean that an object does not exist."""


class StoreError(OSError):
    """A request to the store failed. Another attempt may succeed."""


class StoreUnreachable(StoreError):
    """The store does not respond, or responds with a server error."""


class UploadNotFound(StoreError):
    """The store does not know the multipart upload, because the upload was aborted or is already complete."""


class ObjectMissing(StoreError):
    """The requested object does not exist in the store."""


def to_error(url: str, action: str, response: dict[str, Any]) -> InputError | StoreError:
    """Convert an error response of the store to an exception. The message of the exception has one line.

    Args:
        url: URL for the message.
        action: verb for the message, such as "write". It says what the request should do.
        response: attribute `response` of a `ClientError` of botocore.
    """
    code, status = str(response["Error"].get("Code")), response["ResponseMetadata"]["HTTPStatusCode"]
    message = f"{code}: {textwrap.shorten(str(response['Error'].get('Message')), 200)}"
    if code in INVALID_CREDENTIALS:
        return InputError(f"{url}: the store does not accept the keys ({code}); set {CREDENTIAL_VARIABLES}")
    if code in ACCESS_DENIED:
        remedy = f"grant this permission, or use another URL or other keys ({CREDENTIAL_VARIABLES})"
        return InputError(f"{url}: the access keys may not {action} there ({code}); {remedy}")
    if code == "NoSuchBucket":
        return InputError(f"{url}: there is no such bucket; create it, or name another")
    if code in WRONG_REGION:
        return InputError(f"{url}: the bucket is in another region ({message}); set AWS_REGION")
    if code == "RequestTimeTooSkewed":
        return InputError(f"{url}: the clock of this machine is wrong ({code}); set it")
    if code in NOT_FOUND:
        return ObjectMissing(f"{url}: {message}")
    if code == "NoSuchUpload":
        return UploadNotFound(f"{url}: {message}")
    is_server_error = status >= 500 and code != "NotImplemented"
    return (StoreUnreachable if is_server_error else StoreError)(f"{url}: {message}")
