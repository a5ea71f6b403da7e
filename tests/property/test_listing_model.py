"""Listings against a naive scan of everything: after any sequence of what can happen to runs, crashes included."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.engine.history import run_status
from pyworkflow_ray.errors import RunNotFoundError, StorageError
from pyworkflow_ray.storage import stocktaking
from pyworkflow_ray.storage.catalogue import ABSENT, Query, Row, canonical
from pyworkflow_ray.storage.compact import compact
from pyworkflow_ray.storage.listing import page, scan, stock
from pyworkflow_ray.storage.stocktaking import catalogue_path, take_in
from pyworkflow_ray.storage.storage import Storage

MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None  # thousands of syncs, and no power loss here
IDS = [f"run-{number}" for number in range(6)]
ATTRIBUTES: list[dict[str, Any]] = [{}, {"shop": 1}, {"shop": 1.0, "vip": True}, {"shop": "1", "vip": 1}, {"vip": None}]
ENDS: dict[str, Callable[[int], ev.Event]] = {
    "completed": lambda seq: ev.RunCompleted(seq=seq, at=9.0, result=ev.Payload(enc="json", data=1)),
    "failed": lambda seq: ev.RunFailed(seq=seq, at=9.0, error=ev.ErrorInfo(kind="permanent", type="ValueError")),
    "cancelled": lambda seq: ev.RunCancelled(seq=seq, at=9.0),
}


class Crash(BaseException):
    """The process dies here."""


def plain(rows: list[Row]) -> list[Row]:
    """Without the place of the row, which only the catalogue knows."""
    return [row._replace(part=None) for row in rows]


def text(value: Any) -> frozenset[str]:
    return frozenset({canonical(value)} | ({ABSENT} if value is None else set()))


QUERIES = st.builds(
    Query,
    statuses=st.none() | st.frozensets(st.sampled_from(["pending", "running", "parked", *ENDS])),
    workflow=st.none() | st.sampled_from(["m:a", "a", "n:a", "b"]),
    attributes=st.dictionaries(st.sampled_from(["shop", "vip", "no"]), st.sampled_from([1, "1", True, None])).map(
        lambda d: tuple((name, text(value)) for name, value in d.items())
    ),
    since=st.none() | st.sampled_from([1_000_000, 2_000_000]),
    before=st.none() | st.tuples(st.sampled_from([1_000_000, 2_000_000, 3_000_000]), st.sampled_from(IDS)),
)


class Listings(RuleBasedStateMachine):
    """Runs are made, go on, end, are resumed, compacted, damaged; taking in dies in the middle; files are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="listing-", dir=MEMORY))
        self.storage = Storage.open(self.root / "storage")

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @initialize(number=st.integers(0, 3))
    def begin(self, number: int) -> None:
        for run_id in IDS[:number]:
            self.create(run_id, "m:a", 0, 1)

    @rule(
        run_id=st.sampled_from(IDS),
        workflow=st.sampled_from(["m:a", "n:a", "b"]),
        attributes=st.integers(0, len(ATTRIBUTES) - 1),
        at=st.integers(1, 3),
    )
    def create(self, run_id: str, workflow: str, attributes: int, at: int) -> None:
        self.storage.create_runs(
            [
                ev.RunCreated(
                    seq=0,
                    at=float(at),
                    run_id=run_id,
                    run_uid=run_id,
                    storage_id=self.storage.storage_id,
                    workflow=workflow,
                    code=ev.CodeRef(how="import", name="flow"),
                    environment=ev.CodeEnvironment(key="k", python="3.11"),
                    attributes=ATTRIBUTES[attributes],
                )
            ]
        )

    def history(self, run_id: str) -> Any:
        try:
            return self.storage.read_run(run_id)
        except StorageError:
            return None
        except RunNotFoundError:
            return None

    @rule(run_id=st.sampled_from(IDS), then=st.sampled_from(["goes on", "parks", *ENDS]), crash=st.booleans())
    def activate(self, run_id: str, then: str, crash: bool) -> None:
        history = self.history(run_id)
        if history is None or run_status(history.events) in ("completed", "cancelled"):
            return
        journal, events = self.storage.activate(run_id, "")
        seq = len(events)
        journal.append([ev.RunActivated(seq=seq, at=5.0, epoch=journal.epoch, cause="resume")]).result()
        if then == "parks":
            journal.append([ev.RunParked(seq=seq + 1, at=6.0, due_at=9.0)]).result()
        elif then in ENDS:
            journal.append([ENDS[then](seq + 1)]).result()
        journal.finish() if then in ENDS and not crash else journal.close()

    @rule(run_id=st.sampled_from(IDS))
    def found_ended(self, run_id: str) -> None:
        if self.history(run_id) is not None:
            self.storage.unlist_finished(run_id)

    @rule()
    def compact(self) -> None:
        compact(self.storage)

    @rule()
    def take_in(self) -> None:
        assert take_in(self.storage)

    @rule(point=st.sampled_from(["catalogue.before_commit", "catalogue.before_forget", "catalogue.before_replace"]))
    def die_taking_in(self, point: str) -> None:
        def failpoint(name: str) -> None:
            if name == point:
                raise Crash

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stocktaking, "failpoint", failpoint)
            try:
                take_in(self.storage)
            except Crash:
                pass

    @rule()
    def power_loss_brings_entries_back(self) -> None:
        for run_id, epoch in self.storage.index.ended():
            self.storage.index.add(run_id, epoch)

    @rule(run_id=st.sampled_from(IDS))
    def lose_a_race_of_creation(self, run_id: str) -> None:
        if self.history(run_id) is not None:
            self.storage.index.add(run_id, 0)
            self.storage.unlist_finished(run_id)

    @rule(what=st.sampled_from(["gone", "garbage", "torn"]))
    @precondition(lambda self: os.path.exists(catalogue_path(self.storage)))
    def lose_the_catalogue(self, what: str) -> None:
        path = Path(catalogue_path(self.storage))
        if what == "gone":
            path.unlink()
        elif what == "garbage":
            path.write_bytes(b"x" * 5000)
        else:
            path.write_bytes(path.read_bytes()[:5000])

    @rule(run_id=st.sampled_from(IDS))
    def damage(self, run_id: str) -> None:
        """Of an unfinished run: one that ended is looked up, its damage found by whoever reads it."""
        path = Path(self.storage.directory(run_id), "0.journal")
        if run_id in self.storage.unfinished() and path.exists():
            data = bytearray(path.read_bytes())
            data[50] ^= 1
            path.write_bytes(data)

    @rule(query=QUERIES, size=st.integers(1, 4))
    def pages_are_those_of_a_scan(self, query: Query, size: int) -> None:
        expected, damaged = scan(self.storage, query)
        whole = page(self.storage, query)
        assert (plain(whole.rows), whole.more, set(whole.damaged)) == (expected, False, set(damaged))
        rows: list[Row] = []
        while True:
            one = page(self.storage, query if not rows else _after(query, rows[-1]), size)
            assert len(one.rows) == size or not one.more
            rows += one.rows
            if not one.more:
                break
        assert plain(rows) == expected

    @rule()
    def every_run_lies_in_one_place(self) -> None:
        found = stock(self.storage)
        compacted = set() if found.compacted is None else set(found.compacted.ids())
        assert compacted.isdisjoint(found.journals)
        assert compacted | set(found.journals) | set(found.damaged) >= set(self.storage.list_run_ids())


def _after(query: Query, row: Row) -> Query:
    return Query(query.statuses, query.workflow, query.attributes, query.since, row.key)


TestListings = Listings.TestCase
TestListings.settings = settings(
    settings.default,
    stateful_step_count=25,
    max_examples=int(os.environ.get("LISTING_EXAMPLES", "20")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
