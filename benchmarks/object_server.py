"""Object stores for tests and benchmarks: moto's S3 server in a process of its own, a small S3 server of ours, and a
proxy that stands between us and either and makes of an answer what networks make of it.

The small server is quick (moto takes milliseconds a request), keeps what it is told in memory, and can be told to
ignore conditions, as some servers do. Run as a program it prints its port and serves until its input ends.
"""

from __future__ import annotations

import argparse
import asyncio
import email.utils
import hashlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

BUCKET = "runs"


@dataclass(slots=True)
class Message:
    """A request or an answer: its first line, headers by lower-case name, body."""

    start: str
    headers: dict[str, str]
    body: bytes

    def raw(self) -> bytes:
        headers = {k: v for k, v in self.headers.items() if k not in ("transfer-encoding", "connection")}
        if not self.start.endswith("204 No Content"):
            headers.setdefault("content-length", str(len(self.body)))
        lines = [self.start, *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        return "\r\n".join(lines).encode("latin-1") + self.body


async def read_message(reader: asyncio.StreamReader, *, head: bool = False) -> Message | None:
    """The next message; None where the peer has closed. head: it answers a HEAD, and has no body."""
    try:
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    start, *lines = text.rstrip("\r\n").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = b""
    if head:
        pass
    elif headers.get("transfer-encoding") == "chunked":
        while size := int((await reader.readline()).split(b";")[0], 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
        headers["content-length"] = str(len(body))
    elif "content-length" in headers:
        body = await reader.readexactly(int(headers["content-length"]))
    return Message(start, headers, body)


def answer(status: str, body: bytes = b"", **headers: str) -> Message:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return Message(f"HTTP/1.1 {status}", {"date": email.utils.formatdate(usegmt=True), **given}, body)


class Served:
    """A server on a loop in a thread of its own."""

    def __init__(self) -> None:
        self.port = 0
        self.loop = asyncio.new_event_loop()
        started = threading.Event()

        async def begin() -> None:
            self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
            self.port = self._server.sockets[0].getsockname()[1]
            started.set()

        def run() -> None:
            self.loop.create_task(begin())
            self.loop.run_forever()

        self._thread = threading.Thread(target=run, name=type(self).__name__, daemon=True)
        self._thread.start()
        started.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while (request := await read_message(reader)) is not None:
                reply = await self.handle(request)
                if reply is None:
                    break
                writer.write(reply.raw())
                await writer.drain()
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    async def handle(self, request: Message) -> Message | None:
        """The answer; None: the connection is dropped."""
        raise NotImplementedError


class TinyS3(Served):
    """As much of S3 as obstore asks of it. latency_s: added to every answer."""

    def __init__(self, *, ignores: frozenset[str] = frozenset(), latency_s: float = 0.0) -> None:
        self.ignores = ignores
        self.latency_s = latency_s
        self.objects: dict[str, tuple[bytes, float]] = {}
        self.requests: Counter[str] = Counter()
        super().__init__()

    async def handle(self, request: Message) -> Message:
        method, target, _ = request.start.split(" ")
        parts = urllib.parse.urlsplit(target)
        key = urllib.parse.unquote(parts.path).lstrip("/").partition("/")[2]
        self.requests[method] += 1
        if method == "GET" and not key:
            reply = self._list(dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True)))
        elif method == "PUT":
            reply = self._put(key, request)
        elif method == "DELETE":
            self.objects.pop(key, None)
            reply = answer("204 No Content")
        elif method == "POST":  # delete many, which is how obstore deletes
            names = [text.partition("</Key>")[0] for text in request.body.decode().split("<Key>")[1:]]
            for name in names:
                self.objects.pop(name, None)
            gone = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            reply = answer("200 OK", f"<DeleteResult>{gone}</DeleteResult>".encode(), content_type="application/xml")
        else:
            reply = self._get(key, method, request.headers.get("range", ""))
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        return reply

    def _tag(self, key: str) -> str:
        return f'"{hashlib.md5(self.objects[key][0]).hexdigest()}"'

    def _put(self, key: str, request: Message) -> Message:
        headers = request.headers
        exists = key in self.objects
        if headers.get("if-none-match") == "*" and exists and "if-none-match" not in self.ignores:
            return answer("412 Precondition Failed")
        wanted = headers.get("if-match")
        if wanted is not None and "if-match" not in self.ignores and (not exists or self._tag(key) != wanted):
            return answer("412 Precondition Failed")
        self.objects[key] = request.body, time.time()
        return answer("200 OK", etag=self._tag(key))

    def _get(self, key: str, method: str, wanted: str) -> Message:
        if key not in self.objects:
            return answer("404 Not Found")
        data, at = self.objects[key]
        headers = {"etag": self._tag(key), "last_modified": email.utils.formatdate(at, usegmt=True)}
        if method == "HEAD":
            return answer("200 OK", content_length=str(len(data)), **headers)
        if wanted:
            start, _, last = wanted.removeprefix("bytes=").partition("-")
            part = data[int(start) : int(last) + 1]
            place = f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}"
            return answer("206 Partial Content", part, content_range=place, **headers)
        return answer("200 OK", data, **headers)

    def _list(self, query: dict[str, str]) -> Message:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        keys, common = [], set()
        for key in sorted(key for key in list(self.objects) if key.startswith(prefix)):
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                common.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                keys.append(key)
        lines = [
            f"<Contents><Key>{key}</Key><LastModified>"
            f"{time.strftime('%Y-%m-%dT%H:%M:%S.000Z', time.gmtime(self.objects[key][1]))}</LastModified>"
            f"<ETag>{self._tag(key)}</ETag><Size>{len(self.objects[key][0])}</Size></Contents>"
            for key in keys
        ]
        lines += [f"<CommonPrefixes><Prefix>{one}</Prefix></CommonPrefixes>" for one in sorted(common)]
        text = f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(lines)}</ListBucketResult>"
        return answer("200 OK", text.encode(), content_type="application/xml")


