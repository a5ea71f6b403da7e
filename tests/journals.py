"""What the tests of the journal share: small events, a disk that fails when told, and a disk in memory whose every call
is a step of its own, so that all interleavings of several owners can be tried on the real code."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from pyworkflow_ray.engine.events import CodeEnvironment, CodeRef, Event, Payload, RunCompleted, RunCreated, TimerFired
from pyworkflow_ray.storage.disk import Disk
from pyworkflow_ray.storage.storage import Storage

STORAGE_ID = "5" * 32


def created(run_id: str = "run", storage_id: str = STORAGE_ID, **fields: Any) -> RunCreated:
    return RunCreated(
        **{
            "seq": 0,
            "at": 1.0,
            "run_id": run_id,
            "run_uid": f"uid-{run_id}",
            "storage_id": storage_id,
            "workflow": "flow",
            "code": CodeRef(how="import", name="flow", module="m", qualname="flow"),
            "environment": CodeEnvironment(key="k", python="3.11"),
            **fields,
        }
    )


def fired(seq: int, position: str = "") -> TimerFired:
    return TimerFired(seq=seq, at=float(seq), position=position or str(seq))


def ended(seq: int) -> RunCompleted:
    return RunCompleted(seq=seq, at=float(seq), result=Payload(enc="json", data=seq))


def names(events: list[Event]) -> list[str]:
    """The events, short: "run_created", then type and position."""
    return [f"{event.type}:{getattr(event, 'position', '')}".removesuffix(":") for event in events]


def make_run(storage: Storage, run_id: str = "run", *, lease: str = "", events: int = 0) -> None:
    """A run with `events` more events in epoch 0, its journal closed."""
    storage.create_run(created(run_id, storage.storage_id), lease=lease)
    journal, _ = storage.activate(run_id, lease, first=True)
    for seq in range(1, events + 1):
        journal.append([fired(seq)]).result()
    journal.close()


class FaultyDisk(Disk):
    """The real disk; each call asks `fault` first, with the name of the call and its path or descriptor."""

    def __init__(self) -> None:
        self.fault: Callable[[str, Any], None] = lambda call, what: None
        self.calls: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("_") or name in ("fault", "calls", "token") or not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            self.fault(name, args[0])
            return value(*args, **kwargs)

        return call


def failing(call: str, code: int, *, skip: int = 0) -> Callable[[str, Any], None]:
    """A fault: `call` fails with errno `code`, after `skip` calls that work."""
    left = [skip]

    def fault(name: str, what: Any) -> None:
        if name == call:
            if left[0] == 0:
                raise OSError(code, os.strerror(code), str(what))
            left[0] -= 1

    return fault


# The disk in memory -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Files:
    """A file system as a value. Files are known by an id that their maker chose, so equal states compare equal.

    names, contents: as a process sees them. safe_names, safe_contents: what a power loss leaves at least.
    """

    names: dict[str, str] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)
    safe_names: dict[str, str] = field(default_factory=dict)
    safe_contents: dict[str, bytes] = field(default_factory=dict)

    @cached_property
    def key(self) -> tuple[Any, ...]:
        parts = (self.names, self.contents, self.safe_names, self.safe_contents)
        return tuple(frozenset(part.items()) for part in parts)

    def after_power_loss(self) -> Files:
        contents = {file: self.safe_contents.get(file, b"") for file in self.safe_names.values()}
        return Files(self.safe_names, contents, self.safe_names, contents)


class Suspended(BaseException):
    """The actor's next step is not to be taken yet."""


_PRIVATE = {"write_file", "open_append", "close", "try_lock"}  # nobody else sees them


