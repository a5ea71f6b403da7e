"""The demo itself: start the services, submit the orders, kill what carries them, and prove that nothing was lost.

Called by the command line; calls the public api as any user does, and this room's other modules. It keeps no figures of
its own: `tally` reads them from the event log, `ledger` from the books of the services.

Faults to expect: Ray can't be started here, the directory is not empty, Ctrl-C. Services and Ray are stopped in every
case; the directory with ledger and storage stays.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json as jsonlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyworkflow_ray as pw
from pyworkflow_ray.demo.kills import choose, descendant, strike, working
from pyworkflow_ray.demo.orders import read_orders
from pyworkflow_ray.demo.report import Report, report
from pyworkflow_ray.demo.screen import Screen
from pyworkflow_ray.demo.services import DEFAULT_SEED
from pyworkflow_ray.demo.tally import Kill, Role
from pyworkflow_ray.engine.events import Event

LEDGER = "ledger.sqlite3"
STORAGE = "storage"
LOOKS = 20  # for a process in the middle of its work, before the next order is waited for
# (share of the orders that are done, whom to kill then)
PLAN: list[tuple[float, Role]] = [
    (0.10, "run actor"),
    (0.20, "step worker"),
    (0.30, "controller"),
    (0.45, "step worker"),
    (0.55, "run actor"),
    (0.70, "controller"),
    (0.80, "run actor"),
    (0.85, "step worker"),
]


def run_demo(dir: Path | None = None, json: bool = False, orders: int | None = None, seed: int = DEFAULT_SEED) -> int:
    """Run the checkout demo and print its table, or its figures as one JSON object.

    Args:
        dir: Where ledger and storage are left; made if needed, and must be empty. None: a new temporary directory.
        json: Print `orders completed failed retries recoveries kills requests charges charged_twice lost seconds` (and
            `kills_by_kind`, `repeated`, `setup_seconds`, `proven`, `dir`) instead of the table.
        orders: Take only so many of the orders; None: all.
        seed: Decides how the services fail.

    Returns:
        0 where the ledger proves it: one charge for each completed order, none for a rejected one, none lost, and with
        a hundred orders or more, kills of each kind and repeated requests. Else 1.

    Raises:
        ConfigurationError: `dir` is not empty, or `orders` is below 1.
    """
    folder = _empty_folder(dir)
    if orders is not None and orders < 1:
        raise pw.ConfigurationError(f"orders={orders}: at least 1 is needed")
    rows = read_orders(limit=orders)
    screen = Screen(quiet=json)
    began = time.monotonic()
    # A Ray of its own, whose processes may be killed; and no log lines, for failures by the hundred are meant here.
    init = functools.partial(pw.init, folder / STORAGE, "local", log_level="CRITICAL")
    with services(folder / LEDGER, seed) as address, init():
        setup_s = time.monotonic() - began
        screen.say(f"Ray and the services are up after {setup_s:.0f} s; ledger and storage are in {folder}")
        handles = pw.start_many(_checkout(), [{"row": row, "services": address} for row in rows])
        kills = _watch(handles, screen)
        histories = {handle.run_id: list(handle.events()) for handle in handles}
    result = report(histories, kills, folder / LEDGER, submitted=len(rows))
    if json:
        print(jsonlib.dumps({**result.figures(), "setup_seconds": round(setup_s, 1), "dir": str(folder)}))
    else:
        screen.show(result, folder / STORAGE)
    return 0 if result.proven else 1


def _checkout() -> pw.Workflow[..., Any]:
    from pyworkflow_ray.demo.checkout import checkout

    return checkout


def _empty_folder(dir: Path | None) -> Path:
    if dir is None:
        return Path(tempfile.mkdtemp(prefix="pyworkflow-demo-"))
    folder = dir.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise pw.ConfigurationError(f"dir={str(dir)!r} is not empty: the demo's proof needs a ledger of its own")
    return folder


@contextlib.contextmanager
def services(ledger: Path, seed: int) -> Iterator[str]:
    """The services in a process of their own, at "host:port"; stopped at the end."""
    command = [sys.executable, "-m", "pyworkflow_ray.demo.services", "--ledger", str(ledger), "--seed", str(seed)]
    # A session of its own: Ctrl-C is for the demo, which then ends the services in order.
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the demo's services did not start: {' '.join(command)} ended with {process.wait()}")
        yield f"127.0.0.1:{jsonlib.loads(line)['port']}"
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _watch(handles: Sequence[pw.RunHandle[Any]], screen: Screen) -> list[Kill]:
    """Wait for all runs, and kill in the middle as `PLAN` says. A kill that finds nobody at work is tried again."""
    kills: list[Kill] = []
    due = [(max(1, round(share * len(handles))), role) for share, role in PLAN]
    with screen.progress(len(handles)) as progress:
        for done, _ in enumerate(pw.as_completed(handles), 1):
            progress.advance(done)
            if due and done >= due[0][0] and done < len(handles):
                kill = _kill(due[0][1], kills)
                if kill is not None:
                    kills.append(kill)
                    due.pop(0)
                    progress.note(f"SIGKILL {kill.role} {kill.pid}" + ("" if kill.gone else " (it had ended already)"))
    successor = descendant("controller")
    return [
        dataclasses.replace(kill, replaced=successor not in (None, kill.pid)) if kill.role == "controller" else kill
        for kill in kills
    ]


def _kill(role: Role, earlier: Sequence[Kill]) -> Kill | None:
    spared = frozenset(kill.pid for kill in earlier)
    if role == "controller":
        pid = descendant("controller")
        return None if pid is None or pid in spared else strike(role, pid)
    for _ in range(LOOKS):
        pid = choose(role, _active(), spared)
        if pid is None:
            return None
        kill = strike(role, pid, still=functools.partial(_at_work, role, pid))
        if kill is not None:
            return kill
    return None


def _at_work(role: Role, pid: int) -> bool:
    return any(pid == one for _, one in working(role, _active()))


def _active() -> list[list[Event]]:
    return [list(handle.events()) for handle in pw.list_runs(status="running")]


__all__ = ["Report", "run_demo", "services"]
