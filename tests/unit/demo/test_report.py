from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from decimal import Decimal
from pathlib import Path

import pytest

from pyworkflow_ray.demo.ledger import Ledger
from pyworkflow_ray.demo.report import Report, report
from pyworkflow_ray.demo.screen import Screen
from pyworkflow_ray.demo.tally import Kill
from pyworkflow_ray.engine.events import (
    CodeEnvironment,
    CodeRef,
    ErrorInfo,
    Event,
    Payload,
    RunActivated,
    RunCompleted,
    RunCreated,
    RunFailed,
    StepLost,
    StepStarted,
)

KEYS = "orders completed failed retries recoveries kills requests charges charged_twice lost seconds".split()
KILLS = [
    Kill("run actor", 10, 2, True),
    Kill("step worker", 20, 2, True),
    Kill("controller", 30, 2, True, replaced=True),
]


def history(order_id: str, *events: Event) -> list[Event]:
    created = RunCreated(
        at=1.0,
        run_id=f"run-{order_id}",
        run_uid="u",
        storage_id="s",
        workflow="checkout",
        code=CodeRef(how="import", name="checkout"),
        environment=CodeEnvironment(key="k", python="3.11"),
        kwargs={"row": Payload(enc="json", data={"order_id": order_id, "amount": "5.00"})},
    )
    return [created, *events]


def completed(order_id: str) -> list[Event]:
    return history(
        order_id,
        RunActivated(at=1, epoch=0, worker="10"),
        StepStarted(at=1, position="1", dispatch=1, attempt=1, started_at=1, worker="20"),
        StepLost(at=3, position="1", dispatch=1),
        RunActivated(at=4, epoch=1, cause="recovery", worker="11"),
        RunCompleted(at=9, result=Payload(enc="json")),
    )


def failed(order_id: str) -> list[Event]:
    return history(order_id, RunFailed(at=5, error=ErrorInfo(kind="permanent", type="InvalidOrder")))


def make(folder: Path, histories: list[list[Event]], charges: dict[str, str], kills: list[Kill] = KILLS) -> Report:
    ledger = Ledger(folder / "ledger.db")
    for key, order_id in charges.items():
        for _ in range(2):
            ledger.request(key, order_id)
            ledger.charge(key, order_id, Decimal("5.00"))
    ledger.close()
    by_id = {f"run-{number}": events for number, events in enumerate(histories)}
    return report(by_id, kills, folder / "ledger.db", submitted=len(histories))


HUNDRED = [*(completed(f"A{n}") for n in range(98)), failed("B1"), failed("B2")]
CHARGED = {f"k{n}": f"A{n}" for n in range(98)}


def test_a_demo_in_which_all_went_well_is_proven(tmp_path: Path) -> None:
    result = make(tmp_path, HUNDRED, CHARGED)
    assert result.faults() == []
    figures = result.figures()
    assert list(figures)[: len(KEYS)] == KEYS
    assert json.loads(json.dumps(figures)) == figures
    assert {key: figures[key] for key in KEYS} == {
        "orders": 100,
        "completed": 98,
        "failed": 2,
        "retries": 0,
        "recoveries": 196,
        "kills": 3,
        "requests": 196,
        "charges": 98,
        "charged_twice": 0,
        "lost": 0,
        "seconds": 8.0,
    }


def test_each_fault_is_named(tmp_path: Path) -> None:
    unfinished = history("C1", RunActivated(epoch=0))
    charges = {"k1": "A1", "again": "A1", "k2": "B1"}
    result = make(tmp_path, [completed("A1"), completed("A2"), failed("B1"), unfinished], charges)
    assert result.faults() == ["2 orders lost", "charged twice: A1", "charged and yet failed: B1"]
    assert not result.proven


def test_an_order_without_a_run_is_lost(tmp_path: Path) -> None:
    result = make(tmp_path, [completed("A1")], {"k1": "A1"})
    Ledger(tmp_path / "ledger.db").close()
    assert report({"run-0": completed("A1")}, [], tmp_path / "ledger.db", submitted=2).lost == 1
    assert result.lost == 0


@pytest.mark.parametrize("spared", [0, 1, 2])
def test_a_full_demo_that_did_not_kill_each_kind_proves_nothing(tmp_path: Path, spared: int) -> None:
    kills = KILLS[:spared] + KILLS[spared + 1 :]
    result = make(tmp_path, HUNDRED, CHARGED, kills)
    assert result.faults() == [f"no {KILLS[spared].role} was killed in the middle of its work"]


def test_a_kill_that_nothing_bears_witness_to_is_not_counted(tmp_path: Path) -> None:
    result = make(tmp_path, [completed("A1")], {"k1": "A1"}, [*KILLS, Kill("run actor", 77, at=2, gone=True)])
    assert result.figures()["kills"] == 3
    assert result.attempted == 4


def test_the_table_is_plain_off_a_terminal_and_ends_with_a_command(tmp_path: Path) -> None:
    result = make(tmp_path, HUNDRED, CHARGED)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        screen = Screen()
        with screen.progress(100) as progress:
            for done in range(1, 101):
                progress.advance(done)
            progress.note("SIGKILL controller 30")
        screen.show(result, tmp_path / "storage")
    text = out.getvalue()
    assert "\x1b" not in text + err.getvalue()
    assert text.isascii()
    assert "charged twice: 0, lost: 0, charged though rejected: 0" in text
    assert "1 run actor, 1 step worker, 1 controller" in text
    assert f"PYWORKFLOW_STORAGE={tmp_path}/storage pyworkflow-ray runs timeline run-0" in text
    assert err.getvalue().count("orders done") == 10
    assert "SIGKILL controller 30" in err.getvalue()


def test_a_machine_hears_nothing_but_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(quiet=True)
    screen.say("up")
    with screen.progress(1) as progress:
        progress.advance(1)
        progress.note("SIGKILL")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