@dataclass(slots=True)
class Fault:
    """What befalls the next `times` requests of this method whose target contains `part`.

    what: "stored-503", "stored-drop" (it is done, and reported as failed, or not at all), "409", "503", "412" (it is
    not done), "late" (reported as failed, and done `after_s` later), "delay" (done and reported `after_s` later).
    """

    what: str
    part: str = ""
    method: str = "PUT"
    times: int = 1
    after_s: float = 0.0


@dataclass
class Struck:
    """Which faults have struck, with the target of each."""

    count: Counter[str] = field(default_factory=Counter)
    targets: list[tuple[str, str]] = field(default_factory=list)


_REFUSALS = {"503": "503 Slow Down", "409": "409 Conflict", "412": "412 Precondition Failed"}


class Proxy(Served):
    """Forwards to `port`; `faults` strike in their order. latency_s: added to every answer."""

    def __init__(self, port: int, *, latency_s: float = 0.0) -> None:
        self.upstream = port
        self.latency_s = latency_s
        self.faults: list[Fault] = []
        self.struck = Struck()
        self.requests: Counter[str] = Counter()
        self._late: set[asyncio.Task[Message]] = set()
        super().__init__()

    async def handle(self, request: Message) -> Message | None:
        method, target, _ = request.start.split(" ")
        self.requests[method] += 1
        fault = self._strikes(method, target)
        if self.latency_s:
            await asyncio.sleep(self.latency_s)
        if fault is None:
            return await self._forward(request)
        if fault.what == "delay":
            await asyncio.sleep(fault.after_s)
            return await self._forward(request)
        if fault.what == "late":
            task = self.loop.create_task(self._later(request, fault.after_s))
            self._late.add(task)
            return answer("503 Slow Down")
        if fault.what in ("stored-503", "stored-drop"):
            await self._forward(request)
            return answer("503 Slow Down") if fault.what == "stored-503" else None
        return answer(_REFUSALS[fault.what])

    def _strikes(self, method: str, target: str) -> Fault | None:
        for fault in self.faults:
            if fault.method == method and fault.part in urllib.parse.unquote(target):
                fault.times -= 1
                if fault.times == 0:
                    self.faults.remove(fault)
                self.struck.count[fault.what] += 1
                self.struck.targets.append((fault.what, target))
                return fault
        return None

    async def _later(self, request: Message, after_s: float) -> Message:
        await asyncio.sleep(after_s)
        return await self._forward(request)

    async def _forward(self, request: Message) -> Message:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        try:
            writer.write(Message(request.start, {**request.headers, "connection": "close"}, request.body).raw())
            reply = await read_message(reader, head=request.start.startswith("HEAD "))
        finally:
            writer.close()
        return reply if reply is not None else answer("502 Bad Gateway")

    def landed(self) -> None:
        """Wait for what was to come late."""
        for task in list(self._late):
            asyncio.run_coroutine_threadsafe(asyncio.wait_for(asyncio.shield(task), 30), self.loop).result()


def environment(url: str) -> dict[str, str]:
    """What obstore reads, for a server of ours at `url`."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
    }


@contextmanager
def moto_server() -> Iterator[int]:
    """moto's S3 server with an empty bucket `BUCKET`: its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    program = os.path.join(os.path.dirname(sys.executable), "moto_server")
    command = [program, "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield port
    finally:
        process.kill()
        process.wait()


@contextmanager
def tiny_server(latency_s: float = 0.0) -> Iterator[int]:
    """`TinyS3` in a process of its own: its port."""
    command = [sys.executable, "-m", "benchmarks.object_server", "--latency", str(latency_s)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds added to every answer")
    server = TinyS3(latency_s=parser.parse_args().latency)
    print(server.port, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
