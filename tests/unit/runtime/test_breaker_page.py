"""The page of a breaker's actor: real shared memory, other processes that read it and write it, no Ray."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time

import pytest

from pyworkflow_ray.resilience.breaker import BreakerState, View
from pyworkflow_ray.runtime import breaker_page
from pyworkflow_ray.runtime.breaker_page import SLOTS, Page, PageAddress, PageWriter, slot_of

OPEN = View(version=7, state=BreakerState.OPEN, open_for_s=60.0, lineage="a", reason="5 failures in a row")


@pytest.fixture
def writer() -> PageWriter:
    return PageWriter()


def opened(writer: PageWriter) -> Page:
    assert writer.address is not None
    page = Page.open(writer.address)
    assert page is not None
    return page


def keys_of_one_slot() -> tuple[str, str]:
    seen: dict[int, str] = {}
    for number in range(SLOTS + 1):
        key = f"host-{number}"
        if slot_of(key) in seen:
            return seen[slot_of(key)], key
        seen[slot_of(key)] = key
    raise AssertionError("more keys than slots, and no two in one")


def test_a_change_is_seen_and_counted(writer: PageWriter) -> None:
    page = opened(writer)
    counter = page.counter(None)
    assert (counter[0], page.read(None)) == (0, None)
    writer.write(None, OPEN)
    seen = page.read(None)
    assert counter[0] == 1
    assert seen is not None
    assert dataclasses.replace(seen, open_for_s=60.0) == OPEN
    writer.write(None, dataclasses.replace(OPEN, version=8, state=BreakerState.CLOSED, open_for_s=0.0))
    seen = page.read(None)
    assert (counter[0], seen and seen.version) == (2, 8)


def test_durations_go_on_while_a_change_lies_there(writer: PageWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    node = dataclasses.replace(OPEN, open_for_s=20.0)
    view = dataclasses.replace(OPEN, permits=((1, 30.0), (2, None)), nodes=(("n", node),))
    writer.write(None, view)
    page, written_at = opened(writer), time.monotonic()
    monkeypatch.setattr(breaker_page.time, "monotonic", lambda: written_at + 25.0)
    seen = page.read(None)
    assert seen is not None
    assert seen.open_for_s == pytest.approx(35.0, abs=1.0)
    assert seen.permits[0][1] == pytest.approx(5.0, abs=1.0)
    assert seen.permits[1] == (2, None)
    assert seen.nodes[0][1].open_for_s == 0.0


def test_a_key_that_shares_its_slot_is_told_that_something_changed_and_not_what(writer: PageWriter) -> None:
    mine, other = keys_of_one_slot()
    page = opened(writer)
    writer.write(mine, OPEN)
    assert page.read(mine) is not None
    writer.write(other, OPEN)
    assert page.counter(mine)[0] == 2
    assert page.read(mine) is None
    assert page.read(other) is not None
    assert page.counter(None)[0] == 0  # the breaker itself shares with none


def test_a_view_that_is_too_large_is_counted_and_not_told(writer: PageWriter) -> None:
    page = opened(writer)
    writer.write(None, OPEN)
    writer.write(None, dataclasses.replace(OPEN, permits=tuple((number, 1.0) for number in range(200))))
    assert page.counter(None)[0] == 2
    assert page.read(None) is None


def test_a_page_of_another_process_at_the_same_number_is_none(writer: PageWriter) -> None:
    assert writer.address is not None
    assert Page.open(dataclasses.replace(writer.address, token=bytes(32))) is None
    descriptor = os.open(os.devnull, os.O_RDONLY)
    try:
        assert Page.open(dataclasses.replace(writer.address, descriptor=descriptor)) is None
    finally:
        os.close(descriptor)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert Page.open(PageAddress(gone.pid, 3, bytes(32))) is None


def test_without_such_memory_there_is_no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    writer = PageWriter()
    assert writer.address is None
    writer.write(None, OPEN)


WRITE = """
import sys
from pyworkflow_ray.resilience.breaker import BreakerState, View
from pyworkflow_ray.runtime.breaker_page import PageWriter
writer = PageWriter()
address = writer.address
print(address.pid, address.descriptor, address.token.hex(), flush=True)
sys.stdin.readline()
for version in range(1, 20_001):
    state = BreakerState.OPEN if version % 2 else BreakerState.CLOSED
    writer.write(None, View(version=version, state=state, generation=version, reason="x" * (version % 300)))
print("done", flush=True)
sys.stdin.readline()
"""


def test_what_is_read_while_it_is_written_is_whole_and_never_goes_back() -> None:
    with subprocess.Popen([sys.executable, "-c", WRITE], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        pid, descriptor, token = other.stdout.readline().split()
        page = Page.open(PageAddress(int(pid), int(descriptor), bytes.fromhex(token)))
        assert page is not None
        counter, last, read = page.counter(None), 0, 0
        other.stdin.write("go\n")
        other.stdin.flush()
        while last < 20_000:
            told = counter[0]
            view = page.read(None)
            if view is not None:
                read += 1
                assert (view.generation, len(view.reason)) == (view.version, view.version % 300)
                assert view.version >= max(last, told)  # what was counted is there
                last = view.version
        assert read > 1
        other.kill()
    assert page.read(None) is not None  # its writer is dead, and the memory is still ours
