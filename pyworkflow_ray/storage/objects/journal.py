"""A run's slots, open for appending by their owner: group commit, several in flight, acknowledged in order.

Made by `storage`; called by the run actor from one thread, and does its writing on the bucket's loop. Rules:

* Events that wait are written as one slot as soon as fewer than `window` slots are in flight: a slow store makes larger
  groups, not longer queues.
* An append is acknowledged when its slot and all lower ones are ours. A slot that is another's ends this owner
  ("fenced"), one whose fate can't be learned in time abandons the epoch; then nothing above it is ever acknowledged.
* Of epoch 0 only the first slot is in flight until it is ours; see `slots`.
* An owner whose last acknowledged slot is older than can be trusted (`trust`) looks whether slot 0 is there, before he
  writes and after: the run may have been ended by another owner, compacted and removed meanwhile.

Faults: as `bucket`. What was in flight when this owner died may land much later, or not at all: it is history if it
came before the next owner's claim, and else never looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

from pyworkflow_ray.engine.events import Event
from pyworkflow_ray.errors import FencedError, PyWorkflowError, StorageError
from pyworkflow_ray.failpoints import failpoint
from pyworkflow_ray.storage.objects import trust
from pyworkflow_ray.storage.objects.commit import Owned, Place, compacted_away, create_once, is_there
from pyworkflow_ray.storage.objects.slots import WINDOW, SlotHead, encode_slot
from pyworkflow_ray.storage.record import event_body

_SLOT_BYTES: Final = 8 * 1024 * 1024  # of events in one slot, unless one event alone is larger


class Runner(Protocol):
    """What is used of `loop.Loop`."""

    def call(self, function: Callable[..., None], *args: Any) -> None: ...

    def spawn(self, work: Coroutine[Any, Any, None]) -> None: ...


@dataclass(slots=True)
class _Commit:
    """Events appended by one call."""

    bodies: list[bytes]
    last_seq: int
    future: Future[int]

    @property
    def bytes(self) -> int:
        return sum(map(len, self.bodies))


@dataclass(slots=True)
class _InFlight:
    commits: list[_Commit] = field(default_factory=list)
    began: trust.Moment = (0.0, 0.0)
    done: bool = False
    error: Exception | None = None


class ObjectJournal:
    """One epoch of one run. `append` is used from one thread; see the module.

    Attributes:
        epoch, lease, run_id: whose journal this is.
        last_seq: seq of the last acknowledged event.
        state: "open"; "fenced" (another owner took over); "abandoned" (a slot's fate is unknown: begin the next epoch
            with `activate`); "closed".
    """

    def __init__(
        self,
        place: Place,
        owned: Owned,
        lease: str,
        runner: Runner,
        on_finish: Callable[[int], None],
        *,
        window: int = WINDOW,
    ) -> None:
        if not 1 <= window <= WINDOW:
            raise ValueError(
                f"window={window}: 1 to {WINDOW}, or a taker's claim could not pass over what is in flight"
            )
        self.epoch: Final = owned.epoch
        self.lease: Final = lease
        self.run_id: Final = place.run_id
        self.last_seq = owned.view.walk.last_seq
        self.state: Literal["open", "fenced", "abandoned", "closed"] = "open"
        self._place = place
        self._nonce = owned.nonce
        self._runner = runner
        self._on_finish = on_finish
        self._window = window
        self._appended = self.last_seq  # seq of the last event taken in
        # From here on touched on the runner only.
        self._alone = owned.first  # nothing else in flight until the first slot is ours
        self._waiting: deque[_Commit] = deque()
        self._flight: dict[int, _InFlight] = {}
        self._low = self._next = owned.next_slot
        self._chain = owned.chain
        self._seen = owned.seen
        self._origin: Final = owned.view.walk.origin

    def append(self, events: Sequence[Event]) -> Future[int]:
        """Write `events`; the future will hold the seq that is durable with them, or why there is none.

        Futures end in the order of the calls. A commit is not atomic with others; of one call's events all are durable
        or none.

        The future's exception is PayloadError or ValueError (an event can't be written, or is out of order: nothing
        was written and the journal stays open), FencedError, or StorageError (abandoned, nothing was acknowledged).
        """
        future: Future[int] = Future()
        try:
            commit = self._commit(events, future)
        except (PyWorkflowError, ValueError) as error:
            future.set_exception(error)
            return future
        self._appended = commit.last_seq
        self._runner.call(self._enqueue, commit)
        return future

    def _commit(self, events: Sequence[Event], future: Future[int]) -> _Commit:
        if self.state != "open":
            raise self._refusal()
        bodies, seq = [], self._appended
        for event in events:
            seq += 1
            if event.seq != seq:
                raise ValueError(f"run {self.run_id!r}: event {event.type!r} has seq {event.seq}, the next is {seq}")
            bodies.append(event_body(event, self.epoch))
        return _Commit(bodies, seq, future)

    # On the runner ----------------------------------------------------------------------------------------------

    def _enqueue(self, commit: _Commit) -> None:
        if self.state in ("fenced", "abandoned"):
            commit.future.set_exception(self._refusal())
            return
        self._waiting.append(commit)
        self._pump()

    def _pump(self) -> None:
        """Put into flight what waits, as far as the window lets it."""
        while self._waiting and self._next - self._low < (1 if self._alone else self._window):
            commits = [self._waiting.popleft()]
            size = commits[0].bytes
            while self._waiting and size + self._waiting[0].bytes <= _SLOT_BYTES:
                size += self._waiting[0].bytes
                commits.append(self._waiting.popleft())
            slot = self._next
            head = SlotHead(
                storage_id=self._place.storage_id,
                run_id=self.run_id,
                slot=slot,
                epoch=self.epoch,
                lease=self.lease,
                kind="data",
                before=self._chain,
                next=slot + 1,
            )
            data, self._chain = encode_slot(head, self._nonce, [body for one in commits for body in one.bodies])
            self._next += 1
            self._flight[slot] = _InFlight(commits, trust.now())
            self._runner.spawn(self._write(slot, data))

    async def _write(self, slot: int, data: bytes) -> None:
        error: Exception | None = None
        place, seen, began = self._place, self._seen, trust.now()
        try:
            if not trust.is_trusted(seen) and not await is_there(place, self._origin):
                error = compacted_away(place)
            elif not await create_once(place.bucket, place.key(slot), data, place.tries):
                error = self._fenced(slot)
            elif not trust.is_trusted(seen) and not await is_there(place, self._origin):
                if trust.is_trusted(began):  # nobody has begun another run of this id meanwhile
                    await place.bucket.delete(place.key(slot))
                error = compacted_away(place)
        except Exception as failed:
            error = failed if isinstance(failed, StorageError) else StorageError(f"{self._place.where(slot)}: {failed}")
        self._landed(slot, error)

    def _landed(self, slot: int, error: Exception | None) -> None:
        """What became of a slot. Acknowledges as far as all lower ones are ours."""
        found = self._flight.get(slot)
        if found is None:
            return  # this owner is over
        found.done, found.error = True, error
        while self._low in self._flight and self._flight[self._low].done:
            lowest = self._flight[self._low]
            if lowest.error is not None:
                self._give_up(lowest.error)
                return
            del self._flight[self._low]
            self._low += 1
            self._alone = False
            self._seen = lowest.began
            failpoint("slot.before_ack")
            for commit in lowest.commits:
                self.last_seq = commit.last_seq
                commit.future.set_result(commit.last_seq)
        self._pump()

    def _give_up(self, error: Exception) -> None:
        """Nothing from the lowest slot on will be acknowledged."""
        self.state = "fenced" if isinstance(error, FencedError) else "abandoned"
        over = [one for slot in sorted(self._flight) for one in self._flight[slot].commits] + list(self._waiting)
        self._flight.clear()
        self._waiting.clear()
        for commit in over:
            commit.future.set_exception(error)

    def _fenced(self, slot: int) -> FencedError:
        return FencedError(
            f"run {self.run_id!r}: epoch {self.epoch} is over, another owner has begun a newer one; "
            "what was appended is not acknowledged and this owner must stop",
            path=self._place.where(slot),
        )

    def _refusal(self) -> StorageError:
        if self.state == "fenced":
            return self._fenced(self._low)
        return StorageError(
            f"run {self.run_id!r}: the journal of epoch {self.epoch} is {self.state}", path=self._place.where(self._low)
        )

    # Its end ----------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Stop appending; the run stays as it is. What is in flight goes on to its end."""
        if self.state == "open":
            self.state = "closed"

    def finish(self) -> None:
        """Close the journal of a run that has ended and take the run out of the unfinished ones. Idempotent.

        Call it once the terminal event is acknowledged. The index entry goes in the background: a crash before it
        leaves a finished run among the unfinished; whoever finds it there (`orphans`) does this.
        """
        self.close()
        self._on_finish(self.epoch)

    def __enter__(self) -> ObjectJournal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
