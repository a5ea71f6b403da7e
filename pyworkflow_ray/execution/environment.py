"""The code environment of a run: what another process needs to load the same code.

Captured where a run is started, entered where it is executed, before any code of the user is loaded. Called by the
runtime and by `code`'s callers. Faults: a directory that is gone, another Python; both are named.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import site
import sys
import sysconfig
from collections.abc import Mapping
from typing import Any

from pyworkflow_ray.engine.events import CodeEnvironment
from pyworkflow_ray.errors import ConfigurationError

# Modules of ours that make others importable: where the driver has imported one, its workers do, before any code.
_PRELOADED = ("pyworkflow_ray.compat",)


def python_version() -> str:
    """Minor version of this Python, as "3.11": code by value runs on no other."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def capture_environment(
    runtime_env: Mapping[str, Any] | None = None, *, code_version: str | None = None
) -> CodeEnvironment:
    """The environment of this process: Python, import roots, and the `runtime_env` that Ray builds.

    Raises:
        ConfigurationError: `runtime_env` holds something that JSON can't.
    """
    roots = import_roots()
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
    )


def import_roots() -> list[str]:
    """Entries of `sys.path` that belong to the user: absolute, existing, outside Python's own directories, in order."""
    own = _own_directories()
    roots: list[str] = []
    for entry in sys.path:
        path = os.path.realpath(entry or os.getcwd())
        if path in roots or not os.path.exists(path) or any(path == o or path.startswith(o + os.sep) for o in own):
            continue
        roots.append(path)
    return roots


def enter_environment(environment: CodeEnvironment) -> list[str]:
    """Make this process able to import the environment's code; returns the import roots that are gone.

    Missing roots are put in front, in their order: where two roots have a module of one name, the first wins as it
    did in the driver.

    Raises:
        ConfigurationError: this is another minor version of Python.
    """
    if environment.python != python_version():
        raise ConfigurationError(
            f"the run's code is of Python {environment.python}, this is {python_version()} ({sys.executable}). "
            "Use the same minor version"
        )
    known = {os.path.realpath(entry or os.getcwd()) for entry in sys.path}
    missing = [root for root in environment.import_roots if root not in known]
    if missing:
        sys.path[:0] = missing
        importlib.invalidate_caches()
    for module in environment.preload:
        if module in _PRELOADED:
            importlib.import_module(module)
    return [root for root in environment.import_roots if not os.path.exists(root)]


def _own_directories() -> set[str]:
    paths = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    paths.update(getattr(site, "getsitepackages", list)())
    if getattr(site, "ENABLE_USER_SITE", False):
        paths.add(site.getusersitepackages())
    stdlib = sysconfig.get_path("stdlib")
    zipped = f"python{sys.version_info.major}{sys.version_info.minor}.zip"
    paths.add(os.path.join(os.path.dirname(stdlib), zipped))
    return {os.path.realpath(path) for path in paths if path}
