"""`ray job submit`, against the real job server of a local cluster: runs outlive the job that started them.

One cluster for the file. The working_dir exists only in the package that the job server got: the folder it was made
from is removed before anything is executed a second time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Head, drive, environment, head, kill, lines, until
from ray.job_submission import JobStatus, JobSubmissionClient

from pyworkflow_ray.engine.events import RunActivated
from pyworkflow_ray.storage.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SHOP = """
import os, time
from pathlib import Path
import pyworkflow_ray as pw

VERSION = {version!r}

@pw.step
def pack(ledger: str, gate: str, item: int) -> str:
    with open(ledger, "a") as file:
        file.write(f"{{VERSION}} {{item}} {{os.getpid()}}\\n")
    while gate and not os.path.exists(gate):
        time.sleep(0.01)
    from late import word          # imported when it is needed, long after the job has ended
    return f"{{VERSION}}-{{word}}-{{item}}"

@pw.workflow
async def order(ledger: str, gate: str) -> list[str]:
    return [await pack(ledger, gate if item == 1 else "", item) for item in range(3)]
"""
START = """
import sys
import pyworkflow_ray as pw
import shop

handle = pw.start(shop.order.options(run_id=sys.argv[1], attributes={"customer": "zoe"}), *sys.argv[2:4])
print("started", handle.run_id)
if len(sys.argv) > 4:
    sys.exit(int(sys.argv[4]))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Head]:
    with head(dashboard=True) as running:
        client = until(lambda: connected(running), "the job server answers")
        del client
        yield running


def connected(running: Head) -> JobSubmissionClient | None:
    try:
        client = JobSubmissionClient(running.jobs)
        client.list_jobs()
    except Exception:
        return None
    return client


def package(folder: Path, version: str) -> Path:
    folder.mkdir()
    (folder / "shop.py").write_text(SHOP.format(version=version))
    (folder / "late.py").write_text(f"word = 'late{version}'\n")
    (folder / "start.py").write_text(START)
    return folder


def submit(
    running: Head, folder: Path, storage: Path, *arguments: str, name: str
) -> tuple[JobSubmissionClient, JobStatus]:
    client = JobSubmissionClient(running.jobs)
    client.submit_job(
        entrypoint=f"{sys.executable} start.py {' '.join(arguments)}",
        submission_id=name,
        runtime_env={"working_dir": str(folder), "env_vars": {"PYWORKFLOW_STORAGE": str(storage)}},
    )
    until(lambda: client.get_job_status(name).is_terminal(), f"job {name} ends")
    return client, client.get_job_status(name)


READ = "import pyworkflow_ray as pw; h = pw.get_run({run!r}); print(__import__('json').dumps(h.result(60)))"


def test_a_run_outlives_the_job_that_started_it(cluster: Head, tmp_path: Path) -> None:
    storage, ledger, gate = tmp_path / "storage", tmp_path / "ledger", tmp_path / "gate"
    folder = package(tmp_path / "code", "one")
    client, status = submit(cluster, folder, storage, "run-1", str(ledger), str(gate), name="job-one")
    assert status == JobStatus.SUCCEEDED
    assert "started run-1" in client.get_job_logs("job-one")
    info = client.get_job_info("job-one")
    assert info.driver_exit_code == 0
    shutil.rmtree(folder)  # what is left of the code is the package
    until(lambda: len(lines(ledger)) == 2, "the second step waits, without its driver")
    history = Storage.open(storage).read_run("run-1")
    assert history.events[0].attributes == {"customer": "zoe", "submission_id": "job-one"}  # type: ignore[union-attr]
    owner = next(int(e.worker) for e in history.events if isinstance(e, RunActivated))
    kill(owner)  # its recovery is by a process that the job's driver never knew
    until(lambda: len(lines(ledger)) == 3, "the step is executed again")
    gate.touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    result = drive(elsewhere, READ.format(run="run-1"), address=cluster.address, storage=storage)
    assert json.loads(result) == ["one-lateone-0", "one-lateone-1", "one-lateone-2"]


def test_a_failing_job_says_so_and_its_run_goes_on(cluster: Head, tmp_path: Path) -> None:
    storage, ledger = tmp_path / "storage", tmp_path / "ledger"
    folder = package(tmp_path / "code", "two")
    client, status = submit(cluster, folder, storage, "run-2", str(ledger), "''", "7", name="job-two")
    assert status == JobStatus.FAILED
    assert client.get_job_info("job-two").driver_exit_code == 7
    assert "started run-2" in client.get_job_logs("job-two")
    until(lambda: Storage.open(storage).read_run("run-2").finished, "the run ends")


def test_ray_job_submit_gives_the_drivers_exit_code_and_logs(cluster: Head, tmp_path: Path) -> None:
    storage, ledger = tmp_path / "storage", tmp_path / "ledger"
    folder = package(tmp_path / "code", "three")
    ray = os.path.join(os.path.dirname(sys.executable), "ray")
    settings = json.dumps({"env_vars": {"PYWORKFLOW_STORAGE": str(storage)}})
    for run, code in (("run-3", 0), ("run-4", 3)):
        done = subprocess.run(
            [ray, "job", "submit", "--address", cluster.jobs, "--working-dir", str(folder),
             "--runtime-env-json", settings, "--", sys.executable, "start.py", run, str(ledger), "", str(code)],
            env=environment(), capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert f"started {run}" in done.stdout
        assert (done.returncode != 0) == (code != 0), done.stdout + done.stderr
        until(lambda run=run: Storage.open(storage).read_run(run).finished, "the run ends")  # type: ignore[misc]
