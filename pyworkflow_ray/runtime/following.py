"""What this process knows of the ends of runs: one long poll at the controller, however many runs are waited for.

Made and used by `client`; calls the controller (`watch`, `states`) and the storage. One thread. Rules:

* A run that this process submits is announced before it exists, so no news of it can be missed while the poll goes on
  without a break; such a run is *certain*: nothing has to be looked up. Any other is looked up once it is waited for.
* Results of completed runs come with the news, as the journal holds them, and are kept for a while: a completed run
  stays as it is. Everything else is read from the storage.

Faults: the controller is away or another one (news may be missing: all that is waited for is looked up again); runs
that another Ray owns (looked up again and again).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

from pyworkflow_ray.engine.events import Payload
from pyworkflow_ray.errors import PyWorkflowError, StorageError
from pyworkflow_ray.runtime.messages import Change, Cursor, News
from pyworkflow_ray.storage.port import StoragePort

log = logging.getLogger("pyworkflow_ray")

_POLL_S = 1.0
_FOREIGN_POLL_S = 0.3
_ANSWER_S = 10.0  # an answer that takes so much longer than it was given will not come
_AGAIN_S = 0.05
_CLOSE_S = 2.0
_IDLE_S = 5.0  # the poll goes on for so long when nothing is waited for: the next run then needs no looking up
_GATHER_S = 0.01  # news of many runs come together
_MANY = 8
_KEPT_RESULTS = 10_000
_ENDS = frozenset({"completed", "failed", "cancelled", "damaged"})


@dataclass(slots=True)
class _Followed:
    """announced: it may not exist yet. checked_at: when it was known to go on (0: never). foreign: not ours."""

    announced: bool = False
    checked_at: float = 0.0
    foreign: bool = False
    waiters: list[Future[None]] = field(default_factory=list)


class Follower:
    """See the module.

    watch: (cursor, seconds to wait for news, seconds to gather more) to a future of news. states: run ids to what the
    controller knows of those that have not ended. Both raise where the controller is away.
    """

    def __init__(
        self,
        storage: StoragePort,
        *,
        watch: Callable[[Cursor | None, float, float], Future[News]],
        states: Callable[[list[str]], dict[str, str]],
    ) -> None:
        self._storage = storage
        self._watch = watch
        self._states = states
        self._lock = threading.Lock()
        self._runs: dict[str, _Followed] = {}
        self._results: OrderedDict[str, bytes] = OrderedDict()
        self._breaks = 0  # how often the poll was broken off: news before that may be missing
        self._cursor: Cursor | None = None
        self._used_at = time.monotonic()
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._loop, name="pyworkflow-ray-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No question to the controller is begun after this."""
        self._closed = True
        self._wake.set()
        self._thread.join(_CLOSE_S)

    # Runs of this process ---------------------------------------------------------------------------------------

    def announce(self, run_ids: Iterable[str]) -> int:
        """These runs are about to be submitted. Returns what `submitted` and `withdraw` want to know."""
        with self._lock:
            for run_id in run_ids:
                self._results.pop(run_id, None)  # of an older run of this id, which retention removed since
                self._runs.setdefault(run_id, _Followed(announced=True))
            self._used_at = time.monotonic()
            unbroken = self._breaks if self._cursor is not None else -1
        self._wake.set()
        return unbroken

    def submitted(self, run_ids: Iterable[str], announced: int) -> None:
        """They exist. Looked up only where news of them may have been missed since they were announced."""
        with self._lock:
            now = time.monotonic() if announced == self._breaks and self._cursor is not None else 0.0
            for run_id in run_ids:
                followed = self._runs.get(run_id)
                if followed is not None and followed.announced:
                    followed.announced, followed.checked_at = False, now
        self._wake.set()

    def withdraw(self, run_ids: Iterable[str]) -> None:
        """They were not made."""
        with self._lock:
            for run_id in run_ids:
                followed = self._runs.get(run_id)
                if followed is not None and followed.announced:
                    followed.announced = False  # whoever waits for one is told by a look
                    if not followed.waiters:
                        del self._runs[run_id]

    # Waiting ----------------------------------------------------------------------------------------------------

    def ended(self, run_id: str) -> Future[None]:
        """A future that is done once the run has ended (or can't be followed: reading it then says why)."""
        future: Future[None] = Future()
        with self._lock:
            if run_id in self._results:
                future.set_result(None)
                return future
            self._runs.setdefault(run_id, _Followed()).waiters.append(future)
            self._used_at = time.monotonic()
        self._wake.set()
        return future

    def forget(self, run_id: str, future: Future[None]) -> None:
        """Nobody waits for this future any more."""
        with self._lock:
            followed = self._runs.get(run_id)
            if followed is not None and future in followed.waiters:
                followed.waiters.remove(future)
                if not followed.waiters and not self._is_certain(followed):
                    del self._runs[run_id]

    def certain(self, run_id: str) -> bool:
        """Whether news of its end will come, or has come with its result: no need to look."""
        with self._lock:
            followed = self._runs.get(run_id)
            return run_id in self._results or (followed is not None and self._is_certain(followed))

    def result_of(self, run_id: str) -> Payload | None:
        """The result of a completed run, where it came with the news and is still kept."""
        with self._lock:
            data = self._results.get(run_id)
        return None if data is None else Payload.model_validate_json(data)

    def _is_certain(self, followed: _Followed) -> bool:
        return bool(followed.announced or (followed.checked_at and not followed.foreign))

    # The poll ---------------------------------------------------------------------------------------------------

    def _loop(self) -> None:
        poll: Future[News] | None = None
        give_up_at = 0.0
        while not self._closed:
            self._wake.clear()
            now = time.monotonic()
            if poll is None and (self._runs or now < self._used_at + _IDLE_S):
                wait_s, gather_s = self._patience()
                give_up_at = now + wait_s + _ANSWER_S
                poll = self._begin(wait_s, gather_s)
            elif poll is None:
                self._break_off()  # nobody waits: the next one looks
                self._wake.wait()
            elif poll.done() or now >= give_up_at:
                again = self._take(poll)
                poll = None
                self._look(again=again)
            else:
                self._look(again=False)
                self._wake.wait(min(give_up_at - now, _FOREIGN_POLL_S if self._is_unsure() else _ANSWER_S))

    def _begin(self, wait_s: float, gather_s: float) -> Future[News] | None:
        """A poll under way. This thread never waits inside Ray: Ray may be shut down at any time."""
        try:
            poll = self._watch(self._cursor, wait_s, gather_s)
        except Exception as error:
            self._away(error)
            return None
        poll.add_done_callback(lambda _: self._wake.set())
        return poll

    def _take(self, poll: Future[News]) -> bool:
        """Handle the poll's news. Returns whether some may be missing: all that is waited for must be looked up."""
        try:
            news = poll.result(0)
        except Exception as error:
            self._away(error)
            return True
        if news.reset:
            self._break_off()
        self._cursor = news.cursor
        for change in news.changes:
            self._changed(change)
        return news.reset

    def _away(self, error: Exception) -> None:
        log.debug("watching: %s", error)
        self._break_off()
        self._wake.wait(_AGAIN_S)

    def _patience(self) -> tuple[float, float]:
        """How long to wait for news, and for more once there are some."""
        with self._lock:
            return _POLL_S, _GATHER_S if len(self._runs) > _MANY else 0.0

    def _is_unsure(self) -> bool:
        with self._lock:
            return any(not (followed.announced or self._is_certain(followed)) for followed in self._runs.values())

    def _break_off(self) -> None:
        with self._lock:
            self._cursor = None
            self._breaks += 1

    def _changed(self, change: Change) -> None:
        run_id, what, result = change
        if what == "fenced":
            self._checked(run_id, foreign=True)
        if what not in _ENDS:
            return
        if result is not None:
            with self._lock:
                self._results[run_id] = result
                if len(self._results) > _KEPT_RESULTS:
                    self._results.popitem(last=False)
        self._release(run_id)

    def _look(self, *, again: bool) -> None:
        """Look up what may have ended unnoticed: all of it (`again`), or what is new, and foreign runs now and then."""
        now = time.monotonic()
        with self._lock:
            chosen = [
                run_id
                for run_id, followed in self._runs.items()
                if not followed.announced
                and (
                    again
                    or not followed.checked_at
                    or (followed.foreign and now > followed.checked_at + _FOREIGN_POLL_S)
                )
            ]
        if not chosen:
            return
        known: dict[str, str] | None
        try:
            known = self._states(chosen)
        except Exception as error:
            log.debug("asking for states: %s", error)
            known = None
        for run_id in chosen:
            if known is not None and run_id in known:
                self._checked(run_id, foreign=False)
            elif self._has_ended(run_id):
                self._release(run_id)
            else:
                self._checked(run_id, foreign=True)

    def _has_ended(self, run_id: str) -> bool:
        try:
            return self._storage.read_run(run_id).finished
        except StorageError:
            return True  # reading it again tells the caller
        except PyWorkflowError:
            return True

    def _checked(self, run_id: str, *, foreign: bool) -> None:
        with self._lock:
            followed = self._runs.get(run_id)
            if followed is not None and not followed.announced:
                followed.checked_at, followed.foreign = time.monotonic(), foreign

    def _release(self, run_id: str) -> None:
        with self._lock:
            followed = self._runs.pop(run_id, None)
        for future in followed.waiters if followed is not None else ():
            if not future.done():
                future.set_result(None)
