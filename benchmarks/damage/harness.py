"""Damage a store, ask it, judge the answer. Any engine that fits `Engine` can be asked.

Called by `__main__` and tests/damage; calls `damages` and the engine. Rules:

* The store is made by a real process; what that was told is acknowledged is what must come back.
* *detected*: the call raises one of the engine's errors; *named*: and its text names the damaged file. *harmless*: the
  answer is the same. *prefix*: of a run that had not ended the first events, and the answer says that a tail is torn.
  *tail*: the same without saying so, where whole records at the end of an unfinished run's newest file are gone: no log
  can tell that from a crash. *unseen*: the call does not look there, which its engine declares, and others do. *crash*:
  another exception. *hang*: no answer in time. *SILENT*: anything else: a wrong answer that looks right.
* Only what loses whole records may count as *tail*: a flipped bit never does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

from benchmarks.damage.damages import Damage, State

LOSES_RECORDS: Final = frozenset(("cut", "dropped", "removed", "stale", "renamed", "exchanged", "misplaced"))
OUTCOMES: Final = ("harmless", "detected", "unnamed", "prefix", "tail", "unseen", "crash", "hang", "SILENT")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call said. facts: by run (or other subject) what is known of it, in order. unfinished: the subjects that
    may lose a torn tail. torn: those of which the answer says so."""

    facts: Mapping[str, tuple[Any, ...]]
    unfinished: frozenset[str] = frozenset()
    torn: frozenset[str] = frozenset()


Call = Callable[[Path], Answer]


class Engine(Protocol):
    """One engine's stores. errors: the exceptions by which it refuses damage."""

    name: str
    errors: tuple[type[BaseException], ...]

    def make(self, root: Path) -> list[State]:
        """A store in `root`, made by a process of its own; its states after each acknowledgement, the last one last."""

    def calls(self, file: str) -> Mapping[str, Call]:
        """The calls that read `file`, the one to be asked of every damage first."""

    def names(self, state: State) -> Mapping[str, Sequence[str]]:
        """For each file the other names that a copy of it might be taken for."""

    def is_blind(self, call: str, damage: Damage) -> bool:
        """Whether this call is known, and documented, not to see this damage, while others do."""

    def is_named(self, error: BaseException, file: str) -> bool:
        """Whether the error tells a person which file it is."""


@dataclass(slots=True)
class Report:
    """counts: by kind of damage, call and outcome. worst: the damages that should not have gone as they did."""

    engine: str
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    worst: list[str] = field(default_factory=list)

    def total(self, outcome: str) -> int:
        return sum(count for (_, _, found), count in self.counts.items() if found == outcome)

    def __len__(self) -> int:
        return sum(self.counts.values())


class _Late(BaseException):
    """The call took too long; no engine catches it by accident."""


class Harness:
    """One engine's store in a directory, damaged again and again.

    thorough: every so many damages all calls are asked, not the first alone.
    """

    def __init__(self, engine: Engine, root: Path, *, thorough: int = 1, limit_s: float = 20.0) -> None:
        self.engine = engine
        self.root = root
        self.report = Report(engine.name)
        self._thorough = thorough
        self._limit_s = limit_s
        self._asked = 0
        self._right: dict[tuple[str, str], Answer] = {}
        self.history = engine.make(root)
        self.state: State = self.history[-1]

    def run(self, damages: Iterable[Damage]) -> Report:
        for damage in damages:
            self.strike(damage)
        return self.report

    def strike(self, damage: Damage) -> None:
        """Do one damage, ask, count, and mend it."""
        calls = self.engine.calls(damage.file)
        self._asked += 1
        if self._asked % self._thorough:
            calls = dict([next(iter(calls.items()))])
        for name, call in calls.items():
            key = (name, getattr(call, "about", ""))
            if key not in self._right:
                self._right[key] = call(self.root)
        with self._damaged(damage):
            for name, call in calls.items():
                outcome, said = self._judge(call, self._right[name, getattr(call, "about", "")], damage)
                if outcome == "SILENT" and self.engine.is_blind(name, damage):
                    outcome = "unseen"
                self.report.counts[damage.kind, name, outcome] += 1
                if outcome in ("SILENT", "crash", "hang", "unnamed") and len(self.report.worst) < 200:
                    self.report.worst.append(f"{outcome}: {damage}, asked by {name}: {said}"[:600])

    @contextlib.contextmanager
    def _damaged(self, damage: Damage) -> Iterator[None]:
        try:
            self._put(damage.changes)
            yield
        finally:
            self._put({file: self.state.get(file) for file in damage.changes})

    def _put(self, changes: Mapping[str, bytes | None]) -> None:
        for file, content in changes.items():
            path = self.root / file
            if content is None:
                path.unlink(missing_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)

    def _judge(self, call: Call, right: Answer, damage: Damage) -> tuple[str, str]:
        try:
            with _within(self._limit_s):
                answer = call(self.root)
        except self.engine.errors as error:
            named = any(self.engine.is_named(error, file) for file in (damage.file, *damage.changes))
            return ("detected" if named else "unnamed"), str(error)
        except _Late:
            return "hang", ""
        except Exception as error:
            return "crash", repr(error)
        return compare(right, answer, lost_records=damage.kind in LOSES_RECORDS), str(answer)


def compare(right: Answer, answer: Answer, *, lost_records: bool) -> str:
    """The outcome of an answer where `right` would have been right."""
    if answer.facts == right.facts:
        return "harmless"
    outcome = "prefix"
    for subject in {*right.facts, *answer.facts}:
        known, said = right.facts.get(subject), answer.facts.get(subject)
        if known == said:
            continue
        if known is None or said is None or subject not in right.unfinished or said != known[: len(said)]:
            return "SILENT"
        if subject not in answer.torn:
            outcome = "tail" if lost_records else "SILENT"
            if outcome == "SILENT":
                return outcome
    return outcome


@contextlib.contextmanager
def _within(seconds: float) -> Iterator[None]:
    def late(*_: object) -> None:
        raise _Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_state(root: Path) -> dict[str, bytes]:
    """Every file below `root`, by its relative path."""
    state = {}
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            state[str(path.relative_to(root))] = path.read_bytes()
    return dict(sorted(state.items()))


def write_state(state: State, root: Path) -> None:
    for file, content in state.items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@contextlib.contextmanager
def scratch_copy(root: Path) -> Iterator[Path]:
    """A copy of the store, for calls that write."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory, "store")
        shutil.copytree(root, copy)
        yield copy
