"""Kind and Retry-After of real libraries' errors, as they raise them against real local servers, and read back."""

from __future__ import annotations

import asyncio
import functools
import http.server
import json
import threading
import urllib.error
import urllib.request
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
import mysql_mimic
import openai
import pytest
import requests
import sqlalchemy as sa
from mysql_mimic.errors import MysqlError
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
def test_case_14_openai_by_status(server: str, status: int, kind: str) -> None:
    answering(status, {"error": {"message": "no"}})
    error = ask_openai(server)
    assert isinstance(error, openai.APIStatusError)
    assert (classify(error), http_status(error), is_throttled(error)) == (kind, status, status == 429)


def test_openai_says_how_long_to_wait_in_milliseconds_or_seconds(server: str) -> None:
    answering(429, {"error": {}}, retry_after_ms="1500", Retry_After="9")
    assert server_retry_after(ask_openai(server), NOW) == 1.5
    answering(503, {"error": {}}, Retry_After="9")
    assert server_retry_after(ask_openai(server), NOW) == 9.0


def test_case_14_openai_that_gets_no_answer(server: str) -> None:
    client = openai.OpenAI(api_key="x", base_url="http://127.0.0.1:9", max_retries=0)
    assert classify(raised(lambda: client.models.list())) == "transient"
    assert classify(openai.APITimeoutError(request=httpx.Request("GET", "http://x"))) == "timeout"  # type: ignore


def test_case_14_errors_of_openai_come_back_whole(server: str) -> None:
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


def test_case_14_errors_of_aiohttp_come_back_whole(server: str) -> None:
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


def ask_httpx(server: str, timeout_s: float = 5.0) -> BaseException:
    with httpx.Client(trust_env=False, timeout=timeout_s) as client:
        return raised(lambda: client.get(server).raise_for_status())


def ask_httpx_async(server: str, timeout_s: float = 5.0) -> BaseException:
    async def get() -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=timeout_s) as client:
            (await client.get(server)).raise_for_status()

    return raised(lambda: asyncio.run(get()))


def ask_requests(server: str, timeout_s: float = 5.0) -> BaseException:
    with requests.Session() as session:
        session.trust_env = False
        return raised(lambda: session.get(server, timeout=timeout_s).raise_for_status())


def ask_urllib(server: str, timeout_s: float = 5.0) -> BaseException:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    return raised(lambda: opener.open(server, timeout=timeout_s).close())


def ask_aiohttp_for(server: str, timeout_s: float = 5.0) -> BaseException:
    async def get() -> None:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(server) as response:
            response.raise_for_status()

    return raised(lambda: asyncio.run(get()))


HTTP_CLIENTS = pytest.mark.parametrize("ask", [ask_httpx, ask_httpx_async, ask_requests, ask_urllib, ask_aiohttp_for])


@HTTP_CLIENTS
def test_case_14_http_errors_come_back_whole(server: str, ask: Callable[..., Any]) -> None:
    answering(429, b"slow down", Retry_After="7")
    error = ask(server)
    again: Any = back(error)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert (classify(again), http_status(again), is_throttled(again)) == ("transient", 429, True)
    assert server_retry_after(again, NOW) == 7.0
    if isinstance(again, (httpx.HTTPStatusError, requests.HTTPError)):
        assert again.response is not None
        assert again.response.text == "slow down"
        assert str(again.request.url).rstrip("/") == server
    if isinstance(error, urllib.error.HTTPError):
        assert (again.code, again.reason, again.url) == (429, "Too Many Requests", server)
        error.close()


