"""Large values between steps: by Ray's objects while they live, by their blobs else, exact in both cases."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import payload_flows as flows
import pytest

import pyworkflow_ray as pw

MIB = 4.0
EXPECTED = np.random.default_rng(0).random(int(MIB * 1024 * 1024) // 8)

pytestmark = pytest.mark.ray


def blobs(storage: Path) -> set[str]:
    return {path.name for path in Path(storage, "blobs").rglob("*") if path.is_file()}


@pytest.fixture(autouse=True)
def _needs_ray(runtime: Path) -> None:
    """Every test here runs on the session's cluster."""


def test_a_step_finds_the_value_of_another_in_shared_memory(runtime: Path) -> None:
    found = pw.run(flows.hand_on, MIB)
    assert found["sum"] == EXPECTED.sum()
    assert found["mapped"].startswith("/dev/shm/")  # Ray's object store: no blob was read
    assert found["known"]
    assert not found["writable"]


def test_what_is_passed_on_is_stored_once(runtime: Path) -> None:
    before = blobs(runtime)
    whole, half, local = pw.run(flows.hand_on_in_parts, MIB)
    assert whole["sum"] == EXPECTED.sum()
    assert half["sum"] == EXPECTED[: len(EXPECTED) // 2].sum()
    assert {found["mapped"].partition("/plasma")[0] for found in (whole, half, local)} == {"/dev/shm"}
    assert len(blobs(runtime) - before) <= 2


def test_after_an_activation_the_blob_is_mapped(runtime: Path) -> None:
    found = pw.run(flows.hand_on_after_a_sleep, MIB)
    assert found["sum"] == EXPECTED.sum()
    assert found["mapped"].startswith(str(runtime))


def test_a_handle_gives_the_value_and_a_map_takes_its_parts(runtime: Path) -> None:
    assert np.array_equal(pw.run(flows.give, MIB), EXPECTED)
    assert pw.run(flows.map_over, MIB) == [float(part.sum()) for part in np.split(EXPECTED, 4)]
