"""What a store is asked to do while its disk goes wrong, and what must hold of it afterwards.

A scenario notes in its ledger what was acknowledged to it, and before that what it attempts. All is deterministic: the
n-th call of the disk is the same call every time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from pyworkflow_ray.engine.events import TERMINAL, Event, RunActivated
from pyworkflow_ray.errors import StorageError
from pyworkflow_ray.storage.breaker_states import BreakerStates
from pyworkflow_ray.storage.compact import compact
from pyworkflow_ray.storage.journal import RETIRED
from pyworkflow_ray.storage.lease import Lease, dead_leases, orphans
from pyworkflow_ray.storage.storage import Storage
from tests.journals import created, ended, fired, make_run


@dataclass
class Ledger:
    """attempted, acknowledged: by run id, the texts of its events; a run that is only created has one."""

    attempted: dict[str, list[str]] = field(default_factory=dict)
    acknowledged: dict[str, list[str]] = field(default_factory=dict)
    blobs: list[str] = field(default_factory=list)

    def copy(self) -> Ledger:
        return Ledger(
            {name: list(events) for name, events in self.attempted.items()},
            {name: list(events) for name, events in self.acknowledged.items()},
        )

    def knows(self, run_id: str, events: list[Event]) -> None:
        """These events were there before."""
        self.attempted[run_id] = [text(event) for event in events]
        self.acknowledged[run_id] = list(self.attempted[run_id])

    def attempts(self, run_id: str, *events: Event) -> None:
        self.attempted.setdefault(run_id, []).extend(map(text, events))

    def has(self, run_id: str, *events: Event) -> None:
        self.acknowledged.setdefault(run_id, []).extend(map(text, events))


def text(event: Event) -> str:
    return event.model_dump_json()


Act = Callable[[Storage, Ledger], None]


@dataclass(frozen=True)
class Scenario:
    """prepare: on a healthy disk. act: while it goes wrong. again: whether `act` can simply be called once more."""

    name: str
    prepare: Act
    act: Act


def _run(storage: Storage, ledger: Ledger, run_id: str, events: int = 0, end: bool = False) -> None:
    make_run(storage, run_id, events=events)
    if end:
        journal, history = storage.activate(run_id, "")
        journal.append([ended(len(history))]).result()
        journal.finish()
    ledger.knows(run_id, storage.read_run(run_id).events)


def _create(storage: Storage, ledger: Ledger) -> None:
    event = created("new", storage.storage_id)
    ledger.attempts("new", event)
    storage.create_run(event)
    ledger.has("new", event)


def _create_many(storage: Storage, ledger: Ledger) -> None:
    events = [created(run_id, storage.storage_id) for run_id in ("a", "b", "c", "taken")]
    for event in events[:3]:
        ledger.attempts(event.run_id, event)
    made = storage.create_runs(events)
    for event, is_ours in zip(events, made, strict=True):
        if is_ours:
            ledger.has(event.run_id, event)


def _append(
    storage: Storage, ledger: Ledger, run_id: str, count: int, *, first: bool = False, end: bool = True
) -> None:
    journal, history = storage.activate(run_id, "", first=first)
    seq = len(history)
    ledger.attempted[run_id] = [text(event) for event in history]
    for n in range(count):
        events: list[Event] = [fired(seq, f"x{seq}"), fired(seq + 1, f"y{seq}")]
        if n == 0:
            events[0] = RunActivated(seq=seq, at=1.0, epoch=journal.epoch)
        ledger.attempts(run_id, *events)
        try:
            journal.append(events).result()
        except BaseException:
            with contextlib.suppress(StorageError):  # whoever tries once more is refused, or acknowledged in truth
                ledger.attempts(run_id, *events)
                journal.append(events).result()
                ledger.has(run_id, *events)
            raise
        ledger.has(run_id, *events)
        seq += 2
    if end:
        ledger.attempts(run_id, ended(seq))
        journal.append([ended(seq)]).result()
        ledger.has(run_id, ended(seq))
        journal.finish()
    else:
        journal.close()


def _fold(storage: Storage, ledger: Ledger) -> None:
    folding = Storage(storage.root, storage.storage_id, storage.disk, fold_limit=1)
    for _ in range(3):
        _append(folding, ledger, "run", 1, end=False)


def _retire(storage: Storage, ledger: Ledger) -> None:
    compact(storage)


def _blob(storage: Storage, ledger: Ledger) -> None:
    for data in (b"one" * 100, b"two" * 100, b"one" * 100):
        ledger.blobs.append(storage.put_blob(data))


def _lease(storage: Storage, ledger: Ledger) -> None:
    with Lease.join(storage) as lease:
        event = created("held", storage.storage_id)
        if "held" not in ledger.attempted:
            ledger.attempts("held", event)
            storage.create_run(event, lease=lease.id)
            ledger.has("held", event)


def _recover(storage: Storage, ledger: Ledger) -> None:
    with Lease.join(storage) as mine:
        dead_leases(storage)
        for orphan in orphans(storage).runs:
            journal, _ = storage.activate(orphan.run_id, mine.id, after=orphan.epoch)
            journal.close()


def _leave_orphans(storage: Storage, ledger: Ledger) -> None:
    dead = Lease.join(storage)
    for run_id in ("one", "two"):
        make_run(storage, run_id, lease=dead.id, events=2)
        ledger.knows(run_id, storage.read_run(run_id).events)
    dead.close()


def _breaker(storage: Storage, ledger: Ledger) -> None:
    states = BreakerStates(storage.root, "payments", storage.disk)
    with contextlib.suppress(OSError):  # as its caller does
        states.save([(None, {"state": "open"})], 2.0)


def _nothing(storage: Storage, ledger: Ledger) -> None:
    pass


def _ended_runs(storage: Storage, ledger: Ledger) -> None:
    for run_id in "ab":
        _run(storage, ledger, run_id, 1, end=True)


def _closed_breaker(storage: Storage, ledger: Ledger) -> None:
    BreakerStates(storage.root, "payments", storage.disk).save([(None, {"state": "closed"})], 1.0)


def _resume(storage: Storage, ledger: Ledger) -> None:
    _append(storage, ledger, "run", 1, end=False)


SCENARIOS: Final = [
    Scenario("create", _nothing, _create),
    Scenario("create many", lambda s, log: _run(s, log, "taken"), _create_many),
    Scenario("first epoch", lambda s, log: _run(s, log, "run"), lambda s, log: _append(s, log, "run", 3)),
    Scenario("take over", lambda s, log: _run(s, log, "run", 2), lambda s, log: _append(s, log, "run", 2)),
    Scenario("resume", lambda s, log: _run(s, log, "run", 1, end=True), _resume),
    Scenario("fold", lambda s, log: _run(s, log, "run", 1), _fold),
    Scenario("compact", _ended_runs, _retire),
    Scenario("blob", _nothing, _blob),
    Scenario("lease", _nothing, _lease),
    Scenario("recover", _leave_orphans, _recover),
    Scenario("breaker", _closed_breaker, _breaker),
]
IN_MEMORY: Final = [
    one for one in SCENARIOS if one.name not in ("lease", "recover")
]  # leases lock files of a real disk


# What holds afterwards ----------------------------------------------------------------------------------------------


def check_storage(storage: Storage, ledger: Ledger) -> None:
    """acknowledged ⊆ durable ⊆ attempted, one terminal event an activation, and every run goes on."""
    ids = set(storage.list_run_ids())
    assert ledger.acknowledged.keys() <= ids, f"lost runs: {ledger.acknowledged.keys() - ids}"
    assert ids <= ledger.attempted.keys(), f"runs that nobody made: {ids - ledger.attempted.keys()}"
    for run_id in ids:
        _check_run(storage, run_id, ledger)
    for digest in ledger.blobs:
        storage.get_blob(digest)
    kept = BreakerStates(storage.root, "payments", storage.disk).load()
    assert kept is None or kept[0] in ([(None, {"state": "open"})], [(None, {"state": "closed"})])


def _check_run(storage: Storage, run_id: str, ledger: Ledger) -> None:
    history = storage.read_run(run_id)
    durable = [text(event) for event in history.events]
    acknowledged, attempted = ledger.acknowledged.get(run_id, []), ledger.attempted[run_id]
    assert durable[: len(acknowledged)] == acknowledged, f"run {run_id}: acknowledged events are lost"
    assert attempted[: len(durable)] == durable, f"run {run_id}: events that nobody wrote"
    assert [event.seq for event in history.events] == list(range(len(durable)))
    if not history.finished:
        assert run_id in storage.unfinished(), f"run {run_id}: recovery does not know it"
    if storage.is_retired(run_id):
        return
    if history.lease == RETIRED and history.finished:  # taken for its checkpoint, and compaction goes on with it
        compact(storage)
        assert [text(event) for event in storage.read_run(run_id).events] == durable
        return
    journal, events = storage.activate(run_id, "")  # and it goes on
    seq = len(events)
    assert seq == len(durable)
    journal.append([RunActivated(seq=seq, at=3.0, epoch=journal.epoch), ended(seq + 1)]).result()
    journal.finish()
    after = storage.read_run(run_id)
    assert after.finished
    assert len(after.events) == seq + 2
    if run_id in storage.unfinished():  # an entry of a resume that never came to be: the next recovery finds it
        assert storage.unlist_finished(run_id)
        assert run_id not in storage.unfinished()
    assert sum(isinstance(event, TERMINAL) for event in history.events) <= 1


def clean(error: BaseException | None) -> bool:
    """Whether the error is one that a user is meant to see."""
    return error is None or isinstance(error, StorageError)
