"""The journal between real processes: stopped, killed, racing, out of space. What each process was told is written by
itself into a ledger beside the storage, synced, and compared with what the storage holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pyworkflow_ray.failpoints import EXIT_CODE
from pyworkflow_ray.storage.lease import Lease, dead_leases, orphans
from pyworkflow_ray.storage.storage import Storage
from tests.journals import created, fired, make_run, names

ROOT = Path(__file__).resolve().parents[2]

PRELUDE = """
import os, sys
from pyworkflow_ray.errors import FencedError, RunExistsError, StorageError
from pyworkflow_ray.storage.lease import Lease, dead_leases, orphans
from pyworkflow_ray.storage.storage import Storage
from tests.journals import created, ended, fired
storage = Storage.open(sys.argv[1])
ledger = os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
def note(text):
    os.write(ledger, (text + "\\n").encode()); os.fsync(ledger)
def ready():
    print("ready", flush=True); sys.stdin.readline()
"""

APPEND = """
journal, events = storage.activate("run", sys.argv[3], first=sys.argv[4] == "first")
try:
    for seq in range(len(events), len(events) + int(sys.argv[5])):
        journal.append([fired(seq, sys.argv[3])]).result()
        note(f"{seq} {sys.argv[3]}")
except FencedError:
    note("fenced")
    sys.exit(3)
"""


def start(code: str, *arguments: object, failpoint: str = "") -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYWORKFLOW_FAILPOINT": failpoint}
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
        env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def go(*processes: subprocess.Popen[str]) -> None:
    """Let processes that are ready begin, all at once."""
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()


def finish(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=60)
    return process.returncode


def ledger_lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def assert_ledger_kept(storage: Storage, *ledgers: Path) -> None:
    history = names(storage.read_run("run").events)
    for path in ledgers:
        for line in ledger_lines(path):
            if line[0].isdigit():
                seq, who = line.split()
                assert history[int(seq)] == f"timer_fired:{who}"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path / "s")


@pytest.mark.parametrize("where", ["before_write", "before_sync", "before_fence", "before_ack"])
def test_an_owner_stopped_past_the_take_over_is_refused_when_it_goes_on(
    storage: Storage, tmp_path: Path, where: str
) -> None:
    storage.create_run(created("run", storage.storage_id), lease="a")
    stale_ledger = tmp_path / "a"
    stale = start(APPEND, storage.root, stale_ledger, "a", "first", 5, failpoint=f"journal.{where}:3:stop")
    _, status = os.waitpid(stale.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    assert ledger_lines(stale_ledger) == ["1 a", "2 a"]  # it stopped within its third append
    assert finish(start(APPEND, storage.root, tmp_path / "b", "b", "next", 2)) == 0
    before = storage.read_run("run").events
    os.kill(stale.pid, signal.SIGCONT)
    assert finish(stale) == 3
    # An append that had passed its fence before the take-over is acknowledged late, and the taker has it.
    late = ["3 a"] if where == "before_ack" else []
    assert ledger_lines(stale_ledger) == ["1 a", "2 a", *late, "fenced"]
    assert storage.read_run("run").events == before
    assert_ledger_kept(storage, stale_ledger, tmp_path / "b")


@pytest.mark.parametrize(
    "point",
    [f"journal.{where}:{n}" for where in ("before_write", "before_sync", "before_fence", "before_ack") for n in (1, 3)],
)
def test_an_owner_killed_at_any_point_of_an_append_loses_nothing_acknowledged(
    storage: Storage, tmp_path: Path, point: str
) -> None:
    storage.create_run(created("run", storage.storage_id), lease="a")
    assert finish(start(APPEND, storage.root, tmp_path / "a", "a", "first", 5, failpoint=point)) == EXIT_CODE
    assert_ledger_kept(storage, tmp_path / "a")
    journal, events = storage.activate("run", "b")
    assert len(ledger_lines(tmp_path / "a")) <= len(events) - 1 <= len(ledger_lines(tmp_path / "a")) + 1
    assert journal.append([fired(len(events), "b")]).result() == len(events)


@pytest.mark.parametrize(
    "point", ["epoch.before_link", "epoch.before_sync_dir", "epoch.before_sync_old", "epoch.before_seal"]
)
def test_a_taker_killed_at_any_point_leaves_the_run_to_the_next(storage: Storage, tmp_path: Path, point: str) -> None:
    make_run(storage, events=2)
    assert finish(start(APPEND, storage.root, tmp_path / "b", "b", "next", 1, failpoint=point)) == EXIT_CODE
    assert finish(start(APPEND, storage.root, tmp_path / "c", "c", "next", 1)) == 0
    history = storage.read_run("run")
    assert names(history.events) == ["run_created", "timer_fired:1", "timer_fired:2", "timer_fired:c"]
    assert history.epoch == (1 if point == "epoch.before_link" else 2)


def test_takers_that_race_have_one_winner_each_epoch(storage: Storage, tmp_path: Path) -> None:
    make_run(storage)
    for turn in range(5):
        takers = [
            start("ready()\n" + APPEND, storage.root, tmp_path / f"{turn}{n}", f"{turn}{n}", "next", 3) for n in "ab"
        ]
        go(*takers)
        for taker in takers:
            taker.communicate(timeout=60)  # one may be refused in the take-over itself
        assert any(taker.returncode == 0 for taker in takers)
    assert_ledger_kept(storage, *(tmp_path / f"{turn}{n}" for turn in range(5) for n in "ab"))


RECOVER = """
with Lease.join(storage) as mine:
    ready()
    for orphan in orphans(storage).runs:
        try:
            storage.activate(orphan.run_id, mine.id, after=orphan.epoch)[0].close()
            note(orphan.run_id)
        except FencedError:
            pass
    sys.stdin.readline()
