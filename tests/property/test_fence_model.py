"""The fence and the seal, model-checked: the real take-over, append, fold and read code over a disk in memory, in every
interleaving of several owners and a reader.

Each step that another process could see is one step of the model (a write is two, so half-written records are seen).
States that were reached before are not entered again, so all interleavings are covered, and every actor may stop for
ever at any of its steps. In each state holds:

1. every acknowledged event is in the history that a new reader finds, and in the one it would find after a power loss;
2. what an owner was given, and what a reader was told is settled, is never contradicted later: all see one history;
3. no file is taken for damaged.

The mutants at the end show that each part of the protocol is needed: without it one of these fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from pyworkflow_ray.errors import StorageError
from pyworkflow_ray.storage import epochs, journal
from pyworkflow_ray.storage.journal import Journal, Place, first_file, fold, read_view, take_over
from pyworkflow_ray.storage.record import chain_start, decode_records
from tests.journals import STORAGE_ID, Files, MemoryDisk, Suspended, created, fired, names

Facts = list[tuple[str, list[str]]]
Actor = Callable[[MemoryDisk, Facts], None]


def place(disk: MemoryDisk) -> Place:
    return Place(disk, "/run", "/tmp", STORAGE_ID, "run")


def nothing(_: int) -> None:
    pass


def append(open_journal: Journal, who: str, count: int, facts: Facts, history: list[str]) -> None:
    for _ in range(count):
        event = fired(open_journal.last_seq + 1, who)
        history = [*history, *names([event])]
        open_journal.append([event]).result()
        facts.append(("acknowledged", history))


def first_owner(count: int) -> Actor:
    """The owner of epoch 0, which it was handed, appends."""

    def run(disk: MemoryDisk, facts: Facts) -> None:
        start = chain_start(STORAGE_ID, "run", 0)
        chain = decode_records(first_file(STORAGE_ID, created(), "a"), start).chain
        append(
            Journal(place(disk), 0, "a", disk.open_append("/run/0.journal"), chain, 0, nothing),
            "a",
            count,
            facts,
            ["run_created"],
        )

    return run


def taker(who: str, count: int, fold_limit: int = 64) -> Actor:
    """Somebody who takes the run over, folds, and appends."""

    def run(disk: MemoryDisk, facts: Facts) -> None:
        mine, view = take_over(place(disk), who, nothing)
        facts.append(("owned", names(view.events)))
        fold(place(disk), view, mine.epoch, fold_limit)
        append(mine, who, count, facts, names(view.events))

    return run


def reader(disk: MemoryDisk, facts: Facts) -> None:
    view = read_view(place(disk))
    if view.accepted.settled:
        facts.append(("told", names(view.events)))


# Exploration ------------------------------------------------------------------------------------------------------


class Broken(AssertionError):
    pass


@dataclass
class State:
    files: Files
    logs: tuple[tuple[Any, ...], ...]
    done: tuple[bool, ...]
    facts: tuple[Facts, ...]
    promised: list[str]
    log_ids: tuple[int, ...]
    path: tuple[int, ...] = ()

    def key(self) -> Any:
        return self.files.key, self.log_ids, tuple(self.promised)


@dataclass
class Explored:
    states: int = 0
    ends: int = 0
    owners: set[tuple[str, ...]] = field(default_factory=set)


def start_files(epochs_made: int = 1) -> Files:
    """A run of so many epochs, all of them over and the last not sealed, safe on the disk."""
    data = first_file(STORAGE_ID, created(), "a")
    disk = MemoryDisk(Files(), "made")
    disk.write_file("/tmp/first", data)
    disk.link("/tmp/first", "/run/0.journal")
    disk.sync_dir("/run")
    for number in range(1, epochs_made):
        taker(f"old{number}", 1)(disk, [])
    files = disk.files
    return Files(
        {n: f"start {n}" for n in files.names if n.startswith("/run")},
        {f"start {n}": files.contents[f] for n, f in files.names.items()},
        {n: f"start {n}" for n in files.names if n.startswith("/run")},
        {f"start {n}": files.contents[f] for n, f in files.names.items()},
    )


_SYNCS = {"fdatasync", "sync_dir", "sync_old_epoch"}


def advance(state: State, number: int, actor: Actor, known_logs: dict[Any, int], fine: bool) -> State:
    """The state after one more step of one actor.

    Unless `fine`, calls that no other actor's step depends on are one step with the next: reading a file whose owner
    has stopped, and syncs, which only the check after a power loss sees (late is the worst for it).
    """

    def joined(call: str, file: str) -> bool:
        if fine:
            return False
        return call in _SYNCS or (call == "read" and not any(_writes(other, file) for other in living))

    living = [other for other, done in enumerate(state.done) if not done and other != number]
    disk = MemoryDisk(state.files, f"actor{number}-", state.logs[number], steps=1, tear=fine, joined=joined)
    facts: Facts = []
    done = True
    try:
        actor(disk, facts)
    except Suspended:
        done = False
    except StorageError as error:
        # An owner may lose and stop; what it must not do is find damage.
        if "another owner" not in str(error):
            raise Broken(f"actor {number} failed: {error!r}") from error

    def at(items: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
        return (*items[:number], value, *items[number + 1 :])

    # A log is known by a number: what it was before, and the answers that are new.
    new = (number, state.log_ids[number], repr(disk.log[len(state.logs[number]) :]), done)
    log_id = known_logs.setdefault(new, len(known_logs) + 1)
    return State(
        files=disk.files,
        logs=at(state.logs, tuple(disk.log)),
        done=at(state.done, done),
        facts=at(state.facts, facts),
        promised=state.promised,
        log_ids=at(state.log_ids, log_id),
        path=(*state.path, number),
    )


def history(files: Files, known: dict[Any, Any]) -> tuple[list[str], bool]:
    """What a new reader finds now, all at once, and whether it is settled."""
    key = frozenset(files.names.items()), frozenset(files.contents.items())
    if key not in known:
        try:
            view = read_view(place(MemoryDisk(files)))
        except StorageError as error:
            raise Broken(f"a reader fails: {error}") from error
        known[key] = names(view.events), view.accepted.settled
    return known[key]


def check(state: State, known: dict[Any, Any]) -> None:
    found, settled = history(state.files, known)
    safe, _ = history(state.files.after_power_loss(), known)
    for facts in state.facts:
        for kind, events in facts:
            if found[: len(events)] != events:
                raise Broken(f"{kind} {events}, but the history is {found}")
            if kind != "told" and safe[: len(events)] != events:
                raise Broken(f"{kind} {events}, but after a power loss the history is {safe}")
    if found[: len(state.promised)] != state.promised:
        raise Broken(f"a reader was told {state.promised}, but the history is {found}")
    if settled:
        state.promised = found


def _writes(actor: int, file: str) -> bool:
    """Whether the file is this actor's, or was there at the start (then anybody may write or remove it)."""
    return file.startswith(("start ", f"file of /tmp/actor{actor}-"))


