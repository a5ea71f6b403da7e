"""What the errors of client libraries say of a failure: kind, HTTP status, Retry-After. No library is imported.

Called by `taxonomy`; calls nothing. Read by name of class and by duck typing: httpx, requests, aiohttp, urllib, openai,
grpc (sync and aio), SQLAlchemy, botocore (boto3). Rules:

* a code that the service answered with (gRPC status, AWS error code, HTTP status) says more than the class;
* properties of foreign classes may raise anything, and then say nothing.

Sources: gRPC, "Status codes and their use" and gRFC A6 (retry pushback); AWS SDKs, "Retry behavior" (botocore 1.44's
lists of throttling and transient codes); RFC 9110, sections 10.2.3 and 15.
"""

from __future__ import annotations

import datetime as dt
import functools
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from types import MappingProxyType
from typing import Any, Literal

Kind = Literal["transient", "permanent", "cascade", "timeout"]

# "module.Class" of libraries whose bases say less than their names; the nearest base that is named decides.
FOREIGN: Mapping[str, Kind] = MappingProxyType(
    {
        "httpx.TimeoutException": "timeout",
        "httpx.InvalidURL": "permanent",
        "httpx.UnsupportedProtocol": "permanent",
        "httpx.TooManyRedirects": "permanent",
        "requests.exceptions.Timeout": "timeout",
        "requests.exceptions.TooManyRedirects": "permanent",
        "openai.APITimeoutError": "timeout",
        "sqlalchemy.exc.TimeoutError": "timeout",  # no connection of the pool became free
        "sqlalchemy.exc.IntegrityError": "permanent",
        "sqlalchemy.exc.DataError": "permanent",
        "sqlalchemy.exc.ProgrammingError": "permanent",
        "sqlalchemy.exc.NotSupportedError": "permanent",
        "sqlalchemy.exc.DBAPIError": "transient",  # OperationalError, InterfaceError, InternalError
        "sqlalchemy.exc.DisconnectionError": "transient",
        "sqlalchemy.orm.exc.StaleDataError": "transient",  # another transaction came first
        "sqlalchemy.exc.SQLAlchemyError": "permanent",  # how the library was used
        "botocore.exceptions.ConnectTimeoutError": "timeout",
        "botocore.exceptions.ReadTimeoutError": "timeout",
        "botocore.exceptions.ParamValidationError": "permanent",
        "botocore.exceptions.NoCredentialsError": "permanent",
        "botocore.exceptions.PartialCredentialsError": "permanent",
        "botocore.exceptions.NoRegionError": "permanent",
        "botocore.exceptions.UnknownServiceError": "permanent",
        "botocore.exceptions.EndpointProviderError": "permanent",
    }
)
# Of a gRPC status: "unavailable" and its like may be tried again; what is left out is transient.
GRPC: Mapping[str, Kind] = MappingProxyType(
    {
        "DEADLINE_EXCEEDED": "timeout",
        **dict.fromkeys(
            (
                "INVALID_ARGUMENT",
                "NOT_FOUND",
                "ALREADY_EXISTS",
                "PERMISSION_DENIED",
                "UNAUTHENTICATED",
                "FAILED_PRECONDITION",
                "OUT_OF_RANGE",
                "UNIMPLEMENTED",
                "DATA_LOSS",
            ),
            "permanent",
        ),
    }
)
_AWS_THROTTLING = frozenset(
    {
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "RequestThrottledException",
        "RequestThrottled",
        "TooManyRequestsException",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "BandwidthLimitExceeded",
        "LimitExceededException",
        "SlowDown",
        "PriorRequestNotComplete",
        "TransactionInProgressException",
        "EC2ThrottledException",
    }
)
_AWS_TIMEOUT = frozenset({"RequestTimeout", "RequestTimeoutException"})
_TRANSIENT_STATUS = frozenset({408, 425, 429})
_DECIMAL = re.compile(r"\d{1,12}(?:\.\d{1,9})?")
MAX_RETRY_AFTER_S = 100 * 365 * 86400.0  # beyond a century an instant no longer fits a datetime


@functools.lru_cache(512)
def kind_of_class(cls: Any) -> Kind | None:
    """Kind of a library's class, by its nearest named base; None where none is named."""
    for base in cls.__mro__:
        # httpx's classes give their public module's name, or that of the file they are in
        kind = FOREIGN.get(f"{base.__module__.partition('._')[0]}.{base.__name__}")
        if kind is not None:
            return kind
    return None


def says_nothing(exc: BaseException) -> bool:
    """Whether it is one of Python's own, with nothing added: the usual case, asked at every failed attempt."""
    return type(exc).__module__ == "builtins" and not exc.__dict__


def kind_of_answer(exc: BaseException) -> Kind | None:
    """Kind of the code that a service answered with, by gRPC or AWS; None where there is none."""
    if says_nothing(exc):
        return None
    code = grpc_code(exc)
    if code is not None:
        return GRPC.get(code, "transient")
    code = aws_code(exc)
    if code in _AWS_THROTTLING:
        return "transient"
    return "timeout" if code in _AWS_TIMEOUT else None


