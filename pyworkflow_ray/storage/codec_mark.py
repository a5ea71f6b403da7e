"""Which codec a storage is written through: the hook that a setting names, and the mark that holds a storage to it.

Called by the client and by whatever makes a codec; calls `checked`, `disk` and the user's hook. Rules:

* A hook is named, "module:object", and made anew in each process: keys lie in no record, no argument and no actor.
* The mark `codec.json` is made before the first run and never removed. Whoever writes must have a hook that reveals it,
  and one whose digests are the mark's; so a storage is encrypted whole or not at all.
* Once a hook's newest key is another one the mark is written anew with it, so that old keys can be dropped one day.

Faults: a module that can't be imported here, a hook that raises, another key, two processes that make the mark at once.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from typing import Any, Final, cast

from pyworkflow_ray.errors import CodecKeyError, ConfigurationError, CorruptJournalError, PayloadError
from pyworkflow_ray.storage.checked import decode_checked, encode_checked
from pyworkflow_ray.storage.protection import CodecHook, protect, reveal

MARK: Final = "codec.json"
KEYS_VARIABLE: Final = "PYWORKFLOW_CRYPTO_KEYS"
_PLACE: Final = b"\0mark"
_TEXT: Final = b"pyworkflow-ray: written through this codec"
_PARTS: Final = ("digest_key", "protect", "reveal")

_hooks: dict[str, CodecHook] = {}


# The hook ---------------------------------------------------------------------------------------------------------


def name_of(codec: Any) -> str:
    """The name "module:object" of what a user gave as codec: such a name, or a function or class that has one.

    Raises:
        ValueError: it is something else, or can't be found under its name in another process.
    """
    if isinstance(codec, str):
        module, colon, path = codec.partition(":")
        if not colon or not all(part.isidentifier() for part in (*module.split("."), *path.split("."))):
            raise ValueError("give the name of a hook or of a function that makes one: 'module:object'")
        return codec
    if not inspect.isfunction(codec) and not inspect.isclass(codec):
        raise ValueError(
            f"a {type(codec).__name__} can't be sent to the workers, and its keys should not be: give the name "
            "'module:object' of a hook or of a function that makes one in each process"
        )
    module, path = codec.__module__, codec.__qualname__
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    if module == "__main__" or found is not codec:
        raise ValueError(f"{path} can't be imported by the workers: put it at the top of a module")
    return f"{module}:{path}"


def load_hook(name: str | None) -> CodecHook | None:
    """The hook of this name in this process, made at its first use; None for None.

    Raises:
        ConfigurationError: it can't be made here, or is no hook.
    """
    if name is None:
        return None
    hook = _hooks.get(name)
    if hook is None:
        module, _, path = name.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in path.split("."):
                found = getattr(found, part)
            if not all(hasattr(found, part) for part in _PARTS) or inspect.isclass(found):
                found = found()
        except ConfigurationError:
            raise
        except Exception as error:
            raise ConfigurationError(
                f"codec={name!r} can't be had in this process ({type(error).__name__}: {error}): its module must be "
                "installed, or lie beside the workflow's, wherever runs are executed or read"
            ) from error
        missing = [part for part in _PARTS if not hasattr(found, part)]
        if missing:
            raise ConfigurationError(f"codec={name!r} is no codec hook: {type(found).__name__} has no {missing[0]!r}")
        hook = _hooks[name] = cast(CodecHook, found)
    return hook


def refuse_keys(variables: Mapping[str, Any]) -> None:
    """Raise ConfigurationError for keys in the `env_vars` of a runtime_env, which every run records in clear."""
    if KEYS_VARIABLE in variables:
        raise ConfigurationError(
            f"runtime_env has {KEYS_VARIABLE}, and each run records its runtime_env: the keys would lie beside what "
            f"they encrypt. Set it in the environment of each node, or put the keys in a file there and name that: "
            f"{KEYS_VARIABLE}_FILE"
        )


# The mark ---------------------------------------------------------------------------------------------------------


def check_mark(storage: Any, hook: CodecHook | None) -> None:
    """Raise ConfigurationError where `storage` is written through another codec, or key, than `hook`."""
    try:
        content = _read(storage)
    except FileNotFoundError:
        content = None
    if content is None and hook is None:
        return
    root = storage.root
    if content is None:
        raise ConfigurationError(
            f"the runs in {root} are not encrypted, and a codec is set: what is there would stay readable. Start with "
            "an empty storage, or leave the codec out (pw.init(codec=None), PYWORKFLOW_CODEC)"
        )
    if hook is None:
        raise ConfigurationError(
            f"the runs in {root} are encrypted, through the codec {content['codec']!r}, and no codec is set here: set "
            f"pw.init(codec={content['codec']!r}) or PYWORKFLOW_CODEC"
        )
    try:
        same = reveal(hook, base64.b64decode(content["check"]), _PLACE) == _TEXT
    except (CodecKeyError, CorruptJournalError) as error:
        raise ConfigurationError(_OTHER_KEY.format(root=root, codec=content["codec"], error=error)) from error
    if not same:
        raise ConfigurationError(_OTHER_KEY.format(root=root, codec=content["codec"], error="the text is another one"))
    if content["digests"] != _digests(hook):
        raise ConfigurationError(
            f"the runs in {root} were recorded with another digest key: their arguments could not be compared any "
            "more. Use the same `digest_key`; of pyworkflow_ray.crypto that is the first key unless one is given"
        )


_OTHER_KEY = (
    "the runs in {root} are encrypted through another codec, or with another key (theirs is {codec!r}): nothing was "
    "changed. {error}"
)


def make_mark(storage: Any, name: str | None) -> None:
    """Hold `storage` to the codec `name`, if no run was made in it before; called by whoever will write to it.

    Raises:
        ConfigurationError: as `check_mark`; or the hook can't be had.
    """
    hook = load_hook(name)
    if hook is not None and not is_marked(storage) and not _holds_runs(storage):
        _write(storage, hook, str(name), exclusive=True)
    check_mark(storage, hook)
    if hook is not None and _read(storage)["check"] != _check(hook):
        _write(storage, hook, str(name), exclusive=False)


def is_marked(storage: Any) -> bool:
    """Whether the storage is written through a codec."""
    disk = getattr(storage, "disk", None)
    if disk is not None:
        return bool(disk.exists(f"{storage.root}/{MARK}"))
    look = getattr(storage, "is_marked", None)
    return look is not None and bool(look())


def refuse_clear(storage: Any, name: str | None) -> None:
    """Raise ConfigurationError where somebody made the mark since a process without a codec connected."""
    if name is None and is_marked(storage):
        check_mark(storage, None)


def _read(storage: Any) -> dict[str, Any]:
    if not hasattr(storage, "disk"):  # a bucket, which keeps it by itself; or what never has one
        read = getattr(storage, "read_mark", None)
        if read is None:
            raise FileNotFoundError(MARK)
        found: dict[str, Any] = read()
        return found
    path = f"{storage.root}/{MARK}"
    return decode_checked(MARK, storage.disk.read(path), path)


def _write(storage: Any, hook: CodecHook, name: str, *, exclusive: bool) -> None:
    data = encode_checked(MARK, {"codec": name, "check": _check(hook), "digests": _digests(hook)})
    if not hasattr(storage, "disk"):
        storage.write_mark(data, exclusive=exclusive)
        return
    disk, path = storage.disk, f"{storage.root}/{MARK}"
    temporary = f"{storage.root}/tmp/{disk.token()}"
    disk.write_file(temporary, data)
    if exclusive:
        try:
            with contextlib.suppress(FileExistsError):  # another process made it: whose it is will be looked at
                disk.link(temporary, path)
        finally:
            disk.unlink(temporary)
    else:
        disk.rename(temporary, path)
    disk.sync_dir(os.path.dirname(path))


def _check(hook: CodecHook) -> str:
    try:
        return base64.b64encode(protect(hook, _TEXT, _PLACE)).decode()
    except PayloadError as error:
        raise ConfigurationError(f"the codec can't encrypt: {error}") from error


def _digests(hook: CodecHook) -> str | None:
    key = hook.digest_key
    return None if key is None else hashlib.blake2b(_TEXT, key=key[:64], digest_size=16).hexdigest()


def _holds_runs(storage: Any) -> bool:
    return bool(storage.run_directories()) or storage.checkpoints.manifest().number >= 0