def explore(actors: list[Actor], files: Files, *, fine: bool = False) -> Explored:
    """Every state that any interleaving of the actors reaches; the first that breaks a rule raises `Broken`."""
    count = len(actors)
    stack = [State(files, ((),) * count, (False,) * count, ([],) * count, [], (0,) * count)]
    known: dict[Any, Any] = {}
    known_logs: dict[Any, int] = {}
    check(stack[0], known)
    seen = {stack[0].key()}
    result = Explored()
    while stack:
        state = stack.pop()
        result.states += 1
        if all(state.done):
            result.ends += 1
        for kind, events in (fact for facts in state.facts for fact in facts):
            if kind == "owned":
                result.owners.add(tuple(events))
        for number, actor in enumerate(actors):
            if state.done[number]:
                continue
            following = advance(state, number, actor, known_logs, fine)
            try:
                check(following, known)
            except Broken as error:
                raise Broken(f"{error}; steps of actors {following.path}") from error
            key = following.key()
            if key not in seen:
                seen.add(key)
                stack.append(following)
    return result


# What holds -------------------------------------------------------------------------------------------------------


def test_an_owner_and_its_taker_agree_at_the_finest_steps() -> None:
    result = explore([first_owner(2), taker("b", 1)], start_files(), fine=True)
    # It is worth something only if the first owner was overtaken before, between and after its appends.
    assert {owned.count("timer_fired:a") for owned in result.owners} == {0, 1, 2}
    assert result.ends > 1


