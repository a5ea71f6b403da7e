"""Processes that see a trip on the page of the breaker's actor: a real cluster, and a line that tells nothing."""

from __future__ import annotations

import threading

import pytest
import ray

from pyworkflow_ray.errors import CircuitOpenError
from pyworkflow_ray.runtime.breaker_actor import _LINKS
from pyworkflow_ray.runtime.breaker_page import slot_of
from tests.ray.test_breaker import Process, eventually, new

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def test_a_process_whose_line_is_stuck_refuses_from_its_next_call_on_after_a_trip_elsewhere():
    breaker, elsewhere = new(threshold=3), ray.remote(Process).options(num_cpus=0).remote()
    with breaker:
        pass
    link = _LINKS[breaker.name]
    eventually(lambda: link.channel.page is not None)
    assert ray.get(elsewhere.succeed.remote(breaker)) == "ok"
    stuck, go_on = threading.Event(), threading.Event()

    def block() -> None:
        stuck.set()
        go_on.wait(60.0)

    link.channel.loop.call_soon_threadsafe(block)  # nothing is heard from now on
    assert stuck.wait(30.0)
    try:
        assert ray.get(elsewhere.fail.remote(breaker, 3)) == ["ConnectionError"] * 3
        with pytest.raises(CircuitOpenError, match="3 consecutive failures"), breaker:
            pass
        assert breaker.state == "open"
    finally:
        go_on.set()
        ray.kill(elsewhere)


def test_a_key_that_shares_its_place_on_the_page_asks_the_actor_once():
    breaker = new()
    by_slot: dict[int, str] = {}
    for number in range(200):
        other = f"host-{number}"
        mine = by_slot.setdefault(slot_of(other), other)
        if mine != other:
            break
    with breaker.key(mine):
        pass
    link = _LINKS[breaker.key(mine).name]
    eventually(lambda: link.channel.page is not None and link.mirror.known.joined and not link.mirror.busy)
    breaker.key(other).force_open()
    sent = []
    send = link.channel._send

    def counting(messages):
        sent.extend(key for key, message in messages if message.asks)
        return send(messages)

    link.channel._send = counting
    for _ in range(5):
        with breaker.key(mine):
            pass
    assert sent == [mine]
