"""A disk on which one call, counted from the first, goes wrong: it fails, it fails although it was done, or the process
dies before, within or after it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, Final

from pyworkflow_ray.storage.disk import Disk
from tests.damage.power import LoggedDisk

MODES: Final = ("EIO", "ENOSPC", "done but EIO", "interrupted", "crash before", "crash after")


class Crash(BaseException):
    """The process is gone: nothing of it runs any more. No code catches it by accident."""


class Interrupt(BaseException):
    """As a KeyboardInterrupt in mid-call: the process goes on, and may use again what it was using."""


class _Striking:
    """Call number `at` goes wrong by `mode`. After a crash every further call finds the process dead.

    calls: name and path (or descriptor) of every call, those that a call makes of itself included.
    """

    def strikes(self, at: int, mode: str) -> None:
        self.at = at
        self.mode = mode
        self.struck = ""
        self.dead = False
        self.calls: list[tuple[str, Any]] = []

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("_") or name not in _CALLS or not hasattr(self, "calls"):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.dead and name != "close":
                raise Crash
            number = len(self.calls)
            self.calls.append((name, args[0]))
            if number != self.at:
                return value(*args, **kwargs)
            return self._strike(name, value, args, kwargs)

        return call

    def _strike(self, name: str, act: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.struck = f"{self.mode} at call {self.at}: {name} {args[0]}"
        after = self.mode == "crash after" or (self.mode == "done but EIO" and name in _CHANGES)
        if after or name == "close":  # an error of close comes when the descriptor is gone
            act(*args, **kwargs)
        elif name == "write":
            act(args[0], args[1][: len(args[1]) // 2])  # half of it is there
        if self.mode == "interrupted":
            raise Interrupt(self.struck)
        if self.mode.startswith("crash"):
            self.dead = True
            raise Crash(self.struck)
        code = errno.ENOSPC if self.mode == "ENOSPC" else errno.EIO
        raise OSError(code, os.strerror(code), str(args[0]))


class StrikingDisk(_Striking, Disk):
    """The real disk, one call of which goes wrong."""


class StrikingMemory(_Striking, LoggedDisk):
    """A disk in memory, one call of which goes wrong."""


_CHANGES: Final = frozenset("write fdatasync fsync link rename touch unlink mkdir rmdir".split())
_CALLS: Final = frozenset(name for name in vars(Disk) if not name.startswith("_") and name != "token")