def test_two_takers_of_a_dead_owner_agree() -> None:
    result = explore([taker("b", 1), taker("c", 1)], start_files())
    assert ("run_created", "timer_fired:b") in result.owners
    assert ("run_created", "timer_fired:c") in result.owners


def test_a_reader_is_never_told_what_vanishes() -> None:
    assert explore([first_owner(1), taker("b", 1), reader], start_files()).ends > 1


def test_owners_that_fold_agree_and_lose_nothing() -> None:
    assert explore([taker("b", 0, fold_limit=1), taker("c", 0, fold_limit=1)], start_files(2)).ends > 1


@pytest.mark.slow
def test_three_living_owners_agree_and_lose_nothing() -> None:
    result = explore([first_owner(1), taker("b", 0), taker("c", 0)], start_files())
    assert {owned.count("timer_fired:a") for owned in result.owners} == {0, 1}


# What would not hold ----------------------------------------------------------------------------------------------


def no_seal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(epochs, "_apply_seal", lambda *_: None)


def no_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(epochs.Layout, "overtakes", lambda *_: False)


def fence_before_sync(patch: pytest.MonkeyPatch) -> None:
    """The listing is made before the write: what was free then may be taken at the acknowledgement."""

    def commit(self: Journal, data: bytes) -> None:
        layout = self._place.layout()
        if layout.overtakes(self.epoch):
            self._drop("fenced")
            raise self._refusal()
        self._place.disk.write(self._fd, data)
        self._place.disk.fdatasync(self._fd)

    patch.setattr(Journal, "_commit", commit)


def no_data_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryDisk, "fdatasync", lambda *_: None)


def no_directory_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryDisk, "sync_dir", lambda *_: None)


def no_sync_of_the_old_epoch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryDisk, "sync_old_epoch", lambda *_: None)


def old_epoch_synced_before_it_is_read(patch: pytest.MonkeyPatch) -> None:
    def settle(where: Place, before: journal.View, mine: int) -> journal.View:
        for part in before.accepted.open_parts:
            where.disk.sync_old_epoch(where.path(part.epoch))
        view = read_view(where, before)
        if view.layout.newest != mine:
            raise journal._lost(where, mine)
        return view

    patch.setattr(journal, "_settle_earlier", settle)


def old_epoch_read_before_the_claim(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(journal, "_settle_earlier", lambda where, before, mine: before)


def readers_list_once(patch: pytest.MonkeyPatch) -> None:
    def once(where: Place, known: journal.View | None = None) -> journal.View:
        layout = where.layout()
        files = journal._read_files(where, layout)
        accepted = epochs.assemble(files, STORAGE_ID, "run")
        return journal.View(layout, files, accepted, epochs.parse_events(accepted, STORAGE_ID, "run"))

    patch.setitem(globals(), "read_view", once)


@pytest.mark.parametrize(
    "mutate",
    [
        no_seal,
        no_fence,
        fence_before_sync,
        no_data_sync,
        no_directory_sync,
        no_sync_of_the_old_epoch,
        old_epoch_synced_before_it_is_read,
        old_epoch_read_before_the_claim,
        readers_list_once,
    ],
)
def test_the_model_finds_a_protocol_with_a_part_missing(
    mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = start_files()
    mutate(monkeypatch)
    with pytest.raises(Broken):
        explore_small(files)


def explore_small(files: Files) -> None:
    explore([first_owner(2), taker("b", 1)], files, fine=True)
    explore([first_owner(1), taker("b", 1), reader], files)
    explore([taker("b", 1), taker("c", 1)], files)
