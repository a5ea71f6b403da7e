"""The taxonomy: kinds by class, by HTTP status of real clients against a real server, of groups; Retry-After."""

from __future__ import annotations

import asyncio
import http.server
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from email.utils import formatdate

import aiohttp
import httpx
import pydantic
import pytest
import requests

from pyworkflow_ray.errors import (
    CircuitOpenError,
    ConfigurationError,
    FatalError,
    PayloadError,
    RetryableError,
    RetryBudgetExhausted,
    StepLostError,
    StepTimeoutError,
)
from pyworkflow_ray.resilience import taxonomy
from pyworkflow_ray.resilience.taxonomy import classify, log_level, server_retry_after, with_kind

NOW = 1_800_000_000.0


class _Model(pydantic.BaseModel):
    amount: int


def _validation_error() -> pydantic.ValidationError:
    with pytest.raises(pydantic.ValidationError) as caught:
        _Model(amount="x")  # type: ignore[arg-type]
    return caught.value


class Unknown(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionError(), "transient"),
        (ConnectionResetError(), "transient"),
        (OSError(101, "Network is unreachable"), "transient"),
        (socket.gaierror(-2, "Name or service not known"), "transient"),
        (RetryableError("x"), "transient"),
        (Unknown(), "transient"),
        (ValueError(), "permanent"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), "permanent"),
        (TypeError(), "permanent"),
        (KeyError("k"), "permanent"),
        (AttributeError(), "permanent"),
        (AssertionError(), "permanent"),
        (NotImplementedError(), "permanent"),
        (PermissionError(13, "x"), "permanent"),
        (FileNotFoundError(2, "x"), "permanent"),
        (ModuleNotFoundError(), "permanent"),
        (_validation_error(), "permanent"),
        (FatalError("x"), "permanent"),
        (PayloadError("x"), "permanent"),
        (StepLostError("x"), "permanent"),
        (CircuitOpenError("x"), "cascade"),
        (RetryBudgetExhausted("x"), "cascade"),
        (TimeoutError(), "timeout"),
        (StepTimeoutError("x"), "timeout"),
        (httpx.ReadTimeout("x"), "timeout"),
        (httpx.ConnectError("x"), "transient"),
        (httpx.UnsupportedProtocol("x"), "permanent"),
        (requests.exceptions.ReadTimeout(), "timeout"),
        (requests.exceptions.MissingSchema(), "permanent"),
        (requests.exceptions.ConnectionError(), "transient"),
        (asyncio.CancelledError(), "permanent"),
        (KeyboardInterrupt(), "permanent"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_kind_by_class(error: BaseException, kind: str) -> None:
    assert classify(error) == kind


def test_permanent_wins_where_classes_overlap() -> None:
    assert classify(ssl.SSLCertVerificationError()) == "permanent"
    both = type("Both", (TimeoutError, LookupError), {})
    assert classify(both()) == "permanent"


def test_case_7_a_chain_is_judged_by_its_outermost_exception() -> None:
    outer = ConnectionError("gave up")
    outer.__cause__ = ValueError("bad")
    assert classify(outer) == "transient"


def test_case_7_a_group_is_permanent_if_any_member_is() -> None:
    assert classify(ExceptionGroup("g", [ConnectionError(), ExceptionGroup("h", [ValueError()])])) == "permanent"
    assert classify(ExceptionGroup("g", [TimeoutError(), TimeoutError()])) == "timeout"
    assert classify(ExceptionGroup("g", [TimeoutError(), ConnectionError()])) == "transient"
    assert classify(ExceptionGroup("g", [CircuitOpenError("x"), ConnectionError()])) == "transient"


def test_a_registered_type_wins_over_its_bases_default_and_the_nearer_entry_over_the_farther() -> None:
    class Busy(ValueError):
        pass

    class BusyStatus(httpx.HTTPStatusError):
        pass

    registered = with_kind(with_kind({}, Busy, "transient"), Exception, "permanent")
    assert classify(Busy(), registered) == "transient"
    assert classify(ValueError(), registered) == "permanent"
    assert classify(ConnectionError(), registered) == "transient", "the table's entry is nearer than Exception"
    assert classify(Unknown(), registered) == "permanent"
    request = httpx.Request("GET", "http://x")
    error = BusyStatus("x", request=request, response=httpx.Response(404, request=request))
    assert classify(error) == "permanent"
    assert classify(error, with_kind({}, BusyStatus, "transient")) == "transient"


@pytest.mark.parametrize(
    ("exc_type", "kind"), [(ValueError, "sometimes"), (ValueError(), "transient"), (int, "permanent")]
)
def test_a_wrong_registration_is_refused(exc_type: type[BaseException], kind: str) -> None:
    with pytest.raises(ConfigurationError):
        with_kind({}, exc_type, kind)


def test_every_kind_has_a_row_a_level_and_a_decision() -> None:
    assert set(taxonomy.TAXONOMY) == set(taxonomy.LOG_LEVELS) == set(taxonomy.RETRIED) == set(taxonomy.KINDS)
    assert [log_level(kind) for kind in ("transient", "permanent", "cascade", "timeout")] == [20, 40, 50, 30]


# Real clients, a real server --------------------------------------------------------------------------------------


class _Answers(http.server.BaseHTTPRequestHandler):
    """GET /<status>?<Retry-After, percent-encoded>"""

    def do_GET(self) -> None:
        path, _, header = self.path.partition("?")
        self.send_response(int(path.strip("/")))
        if header:
            self.send_header("Retry-After", urllib.request.unquote(header))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def _by_httpx(url: str) -> None:
    with httpx.Client(trust_env=False) as client:
        client.get(url).raise_for_status()


def _by_requests(url: str) -> None:
    with requests.Session() as session:
        session.trust_env = False
        session.get(url).raise_for_status()


def _by_aiohttp(url: str) -> None:
    async def get() -> None:
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            response.raise_for_status()

    asyncio.run(get())


def _by_urllib(url: str) -> None:
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url).close()


