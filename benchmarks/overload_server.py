"""A real HTTP server of bounded capacity that can be frozen: `python -m benchmarks.overload_server CAPACITY QUEUE`.

Started by `benchmarks.overload`, which reads the port from its first line. `/work` waits its turn in one line and is
served at most CAPACITY times a second; where QUEUE requests wait already it is answered 503. As in many servers, a
request whose client has left is served all the same, for nothing. `/freeze` and `/thaw` stop and start the serving.
`/log` gives what has happened in each slot of time since `/begin`, as this server saw it.
"""

from __future__ import annotations

import asyncio
import collections
import json
import sys
import time

from aiohttp import web

SLOT_S = 0.5


class Service:
    """One line of requests, served at an even pace."""

    def __init__(self, capacity: float, queue: int) -> None:
        self.pause_s = 1.0 / capacity
        self.queue = queue
        self.waiting: collections.deque[tuple[web.Request, asyncio.Future[None]]] = collections.deque()
        self.frozen = False
        self.began_at = time.time()
        self.log: dict[int, collections.Counter[str]] = {}

    def count(self, what: str) -> None:
        self.log.setdefault(int((time.time() - self.began_at) // SLOT_S), collections.Counter())[what] += 1

    async def serve(self) -> None:
        """One request each `pause_s`; where it comes late it catches up, but never on what it did not do when idle."""
        next_at = time.monotonic()
        while True:
            await asyncio.sleep(max(0.0, next_at - time.monotonic()))
            next_at = max(next_at + self.pause_s, time.monotonic() - 5 * self.pause_s)
            if self.frozen or not self.waiting:
                continue
            request, turn = self.waiting.popleft()
            there = request.transport is not None and not request.transport.is_closing()
            self.count("good" if there else "wasted")
            turn.set_result(None)

    async def work(self, request: web.Request) -> web.Response:
        self.count("arrived")
        if len(self.waiting) >= self.queue:
            self.count("turned_away")
            return web.Response(status=503)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((request, turn))
        await turn
        return web.Response(text="done")

    async def control(self, request: web.Request) -> web.Response:
        what = request.path
        if what == "/begin":
            self.frozen, self.began_at, self.log = False, float(request.query["at"]), {}
            for _, turn in self.waiting:
                turn.set_result(None)
            self.waiting.clear()
        elif what == "/log":
            return web.Response(text=json.dumps(self.log))
        else:
            self.frozen = what == "/freeze"
        return web.Response()


async def main(capacity: float, queue: int) -> None:
    """Serve until the process is ended."""
    service = Service(capacity, queue)
    app = web.Application()
    app.router.add_get("/work", service.work)
    for path in ("/begin", "/freeze", "/thaw", "/log"):
        app.router.add_get(path, service.control)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    print(runner.addresses[0][1], flush=True)
    await service.serve()


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), int(sys.argv[2])))
