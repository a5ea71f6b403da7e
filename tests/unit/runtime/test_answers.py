"""Ray's thread is never held up by a lock of ours."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

from pyworkflow_ray.runtime.answers import Answers


class Ref:
    """Stands for an object ref: it has a future."""

    def __init__(self) -> None:
        self.done: Future[Any] = Future()

    def future(self) -> Future[Any]:
        return self.done


def test_whoever_brings_an_answer_never_waits_for_the_lock_that_its_handler_takes() -> None:
    lock, handled = threading.RLock(), threading.Event()
    ref, answers = Ref(), Answers()

    def handle(future: Future[Any]) -> None:
        with lock:
            assert future.result() == 7
            handled.set()

    answers.then(ref, handle)
    brings = threading.Thread(target=ref.done.set_result, args=(7,), daemon=True)
    with lock:  # as one who waits for another answer meanwhile
        brings.start()
        brings.join(20)
        assert not brings.is_alive()
        assert not handled.is_set()
    assert handled.wait(20)


def test_an_answer_that_can_not_be_handled_does_not_keep_the_next_from_it() -> None:
    handled = threading.Event()
    first, second, answers = Ref(), Ref(), Answers()

    def fail(future: Future[Any]) -> None:
        raise RuntimeError("broken")

    answers.then(first, fail)
    answers.then(second, lambda future: handled.set())
    first.done.set_result(None)
    second.done.set_result(None)
    assert handled.wait(20)
