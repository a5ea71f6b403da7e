"""From answers to checks: what each answer means, why, and what to do. Pure but for what it is handed.

Called by `health`. An answer is a value, the exception raised in its place, or `Silent`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pyworkflow_ray.durations import format_duration
from pyworkflow_ray.errors import PyWorkflowError
from pyworkflow_ray.observability.health import Absent, Check, CheckStatus
from pyworkflow_ray.observability.model import RunView
from pyworkflow_ray.observability.words import one_line, plural, size_text

LATE_S = 5.0  # a timer, or a parked run, that is due for so long
VERY_LATE_S = 60.0
SLOW_SYNC_S = 1.0  # a step waits for one at least
FREE_BYTES = 256 * 2**20
FREE_SHARE = 0.02
FREE_INODES = 1_000
_NAMED = 3


class Silent(Exception):
    """No answer came in time."""

    def __init__(self, message: str, limit_s: float) -> None:
        super().__init__(message)
        self.limit_s = limit_s


@dataclass(slots=True)
class RunsSeen:
    """Unfinished runs: how many there are, those that were read, and what is wrong with those that can't be."""

    total: int = 0
    views: list[RunView] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)


def _said(error: BaseException) -> str:
    text = one_line(str(error))
    kind = type(error).__name__
    return text if isinstance(error, (Silent, PyWorkflowError)) else f"{kind}: {text[:300]}" if text else kind


