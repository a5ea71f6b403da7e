"""A storage whose runs begin, go on, end, are resumed, compacted and forgotten in any order, beside a model of it."""

from __future__ import annotations

import os
import tempfile
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pyworkflow_ray.engine.events import ErrorInfo, Event, RunActivated, RunFailed
from pyworkflow_ray.errors import FencedError, RunNotFoundError
from pyworkflow_ray.storage.compact import Rules, compact
from pyworkflow_ray.storage.storage import Storage
from pyworkflow_ray.storage.verify import verify
from tests.journals import created, ended, fired

IDS = st.sampled_from(["a", "b", "c", "d"])
DAY_S = 86_400.0


class StorageOfManyAges(RuleBasedStateMachine):
    """`runs` is what must be there: the events of each run, the model's own count of them. `now` only grows."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.storage = Storage.open(f"{self.directory.name}/s")
        self.runs: dict[str, list[Event]] = {}
        self.final: set[str] = set()  # compacted: they can't go on
        self.now = 1_790_000_000.0
        self.made = 0

    def teardown(self) -> None:
        self.directory.cleanup()

    @rule(run_id=IDS, day=st.integers(0, 2))
    def create(self, run_id: str, day: int) -> None:
        self.made += 1
        event = created(run_id, self.storage.storage_id, run_uid=str(self.made), at=self.now - day * DAY_S)
        assert self.storage.create_runs([event]) == [run_id not in self.runs]
        self.runs.setdefault(run_id, [event])

    @rule(run_id=IDS, end=st.sampled_from(["goes on", "completes", "fails"]), events=st.integers(1, 3))
    def activate(self, run_id: str, end: str, events: int) -> None:
        known = self.runs.get(run_id)
        if known is not None and known[-1].type == "run_completed":
            return
        try:
            journal, history = self.storage.activate(run_id, "")
        except (RunNotFoundError, FencedError):
            assert known is None or run_id in self.final
            return
        assert known is not None
        assert history == known
        new: list[Event] = [RunActivated(seq=len(known), at=self.now, epoch=journal.epoch, cause="resume")]
        new += [fired(len(known) + 1 + n) for n in range(events)]
        seq = len(known) + len(new)
        if end == "completes":
            new.append(ended(seq).model_copy(update={"at": self.now}))
        elif end == "fails":
            new.append(RunFailed(seq=seq, at=self.now, error=ErrorInfo(kind="permanent", type="E")))
        journal.append(new).result()
        journal.close() if end == "goes on" else journal.finish()
        known += new

    @rule(failed=st.booleans(), live=st.booleans(), keep=st.sampled_from([None, DAY_S / 2]), wait=st.booleans())
    def compact(self, failed: bool, live: bool, keep: float | None, wait: bool) -> None:
        self.now += 3 * DAY_S if wait else 1.0
        retain: dict[str, float] = {} if keep is None else {"completed": keep}
        rules = Rules(failed_after_s=1.0 if failed else None, retain_s=retain, live_bytes=1 if live else 10**9)
        assert compact(self.storage, rules, now=self.now).damaged == []
        for run_id, events in list(self.runs.items()):
            if events[-1].type == "run_completed" or (failed and events[-1].type == "run_failed"):
                self.final.add(run_id)
            if keep is not None and events[-1].type == "run_completed" and self.now - events[-1].at >= keep:
                del self.runs[run_id]
                self.final.discard(run_id)

    @invariant()
    def every_event_is_there_once(self) -> None:
        for storage in (self.storage, Storage.open(self.storage.root)):
            assert storage.list_run_ids() == sorted(self.runs)
            for run_id, events in self.runs.items():
                assert storage.read_run(run_id).events == events
        going_on = [run_id for run_id, events in self.runs.items() if events[-1].type not in ENDS]
        assert self.storage.unfinished() == sorted(going_on)
        assert set(self.storage.run_directories()) == self.runs.keys() - self.final
        assert verify(self.storage).damaged == []


ENDS = ("run_completed", "run_failed")

test_any_order: Any = StorageOfManyAges.TestCase
test_any_order.settings = settings(
    settings.default,
    max_examples=100 if os.environ.get("HYPOTHESIS_PROFILE") == "search" else 5,
    stateful_step_count=15,
    deadline=None,
)
