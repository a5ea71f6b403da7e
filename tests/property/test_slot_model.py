"""The slots of an object store, model-checked: the real commit, take-over and read code over a bucket in memory, in
every interleaving of several owners and of the requests that each has in flight, with every ambiguous answer.

Each request is one step: what it does to the bucket and what its owner is told are chosen apart, so a write may land
and be reported as failed, "exists" or "conflict", not land, or land at any later moment. The number of such faults in
one history is bounded; the interleavings are not. Every owner may stop for ever at any of its steps. In each state:

1. every acknowledged event is in the history that a new reader finds;
2. what an owner was given, or any reader was shown, is never contradicted later;
3. nothing is taken for damaged.

The mutants at the end show that each part of the protocol is needed: without it one of these fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from pyworkflow_ray.errors import StorageError
from pyworkflow_ray.storage.objects import commit, slots
from pyworkflow_ray.storage.objects import journal as journals
from pyworkflow_ray.storage.objects.bucket import BucketError, ConditionFailed, Entry, Found
from pyworkflow_ray.storage.objects.commit import Owned, Place
from pyworkflow_ray.storage.objects.journal import ObjectJournal
from pyworkflow_ray.storage.objects.slots import SlotHead, encode_slot, run_prefix, slot_key
from pyworkflow_ray.storage.record import event_body
from tests.journals import STORAGE_ID, created, fired, names

Objects = dict[str, bytes]
Facts = list[tuple[str, list[str]]]
Program = Callable[["Actor"], Coroutine[Any, Any, None]]

TRIES = 3
LOST = BucketError("no answer")
CONFLICT = ConditionFailed("409")


class Request:
    """What a task waits for."""

    def __init__(self, call: str, key: str, data: bytes = b"") -> None:
        self.call, self.key, self.data = call, key, data

    def __await__(self) -> Generator[Request, Any, Any]:
        answer = yield self
        if isinstance(answer, Exception):
            raise answer
        return answer


class ModelBucket:
    """Requests of one actor. Those on which no other actor's step depends are answered with the one before: objects
    never change, so reading what a listing showed is no step of its own."""

    url = "model:"

    def __init__(self, actor: Actor) -> None:
        self._actor = actor
        self._tokens = 0

    def token(self) -> str:
        self._tokens += 1
        return f"{self._actor.name}{self._tokens}".rjust(32, "0")

    async def create(self, key: str, data: bytes) -> None:
        await Request("create", key, data)

    async def get(self, key: str) -> Found | None:
        data = await Request("get", key)
        return None if data is None else Found(data, "", time.time())

    async def listing(self, prefix: str) -> list[Entry]:
        self._listed = await Request("list", prefix)
        return [Entry(key, 0.0, "") for key in self._listed]

    async def get_many(self, keys: Sequence[str]) -> list[Found | None]:
        return [Found(self._listed[key], "") for key in keys]

    async def pause(self, seconds: float) -> None:
        pass


class Actor:
    """One process, run up to the point that its log of answers reaches. Also the runner of its journal."""

    def __init__(self, name: str, program: Program, log: tuple[tuple[int, Any], ...]) -> None:
        self.name = name
        self.facts: Facts = []
        self.bucket: Any = ModelBucket(self)
        self.place = Place(self.bucket, STORAGE_ID, "run", TRIES)
        self.waiting: dict[int, Request] = {}
        self._tasks: list[Coroutine[Any, Any, None]] = []
        self.spawn(program(self))
        for number, answer in log:
            self._go_on(number, answer)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(work)
        self._go_on(len(self._tasks) - 1, None)

    def call(self, function: Callable[..., None], *args: Any) -> None:
        function(*args)

    def _go_on(self, number: int, answer: Any) -> None:
        self.waiting.pop(number, None)
        try:
            self.waiting[number] = self._tasks[number].send(answer)
        except StopIteration:
            pass
        except StorageError as error:
            # An owner may lose and stop; what it must not do is find damage.
            if "another owner" not in str(error) and "unknown" not in str(error) and "no answer" not in str(error):
                raise Broken(f"{self.name} failed: {error!r}") from error

    def close(self) -> None:
        for task in self._tasks:
            task.close()


# What actors do ---------------------------------------------------------------------------------------------------


def append_all(actor: Actor, owned: Owned, count: int, window: int, at_once: bool = False) -> None:
    """Append so many events; the first is waited for unless `at_once`, the others go into flight together."""
    mine = ObjectJournal(actor.place, owned, actor.name, actor, lambda _: None, window=window)
    base = names(owned.view.events)
    events = [fired(len(base) + number, f"{actor.name}{number}") for number in range(count)]

    def append(number: int) -> None:
        def tell(done: Any) -> None:
            actor.facts.append(
                ("refused", []) if done.exception() else ("acknowledged", base + names(events[: number + 1]))
            )
            if number == 0 and not at_once:
                append_from(1)

        mine.append([events[number]]).add_done_callback(tell)

    def append_from(number: int) -> None:
        for later in range(number, count):
            append(later)

    if at_once:
        append_from(0)
    elif count:
        append(0)


def first_owner(count: int, window: int = 2, at_once: bool = False) -> Program:
    """The owner of epoch 0, which it was handed, appends."""

    async def run(actor: Actor) -> None:
        append_all(actor, await commit.continue_first(actor.place, "lease"), count, window, at_once)

    return run


def taker(count: int, window: int = 2, after: int | None = None) -> Program:
    """Somebody who takes the run over and appends."""

    async def run(actor: Actor) -> None:
        owned = await commit.take_over(actor.place, actor.name, after)
        actor.facts.append(("owned", names(owned.view.events)))
        append_all(actor, owned, count, window)

    return run


async def reader(actor: Actor) -> None:
    actor.facts.append(("told", names((await commit.read_view(actor.place)).events)))


# Exploration ------------------------------------------------------------------------------------------------------


class Broken(AssertionError):
    pass


@dataclass(frozen=True)
class State:
    """ghosts: writes that were reported as failed and may still land. left: faults that may still strike."""

    objects: Objects
    ghosts: tuple[tuple[str, bytes], ...]
    left: int
    logs: tuple[tuple[tuple[int, Any], ...], ...]
    log_ids: tuple[int, ...]
    facts: tuple[Facts, ...]
    shown: list[str] = field(default_factory=list)
    path: tuple[str, ...] = ()

    def key(self) -> Any:
        return frozenset(self.objects.items()), self.ghosts, self.left, self.log_ids


@dataclass
class Explored:
    states: int = 0
    ends: int = 0
    facts: set[tuple[str, tuple[str, ...]]] = field(default_factory=set)
    final_facts: list[tuple[Facts, ...]] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Outcome:
    """kind; what the bucket holds afterwards; whether the write may land later; the answer."""

    kind: str
    answer: Any
    stores: bool = False
    ghost: bool = False
    fault: bool = False


def outcomes(request: Request, objects: Objects) -> list[Outcome]:
    if request.call == "list":
        return [Outcome("listed", {key: data for key, data in objects.items() if key.startswith(request.key)})]
    if request.call == "get":
        return [Outcome("read", objects.get(request.key)), Outcome("unreadable", LOST, fault=True)]
    if request.key in objects:
        return [Outcome("exists", CONFLICT), Outcome("exists, no answer", LOST, fault=True)]
    return [
        Outcome("stored", None, stores=True),
        Outcome("stored, no answer", LOST, stores=True, fault=True),
        Outcome("stored, exists", CONFLICT, stores=True, fault=True),
        Outcome("not stored", LOST, fault=True),
        Outcome("not stored, conflict", CONFLICT, fault=True),
        Outcome("late", LOST, ghost=True, fault=True),
    ]


def start_objects() -> Objects:
    event = created()
    head = SlotHead(
        storage_id=STORAGE_ID, run_id="run", slot=0, epoch=0, lease="lease", kind="create", before=0, next=1
    )
    return {slot_key("run", 0): encode_slot(head, "0" * 32, [event_body(event, 0)])[0]}


class Model:
    """All states of some actors."""

    def __init__(self, programs: list[Program], faults: int) -> None:
        self.programs = programs
        self.result = Explored()
        self._histories: dict[Any, list[str]] = {}
        self._log_ids: dict[Any, int] = {}
        count = len(programs)
        self._start = State(start_objects(), (), faults, ((),) * count, (0,) * count, ([],) * count)

    def history(self, objects: Objects) -> list[str]:
        """What a new reader finds."""
        key = frozenset(objects.items())
        if key not in self._histories:
            numbers = {int(name.removeprefix(run_prefix("run"))): data for name, data in objects.items()}
            try:
                found = slots.walk(numbers, STORAGE_ID, "run")
                owner = slots.newest_head(last(numbers), STORAGE_ID, "run")
                assert (owner.epoch, owner.lease) == (found.epoch, found.lease)
                self._histories[key] = names(found.events(STORAGE_ID, "run"))
            except (StorageError, AssertionError) as error:
                raise Broken(f"a reader fails: {error!r}") from error
        return self._histories[key]

    def check(self, state: State) -> State:
        found = self.history(state.objects)
        for facts in state.facts:
            for kind, events in facts:
                if found[: len(events)] != events:
                    raise Broken(f"{kind} {events}, but the history is {found}; steps {state.path}")
        if found[: len(state.shown)] != state.shown:
            raise Broken(f"a reader was shown {state.shown}, but the history is {found}; steps {state.path}")
        return replace(state, shown=found)

    def actor(self, state: State, number: int) -> Actor:
        return Actor("abcd"[number], self.programs[number], state.logs[number])

    def following(self, state: State) -> list[State]:
        result = []
        for place, (key, data) in enumerate(state.ghosts):
            ghosts = state.ghosts[:place] + state.ghosts[place + 1 :]
            objects = state.objects if key in state.objects else {**state.objects, key: data}
            result.append(replace(state, objects=objects, ghosts=ghosts, path=(*state.path, "a late write lands")))
        for number in range(len(self.programs)):
            actor = self.actor(state, number)
            actor.close()
            for task, request in actor.waiting.items():
                for outcome in outcomes(request, state.objects):
                    if not outcome.fault or state.left:
                        result.append(self.step(state, number, task, request, outcome))
        return result

    def step(self, state: State, number: int, task: int, request: Request, outcome: Outcome) -> State:
        self.result.kinds.add(outcome.kind)
        new = (task, outcome.answer)
        log = (*state.logs[number], new)
        identity = (number, state.log_ids[number], task, repr(outcome.answer))
        log_id = self._log_ids.setdefault(identity, len(self._log_ids) + 1)
        objects, ghosts = state.objects, state.ghosts
        if outcome.stores:
            objects = {**objects, request.key: request.data}
        if outcome.ghost:
            ghosts = tuple(sorted((*ghosts, (request.key, request.data))))
        after = Actor("abcd"[number], self.programs[number], log)
        after.close()

        def at(items: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
            return (*items[:number], value, *items[number + 1 :])

        return State(
            objects=objects,
            ghosts=ghosts,
            left=state.left - outcome.fault,
            logs=at(state.logs, log),
            log_ids=at(state.log_ids, log_id),
            facts=at(state.facts, after.facts),
            shown=state.shown,
            path=(*state.path, f"{'abcd'[number]}{task} {request.call} {request.key[-2:]}: {outcome.kind}"),
        )

    def explore(self) -> Explored:
        stack = [self.check(self._start)]
        seen = {stack[0].key()}
        while stack:
            state = stack.pop()
            self.result.states += 1
            self.result.facts.update((kind, tuple(events)) for facts in state.facts for kind, events in facts)
            following = self.following(state)
            if not following:
                self.result.ends += 1
                self.result.final_facts.append(state.facts)
            for one in following:
                key = one.key()
                if key not in seen:
                    seen.add(key)
                    stack.append(self.check(one))
        return self.result


def last(numbers: dict[int, bytes]) -> dict[int, bytes]:
    """The slots that `read_owner` looks at."""
    return {number: data for number, data in numbers.items() if number > max(numbers) - slots.WINDOW}


def explore(programs: list[Program], faults: int = 0) -> Explored:
    return Model(programs, faults).explore()


@pytest.fixture(autouse=True)
def small_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two slots in flight are as many as the rule needs; decoding is pure, so once an object is enough."""
    for module in (slots, commit, journals):
        monkeypatch.setattr(module, "WINDOW", 2)
    decoded: dict[Any, Any] = {}
    original = slots.decode_slot

    def decode(data: bytes, storage_id: str, run_id: str, number: int) -> Any:
        key = (data, number)
        if key not in decoded:
            decoded[key] = original(data, storage_id, run_id, number)
        return decoded[key]

    monkeypatch.setattr(slots, "decode_slot", decode)


