"""The code that Ray ships for a job: packages of its runtime_env, and what else a process knows of its job.

Called by `client` (what its runs are to remember), by the makers of anchors (`restore`), by run actors and step hosts
(`enter`). Ray keeps a package (`gcs://_ray_pkg_….zip`: a job's working_dir, py_modules) with the head of its cluster.
Runs outlive clusters, so each package is stored once beside the runs, by its content, and handed to a cluster that has
it no more.

Faults: the package can't be had (the head forgot it, another storage): `make` of the environment then fails in Ray, and
the runs that need it are paused with its name.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, cast

import ray
from ray.experimental import internal_kv

from pyworkflow_ray.engine.events import CodeEnvironment
from pyworkflow_ray.errors import PyWorkflowError
from pyworkflow_ray.execution.environment import (
    capture_environment,
    enter_environment,
    import_roots,
    packaged_working_dir,
)

log = logging.getLogger("pyworkflow_ray")

_IN_CLUSTER = "gcs://"
_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set for the driver of a submitted job
_SUBMISSION_ID = "job_submission_id"


class _Blobs(Protocol):
    def put_blob(self, data: bytes) -> str: ...

    def get_blob(self, digest: str) -> bytes: ...


def capture(blobs: _Blobs) -> CodeEnvironment:
    """The code environment of this driver; its packages are stored, durably."""
    runtime_env = _runtime_env()
    packages: dict[str, str] = {}
    for uri in _uris(runtime_env):
        data = _kept_by_ray(uri)
        if data is not None:
            packages[uri] = blobs.put_blob(data)
    working_dir = packaged_working_dir(runtime_env) or _packed_from(runtime_env)
    return capture_environment(runtime_env, working_dir=working_dir, packages=packages)


def restore(environment: CodeEnvironment, blobs: _Blobs) -> None:
    """Hand Ray the packages of this environment that it has no more. What can't be had is logged and left to Ray."""
    for uri, digest in environment.packages.items():
        try:
            if internal_kv._internal_kv_exists(uri.encode()):
                continue
            internal_kv._internal_kv_put(uri.encode(), blobs.get_blob(digest))
            internal_kv._pin_runtime_env_uri(uri, expiration_s=600)  # until an actor with this environment holds it
            log.info("handed package %s to this cluster, which had it no more", uri)
        except (PyWorkflowError, OSError, RuntimeError, ValueError) as error:
            log.warning("package %s can't be handed to this cluster: %s", uri, error)


def enter(environment: CodeEnvironment) -> list[str]:
    """`enter_environment`, in a process that Ray has started: returns the import roots that are gone."""
    return enter_environment(
        environment, working_dir=packaged_working_dir(environment.runtime_env), foreign=_roots_of_the_creator()
    )


def job_attributes() -> dict[str, Any]:
    """Attributes of the runs that this driver starts: `submission_id` in a job that was submitted."""
    try:
        metadata = json.loads(os.environ.get(_JOB_VARIABLE) or "{}").get("metadata") or {}
    except (ValueError, AttributeError):
        return {}
    found = metadata.get(_SUBMISSION_ID)
    return {"submission_id": str(found)} if found else {}


def _runtime_env() -> dict[str, Any]:
    """The job's runtime_env, as far as it is plain data: run actors and steps are to have it too."""
    try:
        env = dict(ray.get_runtime_context().runtime_env)
    except Exception:
        return {}
    return {key: value for key, value in env.items() if not key.startswith("_")}


def _packed_from(runtime_env: Mapping[str, Any]) -> str | None:
    """Of a driver that gave `ray.init` its own directory as working_dir: that directory, if it still is the package."""
    uri = runtime_env.get("working_dir")
    if not isinstance(uri, str) or not uri.startswith(_IN_CLUSTER):
        return None
    private = cast(Any, ray)._private
    try:
        from ray._private.runtime_env.packaging import get_uri_for_directory

        excludes = private.ray_constants.get_runtime_env_default_excludes()
        for directory in dict.fromkeys((os.getcwd(), *import_roots()[:1])):
            if get_uri_for_directory(directory, include_gitignore=True, excludes=excludes) == uri:
                return os.path.realpath(directory)
    except (ImportError, AttributeError, OSError, ValueError) as error:
        log.debug("which directory was packed as %s: %s", uri, error)
    return None


def _uris(runtime_env: Mapping[str, Any]) -> Iterator[str]:
    modules = runtime_env.get("py_modules") or ()
    for uri in (runtime_env.get("working_dir"), *modules):
        if isinstance(uri, str) and uri.startswith(_IN_CLUSTER):
            yield uri


def _kept_by_ray(uri: str) -> bytes | None:
    data: bytes | None = internal_kv._internal_kv_get(uri.encode())
    return data


def _roots_of_the_creator() -> list[str]:
    """What Ray has put into `sys.path` for the driver that made this process's first ancestor: not for our runs."""
    try:
        worker = cast(Any, ray)._private.worker.global_worker
        return list(worker.core_worker.get_job_config().py_driver_sys_path)
    except Exception as error:
        log.debug("the job's import path: %s", error)
        return []
