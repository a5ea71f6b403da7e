"""The way to Ray: a child process that connects to a running cluster, and acts there for us.

Called by `actions` and `pages`; runs `hands`, and speaks lines of JSON with it. Ray ends the process that is connected
to it when its head is lost, and may hang; people come to this dashboard just then, so no page waits for it and no
process of ours but the child is lost with it (docs/decisions/0028).

Faults: no cluster runs (`Away`, with the reason; looked for again later, the more seldom the longer it stays away, and
at once when something is to be done), a child that dies or is silent (ended; the next call makes another).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pyworkflow_ray.dashboard.parts import Reach
from pyworkflow_ray.errors import PyWorkflowError

HANDS: Final = (sys.executable, "-m", "pyworkflow_ray.dashboard.hands")
CONNECT_S: Final = 60.0  # importing Ray and connecting, on a busy machine
ANSWER_S: Final = 60.0  # as long as `resume` waits at most, and more
AGAIN_S: Final = 15.0  # until a cluster that was not there is looked for again; doubled each time
SELDOM_S: Final = 240.0
LINE_BYTES: Final = 2**24


class Away(Exception):
    """There is no Ray to act through; the message says why. asked: it was lost while it was to do something."""

    def __init__(self, why: str, *, asked: bool = False) -> None:
        super().__init__(why)
        self.asked = asked


class Cluster:
    """See the module. For one event loop."""

    def __init__(self, root: str, address: str | None, *, off: bool = False, command: Sequence[str] = HANDS) -> None:
        """off: there is nothing to be done, and no Ray is looked for. command: of the child."""
        self._command = command
        self._off = off
        self._told = {"storage": root, "address": address}
        self._child: asyncio.subprocess.Process | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._listening: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._why = ""
        self._look_at = 0.0
        self._wait_s = AGAIN_S
        self._closed = False

    @property
    def reach(self) -> Reach:
        if self._off:
            return Reach("off")
        if self._child is not None and self._connecting is None:
            return Reach("connected")
        return Reach("away", self._why) if self._why else Reach("looking")

    def look(self) -> None:
        """Have it looked for, unless that was so shortly ago. Returns at once."""
        idle = self._child is None and self._connecting is None and not (self._off or self._closed)
        if idle and time.monotonic() >= self._look_at:
            self._connecting = asyncio.ensure_future(self._connect())

    async def call(self, what: str, given: Mapping[str, Any], timeout_s: float = ANSWER_S) -> Any:
        """Have `hands` do something, with these arguments; its answer.

        Raises:
            Away: there is no Ray, or it does not answer.
            PyWorkflowError: it was refused; the message says why.
        """
        if self._child is None or self._connecting is not None:
            self._look_at = 0.0
            self.look()
            if self._connecting is not None:
                await asyncio.shield(self._connecting)
        child = self._child
        if child is None:
            raise Away(self._why or "this dashboard looks for none")
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._asked[number] = answer
        try:
            _write(child, {"id": number, "do": what, "with": dict(given)})
            return await asyncio.wait_for(answer, timeout_s)
        except TimeoutError:
            why = f"Ray did not answer within {timeout_s:.0f} s"
            self._lose(child, why)
            raise Away(why, asked=True) from None
        finally:
            self._asked.pop(number, None)

    async def close(self) -> None:
        """Let the child go: it ends when nobody speaks to it any more."""
        self._closed = True
        for task in (self._connecting, self._listening):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        child, self._child = self._child, None
        if child is not None:
            await _end(child)
        if self._ending:
            await asyncio.wait(self._ending)

    async def _connect(self) -> None:
        child = None
        try:
            child = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LINE_BYTES,
                start_new_session=True,  # Ctrl-C is for us; it ends with us
            )  # fmt: skip
            _write(child, self._told)
            assert child.stdout is not None
            line = await asyncio.wait_for(child.stdout.readline(), CONNECT_S)
            told = json.loads(line) if line else {"away": "it ended while it was connected to"}
            if "away" in told:
                raise Away(told["away"])
            self._child, self._why, self._wait_s = child, "", AGAIN_S
            self._listening = asyncio.ensure_future(self._listen(child))
        except (Away, OSError, ValueError, TimeoutError) as error:
            silent = f"no answer within {CONNECT_S:.0f} s" if isinstance(error, TimeoutError) else ""
            self._why = silent or str(error) or type(error).__name__
            self._look_at = time.monotonic() + self._wait_s
            self._wait_s = min(SELDOM_S, 2 * self._wait_s)
            if child is not None:
                await _end(child, at_once=not isinstance(error, Away))
        except asyncio.CancelledError:
            if child is not None:
                await _end(child, at_once=True)
            raise
        finally:
            self._connecting = None

    async def _listen(self, child: asyncio.subprocess.Process) -> None:
        assert child.stdout is not None
        try:
            while line := await child.stdout.readline():
                told = json.loads(line)
                answer = self._asked.get(told["id"])
                if answer is not None and not answer.done():
                    if "refused" in told:
                        answer.set_exception(PyWorkflowError(told["refused"]))
                    elif "failed" in told:
                        answer.set_exception(Away(told["failed"], asked=True))
                    else:
                        answer.set_result(told["done"])
        except ValueError as error:
            self._lose(child, f"its answer can't be read: {error}")
        else:
            self._lose(child, "the connection to it was lost")

    def _lose(self, child: asyncio.subprocess.Process, why: str) -> None:
        if self._child is not child:
            return
        self._child, self._why, self._look_at = None, why, time.monotonic() + 1.0
        ending = asyncio.ensure_future(_end(child))
        self._ending.add(ending)
        ending.add_done_callback(self._ending.discard)
        for answer in self._asked.values():
            if not answer.done():
                answer.set_exception(Away(why, asked=True))


def _write(child: asyncio.subprocess.Process, message: dict[str, Any]) -> None:
    assert child.stdin is not None
    child.stdin.write(json.dumps(message).encode() + b"\n")


async def _end(child: asyncio.subprocess.Process, *, at_once: bool = False) -> None:
    """It ends when nobody speaks to it, and is killed where it does not, or `at_once`. (Never both: before it kills,
    subprocess looks whether it has ended, and takes that news from the loop.)"""
    if at_once:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
    elif child.stdin is not None:
        child.stdin.close()
    try:
        await asyncio.wait_for(child.wait(), 5.0)
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
