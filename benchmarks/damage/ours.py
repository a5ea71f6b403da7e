"""This project's stores, for the harness: `python -m benchmarks.damage.ours ROOT` makes one, a line an acknowledgement.

Called by `harness` through `Ours`; calls storage and the command line. The maker waits for a line after each
acknowledgement, so that the harness can copy what lies on the disk then, and is killed with SIGKILL at the end.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.damage.damages import Damage, State
from benchmarks.damage.harness import Answer, Call, read_state, scratch_copy
from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.errors import CorruptJournalError, RunNotFoundError, StorageError
from pyworkflow_ray.storage.breaker_states import BreakerStates
from pyworkflow_ray.storage.lease import Lease, dead_leases, orphans
from pyworkflow_ray.storage.storage import RunHistory, Storage

REPOSITORY: Final = Path(__file__).resolve().parents[2]
AT: Final = 1_790_000_000.0
COMPACTED: Final = ("old", "older")
BLOB: Final = b"a value too large for the journal " * 4

# The maker's process -----------------------------------------------------------------------------------------------


def make(root: str, acknowledged: Callable[[], None]) -> None:
    """One run of each sort; a call of `acknowledged` after everything that was acknowledged."""
    storage = Storage.open(root)
    acknowledged()
    lease = Lease.join(storage)
    digest = storage.put_blob(BLOB)
    acknowledged()
    _write(storage, "live", lease.id, [[_activated(1, 0), _scheduled(2), _completed(3, digest)]], acknowledged)
    _write(storage, "moved", lease.id, [[_activated(1, 0)], [_activated(2, 1)], [_activated(3, 2), _fired(4)]])
    acknowledged()
    folding = Storage(storage.root, storage.storage_id, fold_limit=1)
    _write(folding, "folded", lease.id, [[_activated(1, 0)], [_fired(2)], [_fired(3)], [_fired(4)], [_fired(5)]])
    acknowledged()
    failed = ev.RunFailed(seq=2, at=AT, error=ev.ErrorInfo(kind="transient", type="ConnectionError", message="no"))
    _write(storage, "failed", lease.id, [[_activated(1, 0), failed]], acknowledged)
    _write(storage, "again", lease.id, [[_activated(1, 0), failed]], acknowledged)
    _write(storage, "again", lease.id, [[_activated(3, 1), _fired(4)]], acknowledged, made=True)
    for run_id in COMPACTED:
        end = ev.RunCompleted(seq=2, at=AT, result=ev.Payload(enc="json", data=run_id))
        _write(storage, run_id, lease.id, [[_activated(1, 0), end]])
    from pyworkflow_ray.storage.compact import compact

    compact(storage)
    acknowledged()
    end = ev.RunCompleted(seq=2, at=AT, result=ev.Payload(enc="json", data="done"))
    _write(storage, "done", lease.id, [[_activated(1, 0), end]], acknowledged)
    dead = Lease.join(storage)
    _write(storage, "orphan", dead.id, [[_activated(1, 0), _fired(2)]])
    acknowledged()
    dead.close()
    dead_leases(storage)
    BreakerStates(root, "payments").save([(None, {"state": "open"})], AT)
    acknowledged()


def _write(
    storage: Storage,
    run_id: str,
    lease: str,
    epochs: Sequence[Sequence[ev.Event]],
    acknowledged: Callable[[], None] = lambda: None,
    *,
    made: bool = False,
) -> None:
    if not made:
        storage.create_run(_created(storage, run_id), lease=lease)
        acknowledged()
    for number, events in enumerate(epochs):
        journal, _ = storage.activate(run_id, lease, first=not made and number == 0)
        for event in events:
            journal.append([event]).result()
            acknowledged()
        journal.finish() if isinstance(events[-1], ev.TERMINAL) else journal.close()


def _created(storage: Storage, run_id: str) -> ev.RunCreated:
    return ev.RunCreated(
        seq=0,
        at=AT,
        run_id=run_id,
        run_uid=f"uid-{run_id}",
        storage_id=storage.storage_id,
        workflow="m:flow",
        code=ev.CodeRef(how="import", name="flow", module="m", qualname="flow"),
        environment=ev.CodeEnvironment(key="k", python="3.11"),
    )


def _activated(seq: int, epoch: int) -> ev.Event:
    return ev.RunActivated(seq=seq, at=AT, epoch=epoch)


def _scheduled(seq: int) -> ev.Event:
    code = ev.CodeRef(how="import", name="charge", module="m", qualname="charge")
    return ev.StepScheduled(seq=seq, at=AT, position="1", number=1, step="m:charge", code=code)


def _completed(seq: int, digest: str) -> ev.Event:
    result = ev.Payload(enc="json", ref=digest, size=len(BLOB))
    return ev.StepCompleted(
        seq=seq, at=AT, position="1", dispatch=1, attempt=1, started_at=AT, ended_at=AT, result=result
    )


def _fired(seq: int) -> ev.Event:
    return ev.TimerFired(seq=seq, at=AT, position=str(seq))


# What the harness asks ---------------------------------------------------------------------------------------------


class Ours:
    """cli: ask the command line too, in this process."""

    name = "pyworkflow-ray"
    errors: tuple[type[BaseException], ...] = (StorageError, RunNotFoundError)

    def make(self, root: Path) -> list[State]:
        maker = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.damage.ours", str(root)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert maker.stdin is not None
        assert maker.stdout is not None
        history: list[State] = []
        for line in maker.stdout:
            history.append(read_state(root))
            if line == "end\n":
                break
            maker.stdin.write("\n")
            maker.stdin.flush()
        else:
            raise RuntimeError(f"the maker of a store ended with {maker.wait()} after {len(history)} acknowledgements")
        maker.kill()
        maker.communicate()
        return history

    def calls(self, file: str) -> Mapping[str, Call]:
        return {**_primary(file), **_OTHERS}

    def names(self, state: State) -> Mapping[str, Sequence[str]]:
        found: dict[str, list[str]] = {}
        for file in state:
            directory, _, name = file.rpartition("/")
            if directory.startswith("runs/"):
                others = ["0.journal", "1.journal", "2.journal", "9.journal", "0-1.journal", "0-9.journal"]
                found[file] = [f"{directory}/{other}" for other in (*others, "7.checkpoint", f"{name}.bak")]
            elif directory == "leases":
                found[file] = [f"leases/{name.partition('.')[0]}.dead", f"leases/{'0' * 32}.lease"]
            elif directory == "active":
                run_id = name.partition("@")[0]
                found[file] = [f"active/{run_id}@7", "active/done@0", "active/nobody@0", f"active/{name}.bak"]
            elif file.endswith(".json") and directory:
                found[file] = [f"{directory}/{'0' * 32}.json"]
            elif directory.startswith("blobs"):
                found[file] = [f"{directory}/{name[:2]}{'0' * 62}"]
        return found

    def is_blind(self, call: str, damage: Damage) -> bool:
        # Recovery takes its runs from the index and never scans history; who reads the run sees that its entry is gone.
        return call in ("recover", "resume") and damage.kind in ("removed", "renamed") and "active/" in damage.file

    def is_named(self, error: BaseException, file: str) -> bool:
        text = str(error) + str(getattr(error, "path", ""))
        if file.endswith("/"):
            return file.rstrip("/").rpartition("/")[2] in text or file.startswith(("active", "leases", "checkpoints"))
        directory, _, name = file.rpartition("/")
        if directory == "active":  # an entry is one of its run
            return name.partition("@")[0] in text
        if directory == "leases":
            return name.partition(".")[0] in text
        if directory.startswith("runs/"):
            return directory in text
        # A manifest that is gone is known by no name, and what it named is missing.
        return name in text or (directory == "checkpoints/manifests" and "checkpoints" in text)


def _primary(file: str) -> Mapping[str, Call]:
    room, _, rest = file.partition("/")
    if room == "runs" and rest.count("/") >= 2:
        return {"read_run": _reader(rest.split("/")[1])}
    if room == "active":
        return {"read_run": _reader(rest.partition("@")[0] or "live")}
    if room == "checkpoints":  # the tables that no run is read from are read by SQL, and by verify
        return {"read_run": _reader(*COMPACTED)} if "/events-" in file or ".json" in file else {"verify": all_files}
    if room == "leases":
        return {"recover": recover}
    if room == "blobs":
        return {"get_blob": get_blob}
    if room == "breakers":
        return {"breakers": breakers}
    return {"read_run": _reader("live")}


def _facts(history: RunHistory) -> tuple[Any, ...]:
    return tuple(event.model_dump_json() for event in history.events)


def _answer(histories: Sequence[RunHistory]) -> Answer:
    return Answer(
        {one.run_id: _facts(one) for one in histories},
        frozenset(one.run_id for one in histories if not one.finished),
        frozenset(one.run_id for one in histories if one.torn),
    )


def _open(root: Path) -> Storage:
    return Storage.open(root, create=False)


def _reader(*run_ids: str) -> Call:
    def read_run(root: Path) -> Answer:
        storage = _open(root)
        return _answer([storage.read_run(run_id) for run_id in run_ids])

    read_run.about = run_ids  # type: ignore[attr-defined]
    return read_run


def get_blob(root: Path) -> Answer:
    storage = _open(root)
    done = storage.read_run("live").events[-1]
    assert isinstance(done, ev.StepCompleted)
    return Answer({"blob": (storage.get_blob(str(done.result and done.result.ref)),)})


def breakers(root: Path) -> Answer:
    import logging

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("pyworkflow_ray.storage")
    log.addHandler(handler)
    before, log.propagate = log.propagate, False
    try:
        kept = BreakerStates(str(root), "payments").load()
    finally:
        log.removeHandler(handler)
        log.propagate = before
    if said:
        raise CorruptJournalError(said[0])
    return Answer({"payments": () if kept is None else (repr(kept),)}, frozenset(("payments",)))


def recover(root: Path) -> Answer:
    """What recovery would take, in a copy that nobody else holds."""
    with scratch_copy(root) as copy:
        found = orphans(_open(copy))
    if found.damaged:
        raise CorruptJournalError("; ".join(found.damaged.values()))
    return Answer({"runs": tuple(sorted(one.run_id for one in found.runs)), "held": tuple(sorted(found.held))})


def resume(root: Path) -> Answer:
    """Each unfinished run taken over and gone on with, in a copy."""
    histories = []
    with scratch_copy(root) as copy:
        storage = _open(copy)
        for run_id in storage.unfinished():
            before = storage.read_run(run_id)
            journal, events = storage.activate(run_id, "")
            journal.append([_fired(len(events))]).result()
            journal.close()
            after = storage.read_run(run_id)
            assert after.events[:-1] == events == before.events
            before.finished = False
            histories.append(before)
    return _answer(histories)


def sql(root: Path) -> Answer:
    from pyworkflow_ray.storage.sql import query

    storage = _open(root)
    rows = query(storage, "select run_id, seq, epoch, type, data from events order by all").fetchall()
    facts: dict[str, tuple[Any, ...]] = {}
    for run_id, *row in rows:
        facts[run_id] = (*facts.get(run_id, ()), tuple(row))
    ended = set(storage.list_run_ids(finished=True))
    torn = {run_id for run_id in facts.keys() - ended if storage.read_run(run_id).torn}
    return Answer(facts, frozenset(facts.keys() - ended), frozenset(torn))


def compact(root: Path) -> Answer:
    """Compaction of a copy, and everything read afterwards."""
    from pyworkflow_ray.storage.compact import compact as move

    with scratch_copy(root) as copy:
        storage = _open(copy)
        done = move(storage)
        if done.damaged:
            raise CorruptJournalError("; ".join(f"{run_id}: {text}" for run_id, text in done.damaged))
        return _answer([storage.read_run(run_id) for run_id in storage.list_run_ids()])


def all_files(root: Path) -> Answer:
    """What `storage verify` reads."""
    from pyworkflow_ray.storage.verify import verify as read_all

    damaged = read_all(_open(root)).damaged
    if damaged:
        raise CorruptJournalError("; ".join(f"{one.path}: {one.error}" for one in damaged))
    return Answer({})


def verify(root: Path) -> Answer:
    return _command(root, "storage", "verify", "--json")


def runs_list(root: Path) -> Answer:
    return _command(root, "runs", "list", "--json", "--limit", "1000")


def _command(root: Path, *arguments: str) -> Answer:
    """A command of the command line, in this process; exit code 1 is a refusal."""
    import json

    from click.testing import CliRunner

    from pyworkflow_ray.cli.main import cli

    result = CliRunner().invoke(cli, [*arguments, "--storage", str(root)])
    if result.exit_code == 1 and result.stderr:
        raise CorruptJournalError(result.stderr)
    found = json.loads(result.stdout)
    if isinstance(found, dict):
        return Answer({"runs": tuple(range(found["runs"]))}, frozenset(("runs",)), frozenset(found["torn"]))
    over = ("completed", "failed", "cancelled")  # of the others a prefix may say another status
    facts = {run["run_id"]: (run["status"], repr(run["result"])) if run["status"] in over else () for run in found}
    return Answer(facts, frozenset(run_id for run_id, known in facts.items() if not known))


_OTHERS: Final[Mapping[str, Call]] = {
    "recover": recover,
    "resume": resume,
    "sql": sql,
    "compact": compact,
    "runs list": runs_list,
    "storage verify": verify,
}


def main() -> None:
    def acknowledged() -> None:
        print("acknowledged", flush=True)
        sys.stdin.readline()

    make(sys.argv[1], acknowledged)
    print("end", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        sys.stdin.readline()  # killed here


if __name__ == "__main__":
    main()