# What holds -------------------------------------------------------------------------------------------------------


def test_an_owner_and_its_taker_agree_whatever_is_in_flight() -> None:
    result = explore([first_owner(3), taker(1)])
    # It is worth something only if the first owner was overtaken before, between and after its slots.
    owned = {events for kind, events in result.facts if kind == "owned"}
    assert {len([e for e in events if e.startswith("timer_fired:a")]) for events in owned} == {0, 1, 2, 3}
    assert result.ends > 1


def test_an_owner_and_its_taker_agree_under_ambiguous_answers() -> None:
    result = explore([first_owner(2), taker(1)], faults=1)
    assert result.kinds >= {
        "stored", "stored, no answer", "stored, exists", "not stored", "not stored, conflict", "late", "exists",
        "exists, no answer", "unreadable",
    }  # fmt: skip


def test_two_takers_of_a_silent_owner_agree() -> None:
    result = explore([taker(1), taker(1)], faults=1)
    assert ("owned", ("run_created", "timer_fired:a0")) in result.facts
    assert ("owned", ("run_created", "timer_fired:b0")) in result.facts


def test_of_takers_after_the_same_epoch_one_wins() -> None:
    result = explore([taker(1, after=0), taker(1, after=0)])
    for facts in result.final_facts:
        assert sum(kind == "acknowledged" for each in facts for kind, _ in each) == 1


