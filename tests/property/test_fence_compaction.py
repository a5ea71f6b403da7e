"""A compaction in the fence's model: the real code that moves closed epochs of a living run, and that takes an ended
run for good, in every interleaving with owners, takers and readers. Rules and exploration are `test_fence_model`'s.

Of a run that was taken for good holds as well: its history is that, for ever, whoever acknowledges what.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pyworkflow_ray.engine.events import ErrorInfo, RunActivated, RunFailed
from pyworkflow_ray.errors import FencedError
from pyworkflow_ray.storage import compact_live, journal
from pyworkflow_ray.storage.journal import make_final, take_over
from tests.journals import Files, MemoryDisk, names
from tests.property.test_fence_model import (
    Actor,
    Broken,
    Facts,
    State,
    explore,
    nothing,
    place,
    reader,
    start_files,
    taker,
)


class ModelCheckpoints:
    """Where the model's checkpoint files lie: their names are durable at once, as `DiskFiles.publish` has them."""

    def __init__(self, disk: MemoryDisk) -> None:
        self._disk = disk

    def publish(self, name: str, data: bytes) -> None:
        path = f"//checkpoints/{name}"
        self._disk.write_file(path, data)
        directory = path.rpartition("/")[0]
        files = self._disk.files
        safe = {n: f for n, f in files.names.items() if n.startswith(f"{directory}/")}
        self._disk.files = Files(files.names, files.contents, {**files.safe_names, **safe}, files.safe_contents)


def compactor(disk: MemoryDisk, facts: Facts) -> None:
    """Moves the closed epochs of a run that goes on."""
    closed = compact_live.closed_epochs(place(disk), 1)
    if closed is None:
        return
    facts.append(("owned", names(closed.view.events)[: len(closed.rows)]))
    prefix = compact_live.write_closed(ModelCheckpoints(disk), disk.token(), closed)  # type: ignore[arg-type]
    try:
        compact_live.mark(closed, prefix)
    except (FileNotFoundError, FileExistsError):
        return  # the run is gone, as `compact` has it; another's marker, whom `compact`'s lock would have kept out
    facts.append(("moved", []))


def finalizer(disk: MemoryDisk, facts: Facts) -> None:
    """Takes a run that has ended for its checkpoint."""
    try:
        view = make_final(place(disk))
    except (FencedError, FileNotFoundError):
        return  # as `compact` has it
    if view is not None:
        facts.append(("final", names(view.events)))


def resumer(disk: MemoryDisk, facts: Facts) -> None:
    """Takes a failed run up again."""
    try:
        mine, view = take_over(place(disk), "b", nothing)
    except FencedError:
        return
    event = RunActivated(seq=mine.last_seq + 1, at=0.0, epoch=mine.epoch, cause="resume")
    mine.append([event]).result()
    facts.append(("acknowledged", [*names(view.events), *names([event])]))


def failed_run() -> Files:
    """A run of two epochs that has failed; everything is safe on the disk."""

    def end(disk: MemoryDisk, _: Facts) -> None:
        mine, _view = take_over(place(disk), "old", nothing)
        error = ErrorInfo(kind="permanent", type="E", message="m")
        mine.append([RunFailed(seq=mine.last_seq + 1, at=0.0, error=error)]).result()

    files = start_files()
    disk = MemoryDisk(files, "ended")
    end(disk, [])
    return Files(disk.files.names, disk.files.contents, disk.files.names, disk.files.contents)