class MemoryDisk(Disk):
    """Files in memory for one actor. It repeats the answers in `log`, takes at most `steps` further steps that others
    can see, and then raises Suspended; so running an actor again with a longer log takes it one step on. A call for
    which `joined(call, file)` holds is one step with the call after it."""

    def __init__(
        self,
        files: Files,
        actor: str = "",
        log: tuple[Any, ...] = (),
        steps: int = 1_000_000,
        *,
        tear: bool = True,
        joined: Callable[[str, str], bool] = lambda call, file: False,
    ) -> None:
        self.files = files
        self.log = list(log)
        self._actor = actor
        self._tear = tear
        self._joined = joined
        self._replayed = 0
        self._steps = steps
        self._tokens = 0
        self._suspended = False
        self._descriptors: list[str] = []

    def token(self) -> str:
        self._tokens += 1
        return f"{self._actor}{self._tokens}"

    def _step(self, call: str, path: str, act: Callable[[], Any]) -> Any:
        if self._suspended:
            raise Suspended
        if self._replayed < len(self.log):
            answer = self.log[self._replayed]
        else:
            if call not in _PRIVATE and not path.startswith("/tmp/"):
                if self._steps == 0:
                    self._suspended = True
                    raise Suspended
                if not self._joined(call, self.files.names.get(path, path)):
                    self._steps -= 1
            try:
                answer = act()
            except OSError as error:
                answer = error
            self.log.append(answer)
        self._replayed += 1
        if isinstance(answer, OSError):
            raise answer
        return answer

    def _file(self, path: str) -> str:
        try:
            return self.files.names[path]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "no such file", path) from None

    def _content(self, file: str, data: bytes) -> None:
        self.files = replace(self.files, contents={**self.files.contents, file: data})

    def _sync(self, file: str) -> None:
        safe = {**self.files.safe_contents, file: self.files.contents[file]}
        self.files = replace(self.files, safe_contents=safe)

    def listdir(self, path: str) -> list[str]:
        return self._step(
            "listdir", path, lambda: sorted(n.removeprefix(f"{path}/") for n in self.files.names if n.startswith(path))
        )

    def read(self, path: str, limit: int | None = None) -> bytes:
        return self._step("read", path, lambda: self.files.contents[self._file(path)])

    def write_file(self, path: str, data: bytes, *, sync: bool = True) -> None:
        def act() -> None:
            file = f"file of {path}"
            self.files = replace(self.files, names={**self.files.names, path: file})
            self._content(file, data)
            self._sync(file)

        self._step("write_file", path, act)

    def sync_old_epoch(self, path: str) -> None:
        self._step("sync_old_epoch", path, lambda: self._sync(self._file(path)))

    def sync_dir(self, path: str) -> None:
        def act() -> None:
            safe = {n: f for n, f in self.files.safe_names.items() if not n.startswith(f"{path}/")}
            safe |= {n: f for n, f in self.files.names.items() if n.startswith(f"{path}/")}
            self.files = replace(self.files, safe_names=safe)

        self._step("sync_dir", path, act)

    def link(self, source: str, target: str) -> None:
        def act() -> None:
            if target in self.files.names:
                raise FileExistsError(errno.EEXIST, "exists", target)
            self.files = replace(self.files, names={**self.files.names, target: self._file(source)})

        self._step("link", target, act)

    def unlink(self, path: str) -> None:
        def act() -> None:
            self.files = replace(self.files, names={n: f for n, f in self.files.names.items() if n != path})

        self._step("unlink", path, act)

    def open_append(self, path: str) -> int:
        self._descriptors.append(self._step("open_append", path, lambda: self._file(path)))
        return len(self._descriptors) - 1

    def try_lock(self, fd: int) -> bool:
        return True

    def write(self, fd: int, data: bytes) -> None:
        """In two steps where `tear` is set, the first of which tears a record: others see it half-written."""
        file = self._descriptors[fd]
        half = len(data) // 2 if self._tear else len(data)
        for piece in filter(None, (data[:half], data[half:])):
            self._step("write", file, lambda piece=piece: self._content(file, self.files.contents[file] + piece))

    def fdatasync(self, fd: int) -> None:
        self._step("fdatasync", self._descriptors[fd], lambda: self._sync(self._descriptors[fd]))

    def close(self, fd: int) -> None:
        pass