def _names(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def ray_check(answer: Any, took_s: float, address: str | None) -> Check:
    def check(status: CheckStatus, why: str, remedy: str | None = None, **details: Any) -> Check:
        return Check(name="ray", status=status, why=why, remedy=remedy, took_s=took_s, details=details)

    asked = f"address {address}" if address else "Ray"
    if isinstance(answer, Absent):
        return check("skipped", "no Ray runs here and no address is set: the first start begins a local one")
    if isinstance(answer, Silent):
        return check(
            "failing",
            f"{asked} does not answer: {answer}",
            "see to the head's gcs_server (ray status); a new cluster on the same storage goes on with recover()",
        )
    if isinstance(answer, BaseException):
        return check("failing", _said(answer), "start the cluster, or correct the address or RAY_ADDRESS")
    cpus = answer.resources.get("CPU", 0.0)
    why = f"{answer.address}: {plural(answer.nodes, 'node')}, {cpus:g} CPUs"
    details = {"address": answer.address, "nodes": answer.nodes, "cpus": cpus}
    if not cpus:
        return check("degraded", f"{why}: steps that ask for a CPU never run", "add a node with CPUs", **details)
    return check("ok", why, **details)


def controller_check(answer: Any, took_s: float, where: Any) -> Check:
    def check(status: CheckStatus, why: str, remedy: str | None = None, **details: Any) -> Check:
        return Check(name="controller", status=status, why=why, remedy=remedy, took_s=took_s, details=details)

    place = where if isinstance(where, str) else ""
    if isinstance(answer, Absent):
        return check("skipped", "none: nothing has been started on this storage in this cluster")
    if isinstance(answer, BaseException):
        kind = type(answer).__name__
        if kind in ("ActorUnavailableError", "ActorDiedError") or place == "restarting":
            return check(
                "failing",
                f"it is gone or restarting ({kind}): no run is accepted meanwhile, runs that live go on",
                "Ray restarts it within a second or two; if not, pw.start makes another",
            )
        if isinstance(answer, Silent) or kind == "GetTimeoutError":
            at = f" ({place})" if place else ""
            kill = place.partition(" on ")[0].removeprefix("pid ") if place.startswith("pid ") else "its process"
            return check(
                "failing",
                f"its process{at} does not answer within {format_duration(round(took_s, 1))}: no run is accepted, "
                "parked runs are not woken",
                f"kill -9 {kill}: Ray restarts it, and it finds living runs again",
            )
        return check("failing", _said(answer), "see the controller's log in Ray's log directory")
    states = ", ".join(f"{count} {state}" for state, count in answer.states.items()) or "no unfinished runs"
    details = {"pid": answer.pid, "lease": answer.lease, "states": answer.states}
    if answer.draining:
        return check("degraded", f"it is shutting down and takes no new runs; {states}", "start again", **details)
    if not answer.rebuilt:
        return check("degraded", f"it was restarted and still looks for its runs; {states}", "wait a moment", **details)
    return check("ok", f"pid {answer.pid}: {states}", **details)


def anchors_check(answer: Any, took_s: float, vitals: Any) -> Check:
    def check(status: CheckStatus, why: str, remedy: str | None = None, **details: Any) -> Check:
        return Check(name="anchors", status=status, why=why, remedy=remedy, took_s=took_s, details=details)

    if isinstance(answer, BaseException):
        return check("failing", _said(answer), "Ray restarts them; if not, restart the cluster and recover()")
    details = {"anchors": answer.anchors, "silent": answer.silent, "run_actors": len(answer.actors)}
    if not answer.anchors:
        if isinstance(vitals, Absent):
            return check("skipped", "none: nothing has been started on this storage in this cluster")
        return check("degraded", "there is none: it is being made", "wait a moment", **details)
    if answer.silent:
        return check(
            "failing" if answer.silent == answer.anchors else "degraded",
            f"{answer.silent} of {answer.anchors} do not answer: their pools get no new run actors",
            "kill the process of the anchor (ray list actors): Ray restarts it, and its runs are taken up uncharged",
            **details,
        )
    unheld = [pool.environment for pool in getattr(vitals, "pools", []) if not pool.held]
    if unheld:
        return check("degraded", f"{plural(len(unheld), 'anchor')} not ready yet", "wait a moment", **details)
    return check("ok", f"{plural(answer.anchors, 'anchor')}, {plural(len(answer.actors), 'run actor')}", **details)


def pool_check(vitals: Any, answer: Any, took_s: float) -> Check:
    def check(status: CheckStatus, why: str, remedy: str | None = None, **details: Any) -> Check:
        return Check(name="pool", status=status, why=why, remedy=remedy, took_s=took_s, details=details)

    if isinstance(answer, BaseException):
        return check("failing", f"the run actors can't be asked: {_said(answer)}", "see anchors")
    doing, silent = answer
    busy = [one.run_id for one in doing if one.run_id is not None]
    details: dict[str, Any] = {"actors": len(doing) + len(silent), "busy": len(busy), "silent": silent}
    if silent:
        return check(
            "failing" if not doing else "degraded",
            f"{plural(len(silent), 'run actor')} of {len(doing) + len(silent)} do not answer: {_names(silent)}",
            "kill -9 the process: its run goes on at once on another run actor",
            **details,
        )
    if isinstance(vitals, BaseException):
        if not doing and isinstance(vitals, Absent):
            return check("skipped", "none: nothing has been started on this storage in this cluster")
        return check("ok", f"{plural(len(doing), 'run actor')}, {len(busy)} busy; they go on by themselves", **details)
    waiting = sum(pool.waiting for pool in vitals.pools)
    starting = sum(pool.starting for pool in vitals.pools)
    failed = max((pool.failures for pool in vitals.pools), default=0)
    details |= {"waiting": waiting, "starting": starting}
    why = f"{plural(len(doing), 'run actor')}, {len(busy)} busy, {waiting} runs wait"
    if failed:
        return check(
            "degraded" if doing else "failing",
            f"{why}; the last {plural(failed, 'start')} of a run actor failed",
            "see the controller's log: most often the code environment or memory",
            **details,
        )
    if waiting and not starting and all(pool.busy >= pool.most for pool in vitals.pools if pool.waiting):
        most = max(pool.most for pool in vitals.pools)
        return check("ok", f"{why}: all {most} are busy (pool_max raises that)", **details)
    return check("ok", why + (f", {starting} starting" if starting else ""), **details)


def storage_check(answer: Any, took_s: float, root: str) -> Check:
    def check(status: CheckStatus, why: str, remedy: str | None = None, **details: Any) -> Check:
        return Check(name="storage", status=status, why=why, remedy=remedy, took_s=took_s, details=details)

    if isinstance(answer, Silent):
        return check("failing", f"a write does not come back: {answer}", f"look at the disk under {root}")
    if isinstance(answer, BaseException):
        return check(
            "failing", _said(answer), f"make {root} writable, or choose another: --storage, PYWORKFLOW_STORAGE"
        )
    if answer is None:
        return check("ok", "it does not exist yet: the first start makes it")
    wrote, synced = answer.write_s, answer.sync_s
    details = {"write_s": wrote, "sync_s": synced, "free_bytes": answer.free_bytes, "free_inodes": answer.free_inodes}
    why = f"4 KiB written in {format_duration(wrote)}, synced in {format_duration(synced)}"
    if answer.free_bytes is None:
        return check("ok", f"the bucket keeps conditional writes; asked in {format_duration(wrote)}", **details)
    why += f", {size_text(answer.free_bytes)} free"
    if answer.free_inodes is not None and answer.free_inodes < FREE_INODES:
        return check(
            "degraded", f"{why}, {answer.free_inodes} inodes left", "make room: each run is a directory", **details
        )
    if answer.free_bytes < FREE_BYTES or (answer.free_share is not None and answer.free_share < FREE_SHARE):
        return check("degraded", why, "make room: storage compact, or --retain, or a larger disk", **details)
    if synced > SLOW_SYNC_S:
        return check("degraded", f"{why}: every step waits for one at least", "use a faster disk", **details)
    return check("ok", why, **details)


def runs_check(answer: Any, took_s: float) -> Check:
    def check(status: CheckStatus, why: str, remedy: str | None = None, **details: Any) -> Check:
        return Check(name="runs", status=status, why=why, remedy=remedy, took_s=took_s, details=details)

    if isinstance(answer, BaseException):
        return check("failing", f"unfinished runs can't be read: {_said(answer)}", "pyworkflow-ray storage verify")
    stuck = [view for view in answer.views if view.state == "stuck"]
    left = [view for view in answer.views if view.state != "stuck" and "recover" in view.commands]
    paused = [view.run_id for view in answer.views if view.state == "paused"]
    looked = len(answer.views) + len(answer.damaged)
    why = f"{answer.total} unfinished" + (f", {looked} looked at" if looked < answer.total else "")
    details = {
        "unfinished": answer.total,
        "looked_at": looked,
        "stuck": {view.run_id: view.why for view in stuck[:20]},
        "unowned": [view.run_id for view in left[:20]],
        "paused": paused[:20],
        "damaged": dict(list(answer.damaged.items())[:20]),
    }
    said, remedies = [], []
    if answer.damaged:
        said.append(f"{len(answer.damaged)} can't be read ({_names(list(answer.damaged))})")
        remedies.append("pyworkflow-ray storage verify")
    if stuck:
        said.append(f"{len(stuck)} stuck ({stuck[0].run_id}: {stuck[0].why})")
        recover = any("recover" in view.commands for view in stuck)
        remedies.append("pyworkflow-ray recover" if recover else f"pyworkflow-ray runs show {stuck[0].run_id}")
    if left:
        said.append(f"{len(left)} that nobody holds ({_names([view.run_id for view in left])})")
        remedies.append("pyworkflow-ray recover")
    if said:
        remedy = " · ".join(dict.fromkeys(remedies))
        return check("degraded", f"{why}: {', '.join(said)}", remedy, **details)
    if paused:
        why += f", {len(paused)} paused for a person ({_names(paused)})"
    return check("ok", why + ", none stuck", **details)


def timers_check(vitals: Any, seen: Any) -> Check:
    def check(status: CheckStatus, why: str, remedy: str | None = None, **details: Any) -> Check:
        return Check(name="timers", status=status, why=why, remedy=remedy, details=details)

    if not isinstance(vitals, BaseException) and vitals is not None:
        late = max([vitals.timer_lag_s, *(seconds for _, seconds in vitals.late)])
        names = [run_id for run_id, _ in vitals.late]
        status: CheckStatus = "ok" if late <= LATE_S else "degraded" if late <= VERY_LATE_S else "failing"
        why = f"{plural(vitals.timers, 'timer')} set, the latest {format_duration(round(late, 3))} overdue"
        if status == "ok":
            return check("ok", why, timers=vitals.timers, lag_s=late)
        held_up = f"{why}: {_names(names)}" if names else why
        return check(status, held_up, "the controller is overloaded, or the clock jumped", lag_s=late, late=names)
    if isinstance(seen, BaseException):
        return check("skipped", "neither the controller nor the storage could be asked")
    late_runs = sorted(
        ((view.now - view.next_at).total_seconds(), view.run_id)
        for view in seen.views
        if view.next_at is not None and view.status == "parked" and view.next_at < view.now
    )
    parked = sum(view.status == "parked" for view in seen.views)
    if not late_runs or late_runs[-1][0] <= LATE_S:
        return check("ok", f"{plural(parked, 'parked run')}, none overdue", parked=parked)
    worst, run_id = late_runs[-1]
    by = format_duration(round(worst, 1))
    return check(
        "degraded",
        f"{plural(len(late_runs), 'parked run')} overdue, {run_id} by {by}: nobody wakes them",
        "pyworkflow-ray recover takes them up",
        lag_s=worst,
        late=[name for _, name in late_runs[-20:]],
    )


def breakers_check(answer: Any, took_s: float) -> Check:
    def check(status: CheckStatus, why: str, remedy: str | None = None, **details: Any) -> Check:
        return Check(name="breakers", status=status, why=why, remedy=remedy, took_s=took_s, details=details)

    if isinstance(answer, BaseException):
        return check("degraded", f"they can't be asked: {_said(answer)}", "closed ones let calls through meanwhile")
    rows, silent = answer
    shut = [row for row in rows if row.view.state.value in ("open", "half_open", "forced_open")]
    details = {
        "breakers": len(rows),
        "open": {_full(row): row.view.reason for row in shut[:20]},
        "silent": silent,
    }
    said = []
    if silent:
        said.append(f"{_names(silent)}: no answer")
    for row in shut[:_NAMED]:
        rest = row.view.open_for_s
        until = "until a person resets it" if rest is None else f"for {format_duration(round(rest, 1))} more"
        state = row.view.state.value.replace("_", " ")
        until = f" {until}" if row.view.state.value != "half_open" else ""
        said.append(f"{_full(row)} is {state}{until} ({row.view.reason})")
    if said:
        more = f" and {len(shut) - _NAMED} more" if len(shut) > _NAMED else ""
        remedy = "mend what they guard; pyworkflow-ray breakers list" if shut else "Ray restarts their actors"
        return check("degraded", "; ".join(said) + more, remedy, **details)
    return check("ok", f"{plural(len(rows), 'breaker')}, all closed" if rows else "none in use", **details)


def _full(row: Any) -> str:
    return row.name if row.key is None else f"{row.name}[{row.key}]"