"""


def test_recoveries_that_race_take_each_run_once(storage: Storage, tmp_path: Path) -> None:
    dead = Lease.join(storage)
    for number in range(40):
        make_run(storage, f"r{number}", lease=dead.id)
    dead.close()
    takers = [start(RECOVER, storage.root, tmp_path / f"t{n}") for n in range(3)]
    go(*takers)
    for taker in takers:
        assert taker.stdin is not None
        taker.stdin.close()
        assert taker.wait(timeout=60) == 0
    taken = Counter(line for n in range(3) for line in ledger_lines(tmp_path / f"t{n}"))
    assert taken == Counter({f"r{number}": 1 for number in range(40)})


HOLD = """
with Lease.join(storage, sys.argv[3] if len(sys.argv) > 3 else None) as lease:
    child = os.fork()
    if child == 0:
        sys.stdin.close()
        os.read(int(os.environ["HOLD_FD"]), 1)
        os._exit(0)
    note(f"{lease.id} {child}")
    ready()
"""


def test_a_lease_survives_a_restart_and_not_the_sigkill_of_its_last_holder(storage: Storage, tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    os.environ["HOLD_FD"] = str(read_end)
    os.set_inheritable(read_end, True)
    try:
        controller, anchor = (_hold(storage, tmp_path / "c"), _hold(storage, tmp_path / "a", tmp_path / "c"))
        lease_id = ledger_lines(tmp_path / "c")[0].split()[0]
        make_run(storage, lease=lease_id)
        assert orphans(storage).held == {"run": lease_id}
        controller.kill()
        controller.wait()
        assert orphans(storage).held == {"run": lease_id}  # between a controller's death and its restart
        anchor.kill()
        anchor.wait()
        # Their forked children live on, and hold nothing.
        children = [int(ledger_lines(tmp_path / name)[0].split()[1]) for name in "ca"]
        assert all(Path(f"/proc/{child}").exists() for child in children)
        assert dead_leases(storage) == {lease_id}
        assert [orphan.run_id for orphan in orphans(storage).runs] == ["run"]
    finally:
        os.close(write_end)
        os.close(read_end)
        del os.environ["HOLD_FD"]


def _hold(storage: Storage, ledger: Path, joined: Path | None = None) -> subprocess.Popen[str]:
    arguments = [] if joined is None else [ledger_lines(joined)[0].split()[0]]
    fd = int(os.environ["HOLD_FD"])
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + HOLD, storage.root, str(ledger), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        pass_fds=[fd],
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


CREATE = """
ready()
for number in range(int(sys.argv[3]), int(sys.argv[4])):
    run_id = f"run-{number % 900}"
    try:
        storage.create_run(created(run_id, storage.storage_id, run_uid=f"{os.getpid()}-{number}"))
        note(f"{run_id} {os.getpid()}-{number}")
    except RunExistsError:
        note(f"{run_id} exists")