def test_epoch_0_that_is_handed_out_twice_has_one_owner() -> None:
    result = explore([first_owner(2, at_once=True), first_owner(2, at_once=True)])
    for facts in result.final_facts:
        assert sorted(kind for each in facts for kind, _ in each) == ["acknowledged"] * 2 + ["refused"] * 2


def test_a_reader_is_shown_only_what_stays() -> None:
    assert explore([first_owner(2), taker(1), reader]).ends > 1


def test_faults_alone_fence_nobody() -> None:
    """An owner without a rival is never told that it is another's: with fewer faults than tries all is acknowledged."""
    result = explore([first_owner(2)], faults=2)
    for facts in result.final_facts:
        if facts[0]:  # none: it could not even read the run
            assert [kind for kind, _ in facts[0]] == ["acknowledged"] * 2


@pytest.mark.slow
def test_two_faults_an_owner_and_a_taker() -> None:
    explore([first_owner(2), taker(1)], faults=2)


@pytest.mark.slow
def test_three_owners_agree_under_ambiguous_answers() -> None:
    explore([first_owner(2), taker(1), taker(1)])
    explore([first_owner(1), taker(1), taker(0)], faults=1)


# What would not hold ----------------------------------------------------------------------------------------------


def whatever_lies_there_is_ours(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit, "_is_ours", lambda *_: True)