CLIENTS = pytest.mark.parametrize("get", [_by_httpx, _by_requests, _by_aiohttp, _by_urllib])


def _error(get: object, url: str) -> Exception:
    try:
        get(url)  # type: ignore[operator]
    except Exception as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        return error
    raise AssertionError(f"{url} raised nothing")


@CLIENTS
@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((status, "transient") for status in (408, 425, 429, 500, 503)),
        *((status, "permanent") for status in (400, 401, 404, 422)),
    ],
)
def test_case_14_kind_by_http_status(server: str, get: object, status: int, kind: str) -> None:
    assert classify(_error(get, f"{server}/{status}")) == kind


@CLIENTS
def test_case_14_retry_after_of_a_real_answer(server: str, get: object) -> None:
    assert server_retry_after(_error(get, f"{server}/429?7"), NOW) == 7.0
    date = urllib.request.quote(formatdate(NOW + 30, usegmt=True))
    assert server_retry_after(_error(get, f"{server}/503?{date}"), NOW) == 30.0
    assert server_retry_after(_error(get, f"{server}/503"), NOW) is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        ("1.5", 1.5),
        (formatdate(NOW - 60, usegmt=True), 0.0),
        ("Fri, 15 Jan 2027 08:00:10 -0000", 10.0),
        ("Friday, 15-Jan-27 08:00:10 GMT", 10.0),
        ("999999999999", 100 * 365 * 86400.0),
        ("soon", None),
        ("-5", None),
        ("", None),
        ("inf", None),
    ],
)
def test_case_3_retry_after_in_all_its_forms(header: str, seconds: float | None) -> None:
    request = httpx.Request("GET", "http://x")
    response = httpx.Response(503, headers={"retry-after": header}, request=request)
    assert server_retry_after(httpx.HTTPStatusError("x", request=request, response=response), NOW) == seconds


def test_an_exception_whose_properties_raise_is_no_trouble() -> None:
    class Hostile(Exception):
        def __getattribute__(self, name: str) -> object:
            if name.startswith("__"):
                return super().__getattribute__(name)
            raise RuntimeError(name)

    assert classify(Hostile()) == "transient"
    assert server_retry_after(Hostile(), NOW) is None
    assert classify(httpx.ConnectError("x")) == "transient"  # its .request raises
