"""Kind and Retry-After of real libraries' errors, as they raise them against real local servers, and read back."""

from __future__ import annotations

import asyncio
import functools
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import botocore.config
import botocore.exceptions
import botocore.session
import grpc
import grpc.aio
import httpx
import openai
import pytest
import requests
import sqlalchemy as sa
from sqlalchemy import orm

from pyworkflow_ray.resilience.taxonomy import classify, http_status, is_throttled, server_retry_after
from tests.unit.execution.calls import CODEC

NOW = 1_800_000_000.0


def raised(call: Callable[[], Any]) -> BaseException:
    try:
        call()
    except BaseException as error:
        return error
    raise AssertionError("it raised nothing")


def back(error: BaseException) -> BaseException:
    """As the workflow gets it, from its record."""
    return CODEC.decode_error(CODEC.encode_error(error, classify(error)))


# HTTP -----------------------------------------------------------------------------------------------------------------


class _Answers(http.server.BaseHTTPRequestHandler):
    """Answers every request with what the test asked for: status, headers, body."""

    answer: tuple[int, dict[str, str], bytes] = (200, {}, b"")
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, headers, body = self.answer
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = _answer

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


def answering(status: int, body: Any = b"", **headers: str) -> None:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    _Answers.answer = (status, named, body if isinstance(body, bytes) else json.dumps(body).encode())


def ask_openai(server: str) -> BaseException:
    client = openai.OpenAI(api_key="x", base_url=server, max_retries=0, timeout=5)
    return raised(lambda: client.models.list())


def ask_aiohttp(server: str) -> BaseException:
    async def get() -> None:
        async with aiohttp.ClientSession() as session, session.get(server) as response:
            response.raise_for_status()

    return raised(lambda: asyncio.run(get()))


@pytest.mark.parametrize(
    ("status", "kind"),
    [(429, "transient"), (500, "transient"), (408, "transient"), (400, "permanent"), (401, "permanent")],
)
def test_openai_by_status(server: str, status: int, kind: str) -> None:
    answering(status, {"error": {"message": "no"}})
    error = ask_openai(server)
    assert isinstance(error, openai.APIStatusError)
    assert (classify(error), http_status(error), is_throttled(error)) == (kind, status, status == 429)


def test_openai_says_how_long_to_wait_in_milliseconds_or_seconds(server: str) -> None:
    answering(429, {"error": {}}, retry_after_ms="1500", Retry_After="9")
    assert server_retry_after(ask_openai(server), NOW) == 1.5
    answering(503, {"error": {}}, Retry_After="9")
    assert server_retry_after(ask_openai(server), NOW) == 9.0


def test_openai_that_gets_no_answer(server: str) -> None:
    client = openai.OpenAI(api_key="x", base_url="http://127.0.0.1:9", max_retries=0)
    assert classify(raised(lambda: client.models.list())) == "transient"
    assert classify(openai.APITimeoutError(request=httpx.Request("GET", "http://x"))) == "timeout"  # type: ignore


def test_errors_of_openai_come_back_whole(server: str) -> None:
    answering(429, {"error": {"message": "slow down", "code": "rate_limit"}}, Retry_After="7")
    error = back(ask_openai(server))
    assert isinstance(error, openai.RateLimitError)
    assert (error.status_code, error.code, error.body) == (
        429,
        "rate_limit",
        {"message": "slow down", "code": "rate_limit"},
    )
    assert error.response.headers["retry-after"] == "7"
    assert (classify(error), server_retry_after(error, NOW)) == ("transient", 7.0)


def test_errors_of_aiohttp_come_back_whole(server: str) -> None:
    answering(503, b"", Retry_After="7")
    error = back(ask_aiohttp(server))
    assert isinstance(error, aiohttp.ClientResponseError)
    assert (error.status, error.message, str(error.request_info.url).rstrip("/")) == (
        503,
        "Service Unavailable",
        server,
    )
    assert error.headers is not None
    assert error.headers["Retry-After"] == "7"
    assert (classify(error), server_retry_after(error, NOW)) == ("transient", 7.0)
    refused = back(ask_aiohttp("http://127.0.0.1:9"))
    assert isinstance(refused, aiohttp.ClientConnectorError)
    assert (refused.host, refused.port, classify(refused)) == ("127.0.0.1", 9, "transient")


def test_redirects_without_end_are_permanent(server: str) -> None:
    answering(302, b"", Location="/again")
    with httpx.Client(trust_env=False, follow_redirects=True) as client:
        assert classify(raised(lambda: client.get(server))) == "permanent"
    with requests.Session() as session:
        session.trust_env = False
        assert classify(raised(lambda: session.get(server))) == "permanent"


# AWS ------------------------------------------------------------------------------------------------------------------


@functools.cache  # a client takes half a second to be made
def dynamo(server: str, **config: Any) -> Any:
    session = botocore.session.Session()
    session.set_credentials("x", "x")
    options = botocore.config.Config(retries={"total_max_attempts": 1}, proxies={}, **config)
    return session.create_client("dynamodb", region_name="eu-west-1", endpoint_url=server, config=options)


def ask_dynamo(server: str, **config: Any) -> BaseException:
    return raised(lambda: dynamo(server, **config).list_tables())


