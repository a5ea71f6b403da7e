"""Timeouts and interruption of sync user code: real ones, by SIGALRM in the main thread.

Called by `perform`; calls nothing of ours but `interrupt`. Rules:

* a `StopUserCode` is raised only into user code: the handler looks at the stack, and raises only where the border
  function of an attempt lies below the code that was interrupted, with none of this module's bookkeeping above it;
* it is a BaseException, so that `except Exception: pass` does not swallow it, and is raised again every `REPEAT_S`
  until the user's function is left; whatever the function does then, the attempt is timed out or cancelled;
* attempts may lie within one another (a step called inside a step): the outermost that is due is the one stopped;
* in a plain call the handler and timer of whoever used SIGALRM before are put back; in a worker the handler stays.

Faults: user code may swallow BaseExceptions, may take SIGALRM for itself, or may be stuck in C code, where no Python
handler runs. For the last, and the first, a step worker (and only it) is ended after the grace by `faulthandler`,
whose thread needs no GIL: the stack is dumped, the process exits with status 1, and its owner sees a lost worker.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Literal

from pyworkflow_ray.execution.interrupt import Interrupt

GRACE_S = 2.0  # from the timeout, or the cancel, to the end by force
# A signal that comes just before the thread blocks is not seen until it wakes: the kernel repeats it until it was seen.
AGAIN_S = 0.05
LATER_S = 0.005  # the signal came in our own bookkeeping: look again
REPEAT_S = 0.5  # a user's clean-up has this long before it is interrupted as well

Reason = Literal["timeout", "cancelled"]


class StopUserCode(BaseException):
    """Raised into sync user code that must end. Not an error of ours to catch: it never leaves this package."""

    def __init__(self, guard: SyncGuard) -> None:
        super().__init__("pyworkflow_ray stops this attempt")
        self.guard = guard


class SyncGuard:
    """One attempt of sync code: `run` it once.

    Args:
        timeout_s: Seconds it may run; None: no limit.
        interrupt: Cancels it; None: nothing does.
        kill_stuck: End the process where the code does not end within the grace. Step workers only.
    """

    __slots__ = ("_frame", "_next_at", "_told", "due_at", "interrupt", "kill_stuck", "reason", "slept_s", "timeout_s")

    def __init__(
        self, timeout_s: float | None = None, interrupt: Interrupt | None = None, *, kill_stuck: bool = False
    ) -> None:
        self.timeout_s = timeout_s
        self.interrupt = interrupt
        self.kill_stuck = kill_stuck
        self.reason: Reason | None = None  # set once it was told to stop
        self.due_at: float | None = None
        self.slept_s = 0.0  # virtually: see `elapse`
        self._next_at: float | None = None
        self._told = False  # it was raised into the user's code, which has until `_next_at` to leave
        self._frame: FrameType | None = None

    def run(self, function: Callable[[], Any]) -> Any:
        """The function's result. May raise anything; look at `reason` first.

        Off the main thread, or with neither timeout nor interrupt, the function is simply called.
        """
        if (self.timeout_s is None and self.interrupt is None) or not on_main_thread():
            return function()
        try:
            _enter(self)
            return self._border(function)
        finally:
            _leave(self)

    def _border(self, function: Callable[[], Any]) -> Any:
        self._frame = sys._getframe()
        return function()

    def _is_due(self, now: float) -> bool:
        if self.interrupt is not None and self.interrupt.cancelled:
            self.reason = self.reason or "cancelled"
        elif self.due_at is not None and now >= self.due_at:
            self.reason = self.reason or "timeout"
        return self.reason is not None

    def _told_recently(self, now: float) -> bool:
        return self._told and self._next_at is not None and now < self._next_at

    def _holds(self, frame: FrameType | None) -> bool:
        """Whether the attempt's border lies at `frame` or below."""
        while frame is not None and frame is not self._frame:
            frame = frame.f_back
        return frame is not None


def on_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


# Without the enum that the wrapper tries to make of every handler, at ten times the cost.
_handler_of: Callable[[int], Any] = getattr(sys.modules.get("_signal"), "getsignal", signal.getsignal)

# The one timer of the process -------------------------------------------------------------------------------------

_guards: list[SyncGuard] = []  # outermost first; changed in the main thread only
_before: tuple[Any, float, float, float] | None = None  # whose SIGALRM it was: handler, rest, interval, taken at
_timer = threading.RLock()  # between the thread that cancels and the main thread; the handler never takes it
# Once another thread may send the signal, it may come late: the default handler, put back, would end the process.
_keep_handler = False