@pytest.fixture(autouse=True)
def final_is_final(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.property import test_fence_model as model

    check = model.check

    def checked(state: State, known: dict[object, object]) -> None:
        check(state, known)
        found, _ = model.history(state.files, known)
        for kind, events in (fact for facts in state.facts for fact in facts):
            if kind == "final" and found != events:
                raise Broken(f"{events} was final, and the history is {found}")

    monkeypatch.setattr(model, "check", checked)


def seen(actors: list[Actor], files: Files, *, fine: bool = False) -> set[str]:
    """Kinds of facts that came about in any interleaving."""
    kinds: set[str] = set()

    def watched(actor: Actor) -> Actor:
        def run(disk: MemoryDisk, facts: Facts) -> None:
            try:
                actor(disk, facts)
            finally:
                kinds.update(kind for kind, _ in facts)

        return run

    explore([watched(actor) for actor in actors], files, fine=fine)
    return kinds


def test_closed_epochs_move_beside_another_compactor_and_a_reader() -> None:
    assert "moved" in seen([compactor, compactor], start_files(2))
    assert "moved" in seen([compactor, reader], start_files(2))


@pytest.mark.slow
def test_closed_epochs_move_beside_a_taker() -> None:
    assert "moved" in seen([compactor, taker("b", 1)], start_files(2))


def test_a_failed_run_is_resumed_or_final() -> None:
    assert {"final", "acknowledged"} <= seen([finalizer, resumer], failed_run())


@pytest.mark.slow
def test_a_failed_run_is_resumed_or_final_at_the_finest_steps() -> None:
    assert {"final", "acknowledged"} <= seen([finalizer, resumer], failed_run(), fine=True)


@pytest.mark.slow
def test_closed_epochs_move_beside_one_who_folds_them() -> None:
    assert "moved" in seen([compactor, taker("b", 0, fold_limit=1)], start_files(2))


# What would not hold ------------------------------------------------------------------------------------------------


claim = journal._claim


def final_without_a_claim(patch: pytest.MonkeyPatch) -> None:
    def unless_retired(where: journal.Place, mine: int, lease: str) -> int:
        return 0 if lease == journal.RETIRED else claim(where, mine, lease)

    patch.setattr(journal, "_claim", unless_retired)


def taken_up_though_retired(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(journal.View, "retired", property(lambda self: False))


def moved_without_a_settled_seal(patch: pytest.MonkeyPatch) -> None:
    """The newest epoch counts as closed, too."""

    def closed_epochs(where: journal.Place, at_least: int) -> compact_live.Closed:
        view = journal.read_view(where)
        return compact_live.Closed(where, view, view.layout.newest)

    patch.setattr(compact_live, "closed_epochs", closed_epochs)


def marked_before_it_is_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ModelCheckpoints, "publish", lambda *_: None)


def swept_beyond_the_marker(patch: pytest.MonkeyPatch) -> None:
    def sweep(where: journal.Place, layout: object) -> None:
        for name in where.disk.listdir(where.directory):
            if name.endswith(".journal"):
                where.disk.unlink(f"{where.directory}/{name}")

    patch.setattr(compact_live, "sweep", sweep)


def final_without_a_seal(patch: pytest.MonkeyPatch) -> None:
    """A claim alone, as is enough for a run that has completed: one who resumes may write before he looks."""

    def begin(where: journal.Place, lease: str, on_finish: object, before: journal.View) -> object:
        if lease != journal.RETIRED:
            return begin_whole(where, lease, nothing, before)
        mine = before.layout.newest + 1
        claim(where, mine, lease)
        view = journal._settle_earlier(where, before, mine)
        return journal.Journal(where, mine, lease, 0, 0, 0, nothing), view

    patch.setattr(journal, "_begin", begin)


begin_whole = journal._begin
LIVE = [compactor, taker("b", 1)]
FAILED = [finalizer, resumer]


@pytest.mark.parametrize(
    ("mutate", "actors"),
    [
        (final_without_a_claim, FAILED),
        (final_without_a_seal, FAILED),
        (taken_up_though_retired, FAILED),
        (moved_without_a_settled_seal, LIVE),
        (marked_before_it_is_written, LIVE),
        (swept_beyond_the_marker, LIVE),
    ],
)
def test_the_model_finds_a_compaction_with_a_part_missing(
    mutate: Callable[[pytest.MonkeyPatch], None], actors: list[Actor], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = start_files(2) if actors is LIVE else failed_run()
    mutate(monkeypatch)
    with pytest.raises((Broken, KeyError, OSError)):
        seen(actors, files)
