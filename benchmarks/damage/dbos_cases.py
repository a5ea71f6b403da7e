"""Bugs that durable workflows had in the field, tried on the installed DBOS: `python -m benchmarks.damage.dbos_cases`.

Each case runs in processes of its own on a new SQLite file, and prints what happened; docs/damage.md sets it beside
what we do. Cases that need a server, a queue over days or another language are not tried, and the page says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]


def start(case: str, root: Path) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks.damage.dbos_cases", case, str(root)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)


def launch(root: str) -> tuple[Any, Any]:
    """DBOS in this process, with one workflow: it notes its execution in a ledger, then takes `seconds`."""
    from dbos import DBOS

    ledger = Path(root, "ledger")

    @DBOS.step()
    def work(text: str, seconds: float) -> str:
        with ledger.open("a") as file:
            file.write(f"{text} in process {os.getpid()}\n")
        time.sleep(seconds)
        return f"result of {text}"

    @DBOS.workflow()
    def flow(text: str, seconds: float = 0.0) -> str:
        return work(text, seconds)

    url = f"sqlite:///{root}/dbos.sqlite"
    DBOS(config={"name": "cases", "system_database_url": url, "log_level": "CRITICAL", "enable_otlp": False})
    DBOS.launch()
    return DBOS, flow


def empty_id(root: str) -> str:
    """dbos-transact-py 759: a workflow whose id is the empty string."""
    from dbos import SetWorkflowID

    dbos, flow = launch(root)
    try:
        with SetWorkflowID(""):
            flow("an empty id")
    except Exception as error:
        return f"refused: {type(error).__name__}"
    return f"ran under the id {dbos.list_workflows()[0].workflow_id!r}"


def reused_id(root: str) -> str:
    """dbos-transact-py 769: an id used again, with other arguments."""
    from dbos import SetWorkflowID

    _, flow = launch(root)
    with SetWorkflowID("order-42"):
        flow("ten euros")
    try:
        with SetWorkflowID("order-42"):
            return f"second call, with other arguments, answered {flow('a thousand euros')!r}"
    except Exception as error:
        return f"refused: {type(error).__name__}"


def owner(root: str) -> str:
    from dbos import SetWorkflowID

    _, flow = launch(root)
    with SetWorkflowID("order-42"):
        return str(flow("live", 8.0))


def second_process(root: str) -> str:
    """dbos-transact-java 491, dbos-transact-py 818: a second process starts while the first runs a workflow."""
    launch(root)
    time.sleep(3.0)
    return "launched"


CASES: Final = {"empty_id": empty_id, "reused_id": reused_id, "owner": owner, "second_process": second_process}


def main() -> None:
    if len(sys.argv) > 1:
        print(CASES[sys.argv[1]](sys.argv[2]), flush=True)
        os._exit(0)
    for case in ("empty_id", "reused_id"):
        with tempfile.TemporaryDirectory() as root:
            print(f"{case}: {start(case, Path(root)).communicate(timeout=60)[0].strip()}")
    with tempfile.TemporaryDirectory() as root:
        first = start("owner", Path(root))
        ledger = Path(root, "ledger")
        while not ledger.exists():
            time.sleep(0.05)
        second = start("second_process", Path(root))
        second.communicate(timeout=60)
        first.communicate(timeout=60)
        lines = ledger.read_text().splitlines()
        print(
            f"second_process: the live workflow's step was executed {len(lines)} times, by {len(set(lines))} processes"
        )


if __name__ == "__main__":
    main()
