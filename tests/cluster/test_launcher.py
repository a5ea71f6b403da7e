"""cluster.yaml followed on one machine: its commands are executed as they stand, but for what one machine shares.

Left out: `ray stop` (it would end every Ray of the machine) and SSH. Changed: ports and temp dir, for other clusters
may run here; the autoscaler's file, which only `ray up` writes; where the token lies. The package comes from a wheel.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
import yaml
from clusters import ROOT, Head, environment, free_ports, until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CONFIG = yaml.safe_load((ROOT / "cluster.yaml").read_text())
START = """
import pyworkflow_ray as pw

@pw.step
def greet(name: str) -> str:
    return f"hello {name}"

@pw.workflow
async def hello(name: str) -> str:
    return await greet(name)

print(pw.run(hello.options(run_id="from-a-job"), "cluster"))
"""


def test_the_set_up_command_installs_this_package(tmp_path: Path) -> None:
    (command,) = CONFIG["setup_commands"]
    assert command == 'pip install "pyworkflow-ray[objectstore]"'
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / "wheels")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")  # in the place of its name, which a registry knows once it is out
    name = command.removeprefix("pip install ").strip('"').replace("pyworkflow-ray", str(wheel))
    install = [sys.executable, "-m", "pip", "install", name, "--no-deps", "--no-index", "--quiet"]
    install += ["--target", str(tmp_path / "site")]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    said = subprocess.run(
        [sys.executable, "-c", "import pyworkflow_ray; print(pyworkflow_ray.__file__)"],
        cwd=tmp_path, env={**environment(), "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.startswith(str(tmp_path / "site"))


def test_its_start_commands_make_a_cluster_that_takes_jobs_with_a_token_only(tmp_path: Path) -> None:
    temp = tempfile.mkdtemp(prefix="pwr", dir="/tmp")
    token = tmp_path / "ray_token"
    token.write_text("ab" * 32)
    token.chmod(0o600)
    gcs, web, agent, second = free_ports(4)
    shared = {
        **environment(),
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_HEAD_IP": "127.0.0.1",
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
    }
    del shared["RAY_AUTH_MODE"]
    head = CONFIG["head_start_ray_commands"][-1].replace("--autoscaling-config=~/ray_bootstrap_config.yaml", "")
    worker = CONFIG["worker_start_ray_commands"][-1]
    head = head.replace("--port=6379", f"--port={gcs} --dashboard-port={web} --dashboard-agent-listen-port={agent}")
    here = f"--node-ip-address=127.0.0.1 --num-cpus=1 --object-store-memory=80000000 --temp-dir={temp} --block"
    worker = worker.replace(":6379", f":{gcs} --dashboard-agent-listen-port={second}")
    out = Path(temp, "out")
    out.touch()
    started = [subprocess.Popen(["bash", "-c", f"{head} {here} >{out} 2>&1"], env=shared)]
    try:
        until(lambda: "Ray runtime started" in out.read_text(errors="replace"), "the head has started")
        started.append(subprocess.Popen(["bash", "-c", f"{worker} {here} >>{out} 2>&1"], env=shared))
        (tmp_path / "code").mkdir()
        (tmp_path / "code" / "start.py").write_text(START)
        address = f"http://127.0.0.1:{web}"
        settings = yaml.safe_dump({"env_vars": {"PYWORKFLOW_STORAGE": str(tmp_path / "storage")}})
        (tmp_path / "env.yaml").write_text(settings)
        job = ["ray", "job", "submit", "--address", address, "--working-dir", str(tmp_path / "code"), "--runtime-env",
               str(tmp_path / "env.yaml"), "--", "python", "start.py"]  # fmt: skip
        known = {**shared, "RAY_AUTH_MODE": "token"}
        done = until(lambda: submitted(job, known), "the job server takes the job")
        assert "hello cluster" in done
        stranger = {**known, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "other")}
        (tmp_path / "other").write_text("cd" * 32)
        refused = subprocess.run(job, env=stranger, capture_output=True, text=True, timeout=120, check=False)
        assert refused.returncode != 0
        assert "hello cluster" not in refused.stdout
    finally:
        for process in started:
            Head("", "", temp, process, {c.pid for c in psutil.Process(process.pid).children(recursive=True)}).kill()


def submitted(job: list[str], env: dict[str, str]) -> str | None:
    done = subprocess.run(job, env=env, capture_output=True, text=True, timeout=180, check=False)
    return done.stdout if done.returncode == 0 else None
