"""What a store's answers mean to whoever asked."""

import textwrap
from typing import Any

from wmtp.errors import InputError
from wmtp.s3.options import KEYS

REFUSED_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
REFUSED_ACTIONS = {"AccessDenied", "403", "AllAccessDisabled", "AccountProblem", "MethodNotAllowed"}
OTHER_REGION = {"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
NOT_THERE = {"NoSuchKey", "404"}
"""What a store answers, by what it means."""


class StoreError(OSError):
    """The store failed at something. It may be worth another try."""


class StoreUnreachable(StoreError):
    """The store does not answer, or not with what it was asked for."""


class UploadLost(StoreError):
    """The store does not know an upload in parts: it was given up there, or is complete."""


class ObjectMissing(StoreError):
    """There is no such object."""


def meaning(where: str, action: str, answer: dict[str, Any]) -> InputError | StoreError:
    """The error that a store's refusal of an action is, in one line."""
    code, status = str(answer["Error"].get("Code")), answer["ResponseMetadata"]["HTTPStatusCode"]
    said = f"{code}: {textwrap.shorten(str(answer['Error'].get('Message')), 200)}"
    if code in REFUSED_KEYS:
        return InputError(f"{where}: the store does not accept the keys ({code}); set {KEYS}")
    if code in REFUSED_ACTIONS:
        remedy = f"give them that permission, or name another place or other keys ({KEYS})"
        return InputError(f"{where}: the keys that are set may not {action} there ({code}); {remedy}")
    if code == "NoSuchBucket":
        return InputError(f"{where}: there is no such bucket; create it, or name another")
    if code in OTHER_REGION:
        return InputError(f"{where}: the bucket is in another region ({said}); set AWS_REGION")
    if code == "RequestTimeTooSkewed":
        return InputError(f"{where}: the clock of this machine is wrong ({code}); set it")
    if code in NOT_THERE:
        return ObjectMissing(f"{where}: {said}")
    if code == "NoSuchUpload":
        return UploadLost(f"{where}: {said}")
    is_out_of_order = status >= 500 and code != "NotImplemented"
    return (StoreUnreachable if is_out_of_order else StoreError)(f"{where}: {said}")