def _enter(guard: SyncGuard) -> None:
    global _before, _keep_handler
    now = time.monotonic()
    if guard.timeout_s is not None:
        guard.due_at = guard._next_at = now + guard.timeout_s
    if not _guards:
        rest, interval = signal.setitimer(signal.ITIMER_REAL, 0)
        handler = _handler_of(signal.SIGALRM)
        if handler is not _on_alarm:
            signal.signal(signal.SIGALRM, _on_alarm)
        _before = (handler, rest, interval, now)
    with _timer:
        _guards.append(guard)
        if guard._next_at is not None or len(_guards) > 1:
            _set_timer(now)  # else it is off already
    if guard.kill_stuck:
        kill_switch.register(guard)
        if guard.timeout_s is not None:
            kill_switch.arm(guard, guard.timeout_s + GRACE_S)
    if guard.interrupt is not None:
        _keep_handler = True
        guard.interrupt.bind(_wake)


def _leave(guard: SyncGuard) -> None:
    global _before
    guard._frame = None
    if guard not in _guards:
        return
    with _timer:
        _guards.remove(guard)
        _set_timer(time.monotonic())
    if guard.interrupt is not None:
        guard.interrupt.unbind(_wake)
    kill_switch.disarm(guard)
    if _guards or _before is None:
        return
    handler, rest, interval, taken_at = _before
    _before = None
    if handler is not _on_alarm and not _keep_handler:
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
    if rest and handler is not _on_alarm:
        signal.setitimer(signal.ITIMER_REAL, max(0.001, rest - (time.monotonic() - taken_at)), interval)


def _wake() -> None:
    """From any thread: have the handler look. The signal also ends a blocking call of the main thread."""
    ident = threading.main_thread().ident
    for guard in list(_guards):
        if guard.kill_stuck and guard.interrupt is not None and guard.interrupt.cancelled:
            kill_switch.arm(guard, GRACE_S)
    with _timer:
        if ident is not None and _guards:
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)
            signal.pthread_kill(ident, signal.SIGALRM)


def _set_timer(now: float) -> None:
    due = [guard._next_at for guard in _guards if guard._next_at is not None]
    signal.setitimer(signal.ITIMER_REAL, max(0.0001, min(due) - now) if due else 0, AGAIN_S if due else 0)


def _on_alarm(signum: int, frame: FrameType | None) -> None:
    if not _guards:
        return  # it comes late
    now = time.monotonic()
    border = _border_below(frame)
    victim: SyncGuard | None = None
    for guard in _guards:
        if guard._is_due(now) and not guard._told_recently(now):
            held = border is not None and guard._holds(border)
            guard._next_at, guard._told = now + (REPEAT_S if held else LATER_S), held
            if victim is None and held:
                victim = guard
    _set_timer(now)
    if victim is not None:
        raise StopUserCode(victim)


def _border_below(frame: FrameType | None) -> FrameType | None:
    """The border of the user code that runs in `frame`; None where this module's bookkeeping runs, or other code."""
    nearest = frame
    while nearest is not None and nearest.f_globals is not _on_alarm.__globals__:
        nearest = nearest.f_back
    if nearest is None or nearest is frame or nearest.f_code is not SyncGuard._border.__code__:
        return None
    return nearest


def elapse(seconds: float, spend: Callable[[float], None]) -> None:
    """Virtual time passes in the sync code that calls this: what a test environment's sleep is made of.

    Args:
        seconds: How long the code sleeps.
        spend: Told how much of it passes: less where an attempt's timeout comes first, which then stops the code here.
    """
    limited = [guard for guard in _guards if guard.timeout_s is not None]
    lefts = [(guard.timeout_s or 0.0) - guard.slept_s for guard in limited]
    passes = min([seconds, *(max(0.0, left) for left in lefts)])
    victim = next((guard for guard, left in zip(limited, lefts, strict=True) if left <= passes), None)
    with _timer:
        for guard in limited:
            guard.slept_s += passes
            guard.due_at = None if guard.due_at is None else guard.due_at - passes
            guard._next_at = None if guard._next_at is None else guard._next_at - passes
        if victim is not None:
            victim.reason, victim._told, victim._next_at = "timeout", True, time.monotonic() + REPEAT_S
        _set_timer(time.monotonic())
    spend(passes)
    if victim is not None:
        raise StopUserCode(victim)


class KillSwitch:
    """Ends this process at the earliest of the instants armed. There is one timer for it in a process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owners: dict[object, float | None] = {}

    def register(self, owner: object) -> None:
        """From now on, until it disarms, `owner` may arm."""
        with self._lock:
            self._owners[owner] = None

    def arm(self, owner: object, seconds: float) -> None:
        """End the process in `seconds`; of two calls the earlier holds. Nothing where `owner` has disarmed already."""
        at = time.monotonic() + seconds
        with self._lock:
            if owner in self._owners:
                before = self._owners[owner]
                self._owners[owner] = at if before is None else min(at, before)
                self._set()

    def disarm(self, owner: object) -> None:
        with self._lock:
            if self._owners.pop(owner, None) is not None:
                self._set()

    def _set(self) -> None:
        instants = [at for at in self._owners.values() if at is not None]
        if not instants:
            faulthandler.cancel_dump_traceback_later()
            return
        seconds = max(0.001, min(instants) - time.monotonic())
        # the worker's own stderr: sys.stderr may have been replaced by something without a file
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or sys.stderr)


kill_switch = KillSwitch()