def whatever_lies_there_is_anothers(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit, "_is_ours", lambda *_: False)


def an_error_is_an_acknowledgement(patch: pytest.MonkeyPatch) -> None:
    async def create(bucket: Any, key: str, data: bytes, tries: int = 1) -> bool:
        try:
            await bucket.create(key, data)
        except ConditionFailed:
            return False
        except BucketError:
            pass
        return True

    patch.setattr(commit, "create_once", create)
    patch.setattr(journals, "create_once", create)


def a_conflict_is_the_end(patch: pytest.MonkeyPatch) -> None:
    """The store's word is taken: "exists" means that another was faster."""

    async def create(bucket: Any, key: str, data: bytes, tries: int = 1) -> bool:
        for _ in range(tries):
            try:
                await bucket.create(key, data)
                return True
            except ConditionFailed:
                return False
            except BucketError:
                pass
        raise StorageError("unknown")

    patch.setattr(commit, "create_once", create)
    patch.setattr(journals, "create_once", create)


def a_slot_is_acknowledged_by_itself(patch: pytest.MonkeyPatch) -> None:
    def landed(self: ObjectJournal, slot: int, error: Exception | None) -> None:
        found = self._flight.pop(slot, None)
        for one in found.commits if found is not None else ():
            if error is None:
                one.future.set_result(one.last_seq)
            else:
                one.future.set_exception(error)
        self._low = min(self._flight, default=self._next)
        self._alone = False
        self._pump()

    patch.setattr(ObjectJournal, "_landed", landed)


def a_claim_passes_over_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(commit, "WINDOW", 1)


def the_window_is_open(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(journals, "WINDOW", 100)
    patch.setitem(globals(), "first_owner", lambda count, real=first_owner, **_: real(count, window=100))


def the_first_slot_is_not_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ObjectJournal, "_alone", property(lambda self: False, lambda self, value: None), raising=False)


def a_free_slot_is_given_up(patch: pytest.MonkeyPatch) -> None:
    """A slot whose write failed is left empty, and the next one taken."""

    async def write(self: ObjectJournal, slot: int, data: bytes) -> None:
        try:
            mine = await commit.create_once(self._place.bucket, self._place.key(slot), data, 1)
        except StorageError:
            mine = True
        self._landed(slot, None if mine else self._fenced(slot))

    patch.setattr(ObjectJournal, "_write", write)


def an_owner_alone() -> None:
    test_faults_alone_fence_nobody()


def a_taker_and_a_late_owner() -> None:
    explore([first_owner(2), taker(1)], faults=1)


def a_full_window() -> None:
    explore([first_owner(4), taker(1)])


def two_first_owners() -> None:
    test_epoch_0_that_is_handed_out_twice_has_one_owner()


MUTANTS = [
    (whatever_lies_there_is_ours, a_taker_and_a_late_owner),
    (whatever_lies_there_is_anothers, an_owner_alone),
    (an_error_is_an_acknowledgement, an_owner_alone),
    (a_conflict_is_the_end, an_owner_alone),
    (a_slot_is_acknowledged_by_itself, a_taker_and_a_late_owner),
    (a_claim_passes_over_nothing, a_full_window),
    (the_window_is_open, a_full_window),
    (the_first_slot_is_not_alone, two_first_owners),
    (a_free_slot_is_given_up, an_owner_alone),
]


@pytest.mark.parametrize(("mutate", "small"), MUTANTS)
def test_the_model_finds_a_protocol_with_a_part_missing(
    mutate: Callable[[pytest.MonkeyPatch], None], small: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        small()
