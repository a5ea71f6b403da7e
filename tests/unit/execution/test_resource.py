"""`pw.resource`: one client a process, safe on the lasting loop, never shipped."""

from __future__ import annotations

import asyncio
import http.server
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import cloudpickle
import httpx
import pytest

import pyworkflow_ray as pw
from tests.unit.execution.calls import CODEC, execute

CLIENT = pw.resource(lambda: httpx.AsyncClient(trust_env=False), close=lambda client: client.aclose())


class _Hello(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive: a second request uses the first one's connection

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hello)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}/"
    httpd.shutdown()
    httpd.server_close()


def test_a_module_level_async_client_serves_one_step_after_another(url: str) -> None:
    seen = []

    @pw.step
    async def fetch() -> str:
        seen.append(CLIENT())
        return (await CLIENT().get(url)).text

    @pw.step
    async def fetch_too() -> str:
        seen.append(CLIENT())
        return (await CLIENT().get(url)).text

    for step in (fetch, fetch_too, fetch):
        outcome = execute(step)
        assert outcome.result is not None, outcome.error
        assert CODEC.decode(outcome.result) == "hello"
    assert len(set(map(id, seen))) == 1
    CLIENT.close()


def test_sync_and_async_steps_share_it() -> None:
    made: list[object] = []
    thing = pw.resource(lambda: made.append(1) or object())

    @pw.step
    def sync() -> None:
        thing()

    @pw.step
    async def in_loop() -> None:
        thing()

    for step in (sync, in_loop, sync, in_loop):
        assert execute(step).status == "completed"
    assert len(made) == 1


def test_a_new_client_for_a_new_loop_once_the_old_one_is_closed() -> None:
    thing = pw.resource(object)

    async def use() -> object:
        assert thing() is thing()
        return thing()

    assert asyncio.run(use()) is not asyncio.run(use())


def test_it_is_pickled_by_the_name_it_has_in_its_module() -> None:
    assert pickle.loads(pickle.dumps(CLIENT)) is CLIENT


def test_without_a_name_it_travels_by_factory_and_one_process_makes_one() -> None:
    thing = pw.resource(lambda: object(), close=None)
    live = thing()
    first, second = cloudpickle.loads(cloudpickle.dumps((thing, thing)))
    third = cloudpickle.loads(cloudpickle.dumps(thing))
    assert first is second is third
    assert third() is not live, "the live object was shipped"


def test_it_is_closed_when_the_process_ends_in_the_loop_that_used_it() -> None:
    code = """
import asyncio, pyworkflow_ray as pw
from tests.unit.execution.calls import execute
async def close(client):
    await asyncio.sleep(0)
    print("closed", client, flush=True)
thing = pw.resource(lambda: "client", close=close)
other = pw.resource(lambda: "other", close=lambda client: 1 / 0)
@pw.step
async def use(): thing(); other()
execute(use)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "closed client\n"
    assert "ZeroDivisionError" in done.stderr


def test_a_forked_child_makes_its_own() -> None:
    thing = pw.resource(os.getpid)
    assert thing() == os.getpid()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, str(thing() == os.getpid()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 10) == b"True"
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(("factory", "close"), [(None, None), (object, 3)])
def test_a_wrong_factory_or_close_is_refused(factory: Any, close: Any) -> None:
    with pytest.raises(pw.ConfigurationError, match="not callable"):
        pw.resource(factory, close)


def test_an_async_factory_is_refused_with_the_remedy() -> None:
    async def make() -> object:
        return object()

    with pytest.raises(pw.ConfigurationError, match="plain function"):
        pw.resource(make)