@HTTP_CLIENTS
def test_case_14_a_server_that_is_not_there_and_one_that_does_not_answer(ask: Callable[..., Any]) -> None:
    refused = ask("http://127.0.0.1:9")
    assert (classify(refused), classify(back(refused))) == ("transient", "transient")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as silent:
        late = ask(f"http://127.0.0.1:{silent.server_address[1]}", 0.05)
    assert (classify(late), classify(back(late))) == ("timeout", "timeout")


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
def test_case_14_aws_by_its_code_and_else_by_status(server: str, status: int, code: str, kind: str, slow: bool) -> None:
    answering(status, {"__type": f"com.amazonaws.dynamodb.v20120810#{code}", "message": "no"})
    error = ask_dynamo(server)
    assert isinstance(error, botocore.exceptions.ClientError)
    assert (classify(error), http_status(error), is_throttled(error)) == (kind, status, slow)
    again: Any = back(error)
    assert (type(again).__mro__, again.response["Error"]["Code"]) == (type(error).__mro__, code)
    assert (again.operation_name, str(again)) == ("ListTables", str(error))
    assert (classify(again), http_status(again), is_throttled(again)) == (kind, status, slow)


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
def test_case_14_grpc_by_its_status(grpc_server: str, ask: Callable[[str, str], BaseException]) -> None:
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
def test_case_14_grpc_says_how_long_to_wait_and_comes_back_whole(
    grpc_server: str, ask: Callable[[str, str], Any]
) -> None:
    error = ask(grpc_server, "RESOURCE_EXHAUSTED")
    assert server_retry_after(error, NOW) == 2.5
    assert is_throttled(error)
    again: Any = back(error)
    assert isinstance(again, grpc.RpcError)
    assert (again.code(), again.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "not now")
    assert (classify(again), server_retry_after(again, NOW)) == ("transient", 2.5)


# SQLAlchemy -----------------------------------------------------------------------------------------------------------


def test_case_14_sqlalchemy_by_class() -> None:
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


class _Told(mysql_mimic.Session):  # type: ignore[misc]
    """A session of a real MySQL server's protocol that fails with the error whose number is in the statement."""

    async def handle_query(self, sql: str, attrs: Any) -> Any:
        number = sql.rpartition("error ")[2].split("'")[0]
        if number == "0":
            raise asyncio.CancelledError  # the server hangs up in the middle of a statement
        if number.isdigit():
            raise MysqlError("as told", int(number))  # type: ignore[arg-type]
        return await super().handle_query(sql, attrs)


@pytest.fixture(scope="module")
def mysql() -> Iterator[str]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    served = mysql_mimic.MysqlServer(session_factory=_Told)
    asyncio.run_coroutine_threadsafe(served.start_server(host="127.0.0.1", port=0), loop).result()
    yield f"mysql+pymysql://user@127.0.0.1:{served._server.sockets[0].getsockname()[1]}/"

    async def end() -> None:
        served.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(end(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_case_14_sqlalchemy_by_what_a_database_server_answers(mysql: str) -> None:
    engine = sa.create_engine(mysql)

    def told(number: int) -> Any:
        with engine.connect() as connection:
            return raised(lambda: connection.execute(sa.text(f"select 'error {number}'")))

    expected = {
        1213: ("OperationalError", "transient"),  # deadlock: another transaction came first
        1205: ("OperationalError", "transient"),  # a lock was not to be had in time
        1040: ("OperationalError", "transient"),  # too many connections
        1062: ("IntegrityError", "permanent"),  # duplicate key
        1048: ("IntegrityError", "permanent"),  # null
        1406: ("DataError", "permanent"),  # too long for the column
        1064: ("ProgrammingError", "permanent"),  # syntax
        1146: ("ProgrammingError", "permanent"),  # no such table
    }
    for number, (name, kind) in expected.items():
        error = told(number)
        again: Any = back(error)
        assert (type(error).__name__, classify(error), number) == (name, kind, number)
        assert (type(again), classify(again), again.orig.args) == (type(error), kind, (number, "as told"))
        assert again.statement == f"select 'error {number}'"
    cut = told(0)  # the connection is lost in the middle of a statement
    assert (type(cut).__name__, classify(cut), cut.connection_invalidated) == ("OperationalError", "transient", True)
    absent = raised(sa.create_engine("mysql+pymysql://user@127.0.0.1:9/").connect)
    assert (type(absent).__name__, classify(absent)) == ("OperationalError", "transient")
    engine.dispose()
