"""DBOS on SQLite, for the harness: `python -m benchmarks.damage.dbos_store ROOT` makes a store and is killed.

Called by `harness` through `DbosStore`; needs the group `bench`. A store is one SQLite file, in rollback mode
as DBOS makes it. It is read as DBOS reads it, through its client: workflows, their steps, their results. Any error that
the client raises counts as detected, whatever it names; a file that SQLite repairs counts as harmless.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from benchmarks.damage.damages import Damage, State
from benchmarks.damage.harness import Answer, Call, read_state

REPOSITORY: Final = Path(__file__).resolve().parents[2]
DATABASE: Final = "dbos.sqlite"
COMPLETED: Final = ("order-1", "order-2", "order-3")


class DbosStore:
    name = "DBOS on SQLite"
    errors: tuple[type[BaseException], ...] = (Exception,)

    def make(self, root: Path) -> list[State]:
        root.mkdir(parents=True, exist_ok=True)
        maker = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.damage.dbos_store", str(root)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert maker.stdin is not None
        assert maker.stdout is not None
        history: list[State] = []
        for line in maker.stdout:
            history.append(read_state(root))
            if line == "end\n":
                break
            maker.stdin.write("\n")
            maker.stdin.flush()
        maker.kill()
        maker.communicate()
        return [{file: data for file, data in state.items() if file == DATABASE} for state in history]

    def calls(self, file: str) -> Mapping[str, Call]:
        return {"client": read}

    def names(self, state: State) -> Mapping[str, Sequence[str]]:
        return {}

    def is_blind(self, call: str, damage: Damage) -> bool:
        return False

    def is_named(self, error: BaseException, file: str) -> bool:
        return True  # one file: any error means it


def read(root: Path) -> Answer:
    """All that the store says of its workflows."""
    from dbos import DBOSClient

    if not (root / DATABASE).exists():
        raise FileNotFoundError(root / DATABASE)  # the client would make an empty one
    client = DBOSClient(system_database_url=f"sqlite:///{root / DATABASE}")
    try:
        facts = {}
        for workflow in client.list_workflows():
            steps = client.list_workflow_steps(workflow.workflow_id)
            said = [(step["function_id"], step["function_name"], step["output"], repr(step["error"])) for step in steps]
            facts[workflow.workflow_id] = (workflow.name, workflow.status, workflow.input, workflow.output, *said)
        return Answer({key: tuple(map(repr, value)) for key, value in facts.items()})
    finally:
        client.destroy()


def main() -> None:
    """Completes three workflows of three steps, and is killed in the second step of a fourth."""
    from dbos import DBOS, SetWorkflowID

    root = sys.argv[1]

    def acknowledged(text: str = "acknowledged") -> None:
        print(text, flush=True)
        sys.stdin.readline()

    @DBOS.step()
    def charge(order: str, number: int) -> str:
        if order not in COMPLETED and number == 2:
            acknowledged("end")
            time.sleep(3_600)
        return f"{order} paid {number}"

    @DBOS.workflow()
    def checkout(order: str) -> list[str]:
        return [charge(order, number) for number in range(3)]

    url = f"sqlite:///{root}/{DATABASE}"
    DBOS(config={"name": "damage", "system_database_url": url, "log_level": "CRITICAL", "enable_otlp": False})
    DBOS.launch()
    for order in COMPLETED:
        with SetWorkflowID(order):
            checkout(order)
        acknowledged()
    with SetWorkflowID("order-4"):
        checkout("order-4")


if __name__ == "__main__":
    main()