def kind_of_status(status: int | None) -> Kind | None:
    """Kind of an HTTP status; None where the status is no failure, or there is none."""
    if status is None or not 400 <= status <= 599:
        return None
    return "transient" if status >= 500 or status in _TRANSIENT_STATUS else "permanent"


def is_throttled(exc: BaseException) -> bool:
    """Whether the service asked for fewer calls: 429, RESOURCE_EXHAUSTED, a throttling code of AWS, a wait it names."""
    return (
        http_status(exc) == 429
        or grpc_code(exc) == "RESOURCE_EXHAUSTED"
        or aws_code(exc) in _AWS_THROTTLING
        or server_retry_after(exc, 0.0) is not None
    )


def grpc_code(exc: BaseException) -> str | None:
    """Name of the status of a gRPC call's error."""
    if not any(base.__name__ == "RpcError" and base.__module__ == "grpc" for base in type(exc).__mro__):
        return None
    name = _read(_call(exc, "code"), "name")
    return name if isinstance(name, str) else None


def aws_code(exc: BaseException) -> str | None:
    """Error code of an AWS service's answer (botocore's ClientError)."""
    error = _aws(exc).get("Error")
    code = error.get("Code") if isinstance(error, Mapping) else None
    return code if isinstance(code, str) else None


def http_status(exc: BaseException) -> int | None:
    """Status of the HTTP response that `exc` is about, None where it is about none.

    Read from `exc.response.status_code` or `.status` (httpx, requests, openai) or `exc.response["ResponseMetadata"]`
    (botocore), else from the exception itself where it has headers: `status` (aiohttp), `code` (urllib), `status_code`.
    """
    if says_nothing(exc):
        return None
    aws = _aws_metadata(exc).get("HTTPStatusCode")
    if isinstance(aws, int):
        return aws
    response = _read(exc, "response")
    if response is not None:
        return _status(response, ("status_code", "status"))
    if _read(exc, "headers") is not None:
        return _status(exc, ("status_code", "status", "code"))
    return _status(exc, ("status_code",))


def server_retry_after(exc: BaseException, now: float) -> float | None:
    """Seconds that the server asks to wait, None where it asks for none.

    Read from a Retry-After header (seconds or HTTP date), `retry-after-ms`, or gRPC's `grpc-retry-pushback-ms`.

    Args:
        now: UNIX time; a date that is over gives 0. At most a century.

    Source: RFC 9110, section 10.2.3; gRFC A6.
    """
    if says_nothing(exc):
        return None
    for headers in _headers(exc):
        millis = _header(headers, ("retry-after-ms", "grpc-retry-pushback-ms"))
        if millis is not None and _DECIMAL.fullmatch(millis.strip()):
            return min(float(millis) / 1000, MAX_RETRY_AFTER_S)
        text = _header(headers, ("Retry-After", "retry-after"))
        if text is not None:
            return _parse_retry_after(text.strip(), now)
    return None


# Inside -----------------------------------------------------------------------------------------------------------


def _headers(exc: BaseException) -> list[Any]:
    """Whatever may hold headers: of a response, of the error itself, of gRPC's trailing metadata."""
    found = [_read(_read(exc, "response"), "headers"), _read(exc, "headers"), _aws_metadata(exc).get("HTTPHeaders")]
    if grpc_code(exc) is not None:
        metadata = _call(exc, "trailing_metadata")
        try:
            found.append({str(key).lower(): value for key, value in metadata or ()})
        except Exception:
            pass
    return [headers for headers in found if headers is not None]


def _aws(exc: BaseException) -> Mapping[str, Any]:
    response = _read(exc, "response")
    return response if isinstance(response, Mapping) else {}


def _aws_metadata(exc: BaseException) -> Mapping[str, Any]:
    metadata = _aws(exc).get("ResponseMetadata")
    return metadata if isinstance(metadata, Mapping) else {}


def _read(holder: Any, name: str) -> Any:
    try:
        return getattr(holder, name, None)
    except Exception:  # a property of a foreign class may raise anything (httpx: RuntimeError)
        return None


def _call(holder: Any, name: str) -> Any:
    method = _read(holder, name)
    try:
        return method() if callable(method) else None
    except Exception:
        return None


def _status(holder: Any, names: tuple[str, ...]) -> int | None:
    for name in names:
        value = _read(holder, name)
        if isinstance(value, int) and not isinstance(value, bool) and 100 <= value <= 599:
            return int(value)
    return None


def _header(headers: Any, names: tuple[str, ...]) -> str | None:
    get = _read(headers, "get")
    if not callable(get):
        return None
    for name in names:
        try:
            value = get(name)
        except Exception:
            return None
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            return str(value)
    return None


def _parse_retry_after(text: str, now: float) -> float | None:
    if _DECIMAL.fullmatch(text):
        return min(float(text), MAX_RETRY_AFTER_S)
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:  # "-0000": UTC, of an unknown local zone
            date = date.replace(tzinfo=dt.UTC)
        return min(max(0.0, date.timestamp() - now), MAX_RETRY_AFTER_S)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
