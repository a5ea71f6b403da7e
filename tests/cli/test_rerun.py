"""`runs rerun`: which runs, at which rate, and what is refused before anything starts."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from pyworkflow_ray.cli.reading import Filter, open_reader
from pyworkflow_ray.cli.rerun import choose, paced
from pyworkflow_ray.engine import events as ev
from pyworkflow_ray.execution.submission import difference, make_rerun
from pyworkflow_ray.storage.codec import StorageCodec
from tests.cli.conftest import DECLINED, Shop


def fail(shop: Shop, run_id: str, ago: float, **fields: Any) -> None:
    shop.run(
        run_id,
        (ago, ev.RunActivated(epoch=0)),
        (ago - 1, ev.RunFailed(error=DECLINED)),
        finish=True,
        **fields,
    )


def chosen(shop: Shop, *, again: bool = False, limit: int | None = None, **wanted: Any) -> list[str]:
    reader = open_reader(shop.root, dt.UTC)
    return choose(reader, Filter(frozenset({"failed"}), **wanted), again, limit)[0]


def test_all_failed_runs_are_chosen_oldest_first_and_those_rerun_before_are_left_out(shop: Shop) -> None:
    fail(shop, "order-50", 300)
    fail(shop, "order-51", 900)
    fail(shop, "order-52", 100, rerun_of="order-51")
    assert chosen(shop) == ["order-41", "order-50", "order-52"]
    assert chosen(shop, again=True) == ["order-51", "order-41", "order-50", "order-52"]
    assert chosen(shop, limit=2) == ["order-41", "order-50"]
    assert chosen(shop, since_s=400) == ["order-50", "order-52"]
    assert chosen(shop, workflow="refunds") == []


def test_a_damaged_run_is_named_and_hides_no_other(shop: Shop) -> None:
    fail(shop, "order-50", 300)
    path = shop.journal_of("order-41")
    data = bytearray(path.read_bytes())
    data[30] ^= 1
    path.write_bytes(bytes(data))
    ids, damaged = choose(open_reader(shop.root, dt.UTC), Filter(frozenset({"failed"})), False, None)
    assert ids == ["order-50"]
    assert "order-41" in damaged[0]


def test_runs_begin_at_a_bounded_rate_and_lost_time_is_not_made_up_for() -> None:
    now, began = [100.0], []

    def sleep(seconds: float) -> None:
        now[0] += seconds

    for item in paced(range(6), 4.0, lambda: now[0], sleep):
        began.append(round(now[0] - 100.0, 6))
        now[0] += 3.0 if item == 2 else 0.01
    assert began == [0.0, 0.25, 0.5, 3.5, 3.75, 4.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either RUN_IDs or --status"),
        (["order-41", "--status", "failed"], "give either RUN_IDs or --status"),
        (["order-41", "--from-step", "3"], "--from-step is not available in this version"),
        (["--status", "failed", "--rate", "0"], "0.0 is not in the range x>0"),
        (["--status", "running"], "'running' is not one of"),
    ],
)
def test_what_does_not_say_which_runs_is_usage_and_starts_nothing(
    invoke: Any, shop: Shop, arguments: list[str], message: str
) -> None:
    result = invoke("runs", "rerun", *arguments, "--storage", shop.root)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr


def test_an_unknown_run_and_nothing_to_rerun(invoke: Any, shop: Shop) -> None:
    result = invoke("runs", "rerun", "nosuch", "--storage", shop.root)
    assert result.exit_code == 1
    assert "nosuch" in result.stderr
    result = invoke("runs", "rerun", "--status", "cancelled", "--storage", shop.root)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "no run to rerun\n")


def test_a_rerun_has_the_same_workflow_and_arguments_and_an_identity_of_its_own(shop: Shop) -> None:
    old = shop.storage.read_run("order-41").events[0]
    assert isinstance(old, ev.RunCreated)
    new = make_rerun(old, StorageCodec(shop.storage))
    assert difference(old, new) is None
    assert (new.rerun_of, new.seq, new.attributes) == ("order-41", 0, {"customer": "acme"})
    for name in ("run_id", "run_uid", "trace_id"):
        assert getattr(new, name) != getattr(old, name)


def test_a_rerun_says_of_which_run_it_is_one(invoke: Any, shop: Shop) -> None:
    fail(shop, "order-52", 100, rerun_of="order-41")
    result = invoke("runs", "show", "order-52", "--storage", shop.root)
    assert "a rerun of order-41" in result.stdout
