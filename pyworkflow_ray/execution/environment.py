"""The code environment of a run: what another process needs to load the same code.

Captured where a run is started, entered where it is executed, before any code of the user is loaded. Called by the
runtime and by `code`'s callers. Rules:

* A root inside the packaged `working_dir` is recorded as a place in that package: each process has its own copy of it.
* A process that enters an environment has its roots in front, in order, and none of the driver's that Ray handed on:
  the actors and workers of one driver also execute the runs of others.

Faults: a directory that is gone, another Python; both are named.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from typing import Any

from pyworkflow_ray.engine.events import CodeEnvironment
from pyworkflow_ray.errors import ConfigurationError

# Modules of ours that make others importable: where the driver has imported one, its workers do, before any code.
_PRELOADED = ("pyworkflow_ray.compat",)

PACKAGED = "{working_dir}"  # how a recorded root that lies in the working_dir's package begins


def python_version() -> str:
    """Minor version of this Python, as "3.11": code by value runs on no other."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def capture_environment(
    runtime_env: Mapping[str, Any] | None = None,
    *,
    code_version: str | None = None,
    working_dir: str | None = None,
    packages: Mapping[str, str] | None = None,
) -> CodeEnvironment:
    """The environment of this process: Python, import roots, and the `runtime_env` that Ray builds.

    Args:
        working_dir: Where this process has what `runtime_env` packages as `working_dir`.
        packages: Where the packages that `runtime_env` names are stored: URI to blob.

    Raises:
        ConfigurationError: `runtime_env` holds something that JSON can't.
    """
    roots = [_packaged(root, working_dir) for root in import_roots()]
    python = python_version()
    env = dict(runtime_env or {})
    preload = tuple(module for module in _PRELOADED if module in sys.modules)
    try:
        parts = [python, roots, env, code_version, *([list(preload)] if preload else [])]
        text = json.dumps(parts, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"runtime_env={env!r} can't be recorded: {error}. Use plain JSON values") from error
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    return CodeEnvironment(
        key=key,
        python=python,
        import_roots=tuple(roots),
        runtime_env=json.loads(json.dumps(env)),
        code_version=code_version,
        preload=preload,
        packages=dict(packages or {}),
    )


def import_roots() -> list[str]:
    """Entries of `sys.path` that belong to the user: absolute, existing, outside Python's own directories, in order."""
    own = own_directories()
    roots: list[str] = []
    for entry in sys.path:
        path = _real(entry)
        if path in roots or not os.path.exists(path) or any(path == o or path.startswith(o + os.sep) for o in own):
            continue
        roots.append(path)
    return roots


def enter_environment(
    environment: CodeEnvironment, *, working_dir: str | None = None, foreign: Iterable[str] = ()
) -> list[str]:
    """Make this process able to import the environment's code; returns the import roots that are gone.

    The environment's roots are put in front, in their order: where two roots have a module of one name, the first wins
    as it did in the driver.

    Args:
        working_dir: Where this process has the `working_dir` package of the environment.
        foreign: Entries of `sys.path` that another driver has left here; they go, unless the environment has them.

    Raises:
        ConfigurationError: this is another minor version of Python.
    """
    if environment.python != python_version():
        raise ConfigurationError(
            f"the run's code is of Python {environment.python}, this is {python_version()} ({sys.executable}). "
            "Use the same minor version"
        )
    roots = [_here(root, working_dir) for root in environment.import_roots]
    others = {*roots, *map(_real, foreign)}
    path = [*roots, *(entry for entry in sys.path if _real(entry) not in others)]
    if path != sys.path:
        sys.path[:] = path
        importlib.invalidate_caches()
    for module in environment.preload:
        if module in _PRELOADED:
            importlib.import_module(module)
    gone = [root for root in roots if not os.path.exists(root)]
    if gone:
        importlib.invalidate_caches()  # Python remembers that a root is no directory; it may be restored
    return gone


def packaged_working_dir(runtime_env: Mapping[str, Any]) -> str | None:
    """Where this process has the package that `runtime_env` names as its `working_dir`; None: it has none.

    Ray unpacks it under the package's name and puts it into PYTHONPATH, of a job's driver and of workers alike.
    """
    uri = runtime_env.get("working_dir")
    if not isinstance(uri, str) or "://" not in uri:
        return None
    name = package_name(uri)
    return next((path for path in map(_real, sys.path) if os.path.basename(path) == name), None)


def package_name(uri: str) -> str:
    """Name of the directory that Ray unpacks `gcs://_ray_pkg_….zip` into."""
    return uri.rpartition("/")[2].partition(".")[0]


def _real(entry: str) -> str:
    return os.path.realpath(entry or os.getcwd())


def _packaged(root: str, working_dir: str | None) -> str:
    if working_dir is not None and (root == working_dir or root.startswith(working_dir + os.sep)):
        return PACKAGED + root[len(working_dir) :]
    return root


def _here(root: str, working_dir: str | None) -> str:
    if root.startswith(PACKAGED) and working_dir is not None:
        return working_dir + root[len(PACKAGED) :]
    return root


def own_directories() -> set[str]:
    """Where Python and what is installed into it lie."""
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths.update(getattr(site, "getsitepackages", list)())
    if getattr(site, "ENABLE_USER_SITE", False):
        paths.add(site.getusersitepackages())
    stdlib = sysconfig.get_path("stdlib")
    zipped = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    paths.add(os.path.join(os.path.dirname(stdlib), zipped))
    return {os.path.realpath(path) for path in paths if path}