@pytest.mark.parametrize(
    ("status", "code", "kind", "slow"),
    [
        (400, "ProvisionedThroughputExceededException", "transient", True),
        (400, "ThrottlingException", "transient", True),
        (400, "RequestTimeout", "timeout", False),
        (400, "ValidationException", "permanent", False),
        (403, "AccessDeniedException", "permanent", False),
        (500, "InternalServerError", "transient", False),
        (503, "SlowDown", "transient", True),
    ],
)
def test_aws_by_its_code_and_else_by_status(server: str, status: int, code: str, kind: str, slow: bool) -> None:
    answering(status, {"__type": f"com.amazonaws.dynamodb.v20120810#{code}", "message": "no"})
    error = ask_dynamo(server)
    assert isinstance(error, botocore.exceptions.ClientError)
    assert (classify(error), http_status(error), is_throttled(error)) == (kind, status, slow)
    again = back(error)
    assert (type(again), again.response["Error"]["Code"]) == (type(error), code)  # type: ignore[attr-defined]


def test_aws_says_how_long_to_wait(server: str) -> None:
    answering(503, {"__type": "x#ServiceUnavailable"}, Retry_After="4")
    assert server_retry_after(ask_dynamo(server), NOW) == 4.0


def test_aws_without_an_answer_and_without_a_request() -> None:
    assert classify(ask_dynamo("http://127.0.0.1:9")) == "transient"
    wrong = raised(lambda: dynamo("http://127.0.0.1:9").get_item(TableName="orders"))
    assert (type(wrong).__name__, classify(wrong)) == ("ParamValidationError", "permanent")


def test_aws_that_does_not_answer_in_time() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as silent:
        url = f"http://127.0.0.1:{silent.server_address[1]}"
        assert classify(ask_dynamo(url, read_timeout=0.05)) == "timeout"


# gRPC -----------------------------------------------------------------------------------------------------------------


class _Abort(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Ends every call with the status that is named by its method."""

    def service(self, details: Any) -> Any:
        code = grpc.StatusCode[details.method.rpartition("/")[2]]

        def end(request: bytes, context: Any) -> bytes:
            context.set_trailing_metadata((("grpc-retry-pushback-ms", "2500"),))
            context.abort(code, "not now")
            return b""

        return grpc.unary_unary_rpc_method_handler(end)


@pytest.fixture(scope="module")
def grpc_server() -> Iterator[str]:
    served = grpc.server(ThreadPoolExecutor(2))
    served.add_generic_rpc_handlers((_Abort(),))
    port = served.add_insecure_port("127.0.0.1:0")
    served.start()
    yield f"127.0.0.1:{port}"
    served.stop(None).wait()


def ask_grpc(address: str, code: str) -> BaseException:
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]) as channel:
        return raised(lambda: channel.unary_unary(f"/shop/{code}")(b""))


def ask_grpc_aio(address: str, code: str) -> BaseException:
    async def call() -> None:
        options = [("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            await channel.unary_unary(f"/shop/{code}")(b"")

    return raised(lambda: asyncio.run(call()))


@pytest.mark.parametrize("ask", [ask_grpc, ask_grpc_aio])
def test_grpc_by_its_status(grpc_server: str, ask: Callable[[str, str], BaseException]) -> None:
    expected = {
        "UNAVAILABLE": "transient",
        "ABORTED": "transient",
        "RESOURCE_EXHAUSTED": "transient",
        "INTERNAL": "transient",
        "DEADLINE_EXCEEDED": "timeout",
        "INVALID_ARGUMENT": "permanent",
        "NOT_FOUND": "permanent",
        "PERMISSION_DENIED": "permanent",
        "UNIMPLEMENTED": "permanent",
    }
    assert {code: classify(ask(grpc_server, code)) for code in expected} == expected


@pytest.mark.parametrize("ask", [ask_grpc, ask_grpc_aio])
def test_grpc_says_how_long_to_wait_and_comes_back_whole(grpc_server: str, ask: Callable[[str, str], Any]) -> None:
    error = ask(grpc_server, "RESOURCE_EXHAUSTED")
    assert server_retry_after(error, NOW) == 2.5
    assert is_throttled(error)
    again: Any = back(error)
    assert isinstance(again, grpc.RpcError)
    assert (again.code(), again.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "not now")
    assert (classify(again), server_retry_after(again, NOW)) == ("transient", 2.5)


# SQLAlchemy -----------------------------------------------------------------------------------------------------------


def test_sqlalchemy_by_class() -> None:
    engine = sa.create_engine("sqlite://", poolclass=sa.pool.QueuePool, pool_size=1, max_overflow=0, pool_timeout=0.01)
    table = sa.Table("orders", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True))
    with engine.connect() as connection:
        table.create(connection)
        connection.execute(table.insert(), {"id": 1})
        twice = raised(lambda: connection.execute(table.insert(), {"id": 1}))
        assert (type(twice), classify(twice)) == (sa.exc.IntegrityError, "permanent")
        missing = raised(lambda: connection.execute(sa.text("select * from nowhere")))
        assert (type(missing), classify(missing)) == (sa.exc.OperationalError, "transient")
        nothing = raised(lambda: connection.execute(table.select().where(table.c.id == 2)).one())
        assert classify(nothing) == "permanent"
        unbound = raised(lambda: connection.execute(sa.text("select :x"), {}))
        assert classify(unbound) == "permanent"
        busy = raised(engine.connect)
        assert (type(busy), classify(busy)) == (sa.exc.TimeoutError, "timeout")
    assert classify(orm.exc.StaleDataError("x")) == "transient"
    assert classify(sa.exc.ArgumentError("x")) == "permanent"
    again: Any = back(twice)
    assert isinstance(again, sa.exc.IntegrityError)
    assert "UNIQUE" in str(again.orig)