"""


def test_a_thousand_creations_with_a_tenth_doubled_make_one_run_an_id(storage: Storage, tmp_path: Path) -> None:
    # 1,000 numbers over 900 ids, and each number is asked for by two processes at about the same time.
    bounds = [(0, 500), (0, 500), (500, 1000), (500, 1000)]
    makers = [start(CREATE, storage.root, tmp_path / f"m{n}", *pair) for n, pair in enumerate(bounds)]
    go(*makers)
    assert [finish(maker) for maker in makers] == [0, 0, 0, 0]
    lines = [line.split() for n in range(4) for line in ledger_lines(tmp_path / f"m{n}")]
    made = [(run_id, uid) for run_id, uid in lines if uid != "exists"]
    assert len(lines) == 2000
    assert sorted(run_id for run_id, _ in made) == sorted(storage.unfinished()) == storage.list_run_ids()
    assert len(made) == 900
    for run_id, uid in made:
        assert getattr(storage.read_run(run_id).events[0], "run_uid", None) == uid


CREATE_AND_FINISH = """
ready()
for number in range(150):
    try:
        storage.create_run(created(f"r{number}", storage.storage_id), lease=sys.argv[3])
    except RunExistsError:
        continue
    note(f"r{number}")
    journal, _ = storage.activate(f"r{number}", sys.argv[3], first=True)
    journal.append([ended(1)]).result()
    journal.finish()
"""


def test_creations_that_race_with_runs_that_finish_make_one_run_an_id(storage: Storage, tmp_path: Path) -> None:
    makers = [start(CREATE_AND_FINISH, storage.root, tmp_path / n, n) for n in "ab"]
    go(*makers)
    assert [finish(maker) for maker in makers] == [0, 0]
    made = Counter(line for n in "ab" for line in ledger_lines(tmp_path / n))
    assert made == Counter({f"r{number}": 1 for number in range(150)})
    assert storage.unfinished() == []
    assert all(storage.read_run(f"r{number}").finished for number in range(150))


FULL = """
import resource
journal, events = storage.activate("run", "", first=False)
path = journal._place.path(journal.epoch)
limit = os.stat(path).st_size + 400
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
seq = len(events)
try:
    while True:
        journal.append([fired(seq, "x")]).result()
        note(f"{seq} x")
        seq += 1
except StorageError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    note(f"refused at {seq}: {error}")
journal, events = storage.activate("run", "")
for seq in range(len(events), len(events) + 2):
    journal.append([fired(seq, "y")]).result()
    note(f"{seq} y")
"""


def test_a_full_file_is_a_clear_error_and_the_run_goes_on_when_there_is_room(storage: Storage, tmp_path: Path) -> None:
    make_run(storage, events=1)
    assert finish(start(FULL, storage.root, tmp_path / "l")) == 0
    lines = ledger_lines(tmp_path / "l")
    refused = [line for line in lines if line.startswith("refused")]
    assert len(refused) == 1
    assert "File too large" in refused[0]
    assert "Nothing of this commit was acknowledged" in refused[0]
    assert_ledger_kept(storage, tmp_path / "l")
    assert sum(line.endswith(" y") for line in lines) == 2
    assert not storage.read_run("run").torn
