"""What an error of a disk or of a store's client means: what it says, whether it may pass, and what to do about it.

Clients are told apart by what their errors carry, so that none of them need be installed.
"""

from __future__ import annotations

import errno
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

NO_STORE = ("NoSuchBucket", "InvalidBucketName")
"""Codes for which more is missing than an object."""
_MAX_SAID = 200
_REACH = "check that the store is reachable and run again"

_CHECK_URL = "check the path and your credentials, then run again"

_PASSING_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_PASSING_CODES = frozenset(
    {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "RequestTimeoutException", "Throttling"}
    | {"ThrottlingException", "RequestLimitExceeded", "BandwidthLimitExceeded", "TooManyRequests", "OperationAborted"}
    | {"ConditionalRequestConflict", "BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"}
    | {"NoSuchUpload"}  # its parts are gone, or the answer was lost that it is complete: begin anew
)
_PASSING_ERRNO = frozenset(
    {errno.EAGAIN, errno.EINTR, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EPIPE}
    | {errno.EMFILE, errno.ENFILE}
    | {errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH}
    | {errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET}
)
_PASSING_CLASSES = frozenset(  # of botocore, aiohttp and urllib3
    {"HTTPClientError", "ConnectionError", "ClientConnectionError", "ClientPayloadError", "ResponseParserError"}
    | {"IncompleteRead", "IncompleteReadError", "HttpProcessingError"}
)

_PHRASES = {status.value: status.phrase for status in HTTPStatus}

_RENEW = "your credentials have expired: renew them and run again"
_WRONG_KEY = "the store does not know your credentials: check the key, the secret and the endpoint"
_NO_BUCKET = "the bucket does not exist: check the URL and the endpoint, or create it"
_REGION = "the bucket lies in another region{region}: set AWS_DEFAULT_REGION to it"
_CODE_ADVICE = {
    "NoSuchBucket": _NO_BUCKET,
    "InvalidBucketName": "that is no name of a bucket: check the URL",
    **dict.fromkeys(("ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"), _RENEW),
    **dict.fromkeys(
        ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId"), _WRONG_KEY
    ),
    "RequestTimeTooSkewed": "the clock of this machine is off: set it",
    "AccessDenied": "your credentials do not allow that: check the bucket's policy and yours",
    **dict.fromkeys(
        ("PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"), _REGION
    ),
    "NotImplemented": "the store lacks what a dataset needs, among it put-if-absent: use another",
    **dict.fromkeys(("QuotaExceeded", "XMinioStorageFull", "507"), "free some space or raise the quota, and run again"),
}
_CLASS_ADVICE = {
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or log in as your provider says",
    "PartialCredentialsError": "set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "UnauthorizedSSOTokenError": _RENEW,
    "SSOTokenLoadError": _RENEW,
    "TokenRetrievalError": _RENEW,
    "ProfileNotFound": "check AWS_PROFILE and ~/.aws/config",
}
_ERRNO_ADVICE = {
    errno.ENOSPC: "free some space and run again",
    errno.EDQUOT: "raise the quota or free some space, and run again",
    errno.EROFS: "the file system is read-only; choose another place",
    errno.EACCES: "check the permissions and credentials",
    errno.ENOENT: "check that it is there; another writer may have cleared what this one had half-written: run again",
    errno.EPERM: "check the permissions and the file system",
    errno.ENOTSUP: "choose another place",
    errno.EISDIR: "a folder lies where this file belongs: move it away and run again",
    errno.ELOOP: "a link there leads back to itself: remove it and run again",
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "something else lies there: move it away and run again"),
    errno.ESTALE: "the server of this mount replaced the file or restarted: check the mount and run again",
    errno.ENOTCONN: "the mount is gone: mount it and run again",
    errno.EIO: "the disk or its mount fails: look at `dmesg` and the mount, then run again",
}


@dataclass(frozen=True)
class Reason:
    """One error, understood."""

    said: str
    """The store's own words, with status and code where it gave them; one line."""
    advice: str
    code: str = ""
    """The store's code, such as NoSuchBucket, or its HTTP status."""
    passes: bool = False
    """True when the same request may succeed a little later."""
    answered: bool = True
    """False when nothing came back from the store."""
    waited: str = ""
    """What `patiently` noted: how often it was tried, and since when."""

    def __str__(self) -> str:
        return f"{self.said} ({self.waited})" if self.waited else self.said

    @property
    def advice_for_input(self) -> str:
        """What to do where the store is not ours but what a user gave to read."""
        return _CHECK_URL if self.advice == _REACH and not self.passes else self.advice


def reason_of(error: BaseException) -> Reason:
    """What an error means; the error that a client wrapped counts too."""
    status, code, message = _answer_of(error)
    passes = (
        code in _PASSING_CODES
        or status in _PASSING_STATUS
        or (not status and any(_is_broken_connection(one) for one in _causes(error)))
    )
    return Reason(
        said=_shown(status, code, message or _text_of(error)),
        advice=_advice(error, code),
        code=code or (str(status) if status else ""),
        passes=passes,
        answered=bool(status),
        waited="; ".join(getattr(error, "__notes__", ())),
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        hidden = getattr(error, "reason", None)  # urllib keeps the cause there
        error = error.__cause__ or (hidden if isinstance(hidden, BaseException) else None)


def _answer_of(error: BaseException) -> tuple[int, str, str]:
    """HTTP status, code and message of a store's answer; 0 and empty where there was none."""
    for one in _causes(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict) and "Error" in response:  # botocore
            said: dict[str, Any] = response["Error"]
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return int(status), str(said.get("Code", "")), str(said.get("Message", ""))
        status = getattr(one, "status", None) or getattr(one, "code", None)  # aiohttp, gcsfs
        if not _is_broken_connection(one) and isinstance(status, int) and 300 <= status < 600:
            return status, "", str(getattr(one, "message", "")) or _PHRASES.get(status, "")
    return 0, "", ""


def _shown(status: int, code: str, message: str) -> str:
    code = "" if code == str(status) else code
    answer = " ".join(filter(None, (str(status) if status else "", code)))
    line = " ".join(message.split())[:_MAX_SAID]
    return f"{answer}: {line}" if answer and line else answer or line


def _text_of(error: BaseException) -> str:
    plain = getattr(error, "strerror", None) if type(error).__module__ == "builtins" else None
    return (plain or str(error) or type(error).__name__).strip()


def _is_broken_connection(error: BaseException) -> bool:
    if isinstance(error, ssl.SSLCertVerificationError) or type(error).__name__ == "ClientConnectorCertificateError":
        return False
    if isinstance(error, TimeoutError | ConnectionError) or getattr(error, "errno", None) in _PASSING_ERRNO:
        return True
    return any(base.__name__ in _PASSING_CLASSES for base in type(error).__mro__)


def _advice(error: BaseException, code: str) -> str:
    if code in _CODE_ADVICE:
        return _CODE_ADVICE[code].format(region=_region(error))
    for one in _causes(error):
        for base in type(one).__mro__:
            if base.__name__ in _CLASS_ADVICE:
                return _CLASS_ADVICE[base.__name__]
    if isinstance(error, PermissionError) and error.errno is None:  # as s3fs raises it
        return _ERRNO_ADVICE[errno.EACCES]
    number = getattr(error, "errno", None) or 0
    return _REACH if _answer_of(error)[0] else _ERRNO_ADVICE.get(number, _REACH)


def _region(error: BaseException) -> str:
    for one in _causes(error):
        response = getattr(one, "response", None)
        if isinstance(response, dict):
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            region = response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
            if region:
                return f" ({region})"
    return ""
