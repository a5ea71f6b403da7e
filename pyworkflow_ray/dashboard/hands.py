"""The child process of the dashboard: connects to a Ray that runs, and does there what it is told.

Run by `cluster` as `python -m pyworkflow_ray.dashboard.hands`; calls the api, and knows nothing of pages. First line
in: storage and address. First line out: `ready`, or `away` with the reason. Then a line in is a deed, a line out its
outcome; several may be under way. It ends when its input ends, or when Ray does.

Faults: no cluster (nothing is started), a deed that is refused (told), anything unexpected (told, and the process ends:
another will find out how things stand).
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, Final

import pyworkflow_ray as pw
from pyworkflow_ray import breakers

AT_ONCE: Final = 4
LEAVE_S: Final = 3.0
LIST_S: Final = 2.0  # for each breaker's actor to answer, when all are asked


class Hands:
    """storage: of the runs. Connected to it at the first deed that is done to a run."""

    def __init__(self, storage: str) -> None:
        self._storage = storage
        self._first = threading.Lock()
        self._ready = False

    def list_breakers(self) -> dict[str, Any]:
        found, silent = breakers.list_breakers(answer_s=LIST_S)
        return {"found": [dataclasses.asdict(one) for one in found], "silent": silent}

    def steer(self, name: str, how: breakers.Steer) -> str:
        return str(breakers.steer(name, how).state)

    def cancel(self, run_id: str, reason: str | None = None) -> str:
        self._run(run_id).cancel(reason or None)
        return run_id

    def pause(self, run_id: str) -> str:
        return pw.pause(self._run(run_id).run_id).run_id

    def resume(self, run_id: str) -> str:
        return pw.resume(self._run(run_id).run_id).run_id

    def wake(self, run_id: str) -> str:
        return pw.wake(self._run(run_id).run_id).run_id

    def rerun(self, run_id: str) -> str:
        return pw.rerun(self._run(run_id).run_id).run_id

    def recover(self, run_id: str) -> str:
        self._run(run_id)
        pw.recover()
        return run_id

    def _run(self, run_id: str) -> pw.RunHandle[Any]:
        with self._first:
            if not self._ready:
                pw.init(storage=self._storage)
                self._ready = True
        return pw.get_run(run_id)


DEEDS: Final = frozenset({"list_breakers", "steer", "cancel", "pause", "resume", "wake", "rerun", "recover"})


def main() -> None:
    """Entry point. Its own standard output is for answers alone: what libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    told = json.loads(sys.stdin.readline())
    try:
        breakers.connect(told["address"], {"log_to_driver": False})
    except Exception as error:
        _say(answers, {"away": f"{error}"})
        return
    _say(answers, {"ready": True})
    serve(Hands(told["storage"]), sys.stdin, answers)
    threading.Timer(LEAVE_S, os._exit, (0,)).start()
    pw.shutdown()
    os._exit(0)


def serve(hands: Hands, asked: IO[str], answers: IO[str]) -> None:
    """Until nobody asks any more."""
    one = threading.Lock()

    def say(answer: dict[str, Any]) -> None:
        with one:
            _say(answers, answer)

    pool = ThreadPoolExecutor(AT_ONCE, "deed")
    for line in asked:
        order = json.loads(line)
        if order["do"] not in DEEDS:
            raise ValueError(f"no deed is called {order['do']!r}")
        pool.submit(_do, getattr(hands, order["do"]), order, say)


def _do(deed: Callable[..., Any], order: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    try:
        say({"id": order["id"], "done": deed(**order["with"])})
    except pw.PyWorkflowError as error:
        say({"id": order["id"], "refused": str(error) or type(error).__name__})
    except BaseException as error:
        say({"id": order["id"], "failed": f"{type(error).__name__}: {error}"})
        os._exit(1)


def _say(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
